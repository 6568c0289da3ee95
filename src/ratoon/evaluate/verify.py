"""Equal means equal, checked on a user's own model: each way of computing the same thing, and how far they differ.

Decides what is compared with what, and how far apart is too far. Loading the model, and the gradients (which are
training's), come from the caller.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError, RatoonError
from ratoon.base.seeds import stream
from ratoon.data.batch import Batch
from ratoon.data.pack import Example, pack_whole, whole_rows
from ratoon.data.shards import Shards
from ratoon.generate.decode import Reader
from ratoon.generate.lm import LanguageModel, load
from ratoon.generate.native import NativeStep
from ratoon.generate.rows import Move
from ratoon.model.cache import Cache
from ratoon.model.native import Unavailable
from ratoon.store.artifact import MANIFEST, file_hash, read_manifest
from ratoon.text.stream import StreamDecoder

Gradients = Callable[[Any, Sequence[Batch]], tuple[float, dict[str, Tensor]]]
"""`(model, batches) -> (loss, gradient of each parameter)`: summed over the batches, divided once by the weight."""

ROWS = 8
MOST_TOKENS = 48
"""Tokens of the longest row: enough for windows, caches and masks to matter, few enough to take seconds."""
SCORES_FRACTION = 3e-5
"""Two orders of float32 additions may differ by so much of the largest score; a wrong mask, by far more."""
GRADIENTS_FRACTION = 3e-5
"""The same for gradients, beside the largest one of the whole model."""

SENTENCES = (
    "A ratoon is the new shoot that a cut cane sends up from its old root; the second harvest costs no planting.",
    "宿根是甘蔗收割以后从老根上长出来的新苗，第二年不必再种，就可以收获。",
    'Numbers (3.14, 2,048), quotes "like these", tabs\tand\nnew lines — naïve, Ελλάδα, 🌱👩‍🌾 — come back as they are.',
)


@dataclass(frozen=True)
class Check:
    """One equality: the largest difference found, what is tolerated, and in which unit. `passed` is None where it
    could not be checked; `note` then says why."""

    name: str
    compares: str
    passed: bool | None
    difference: float | None = None
    tolerance: float | None = None
    unit: str = ""
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The check as plain fields."""
        return asdict(self)


class NotChecked(Exception):
    """A check that says nothing about this model here; the message says why."""


@dataclass
class Subject:
    """What is verified: a model in float32, the text it is tried on, and where it lies on the disk."""

    lm: LanguageModel
    rows: list[list[int]]
    texts: list[str]
    path: Path
    sealed: list[Path] = field(default_factory=list)
    """Folders whose manifests are checked: the model's, and those of its run."""
    known: dict[Path, str] = field(default_factory=dict)
    """Files whose sha256 is known from elsewhere: those of the catalogue."""
    saved: Path | None = None
    """Where `saved_is_loaded` left the model as a folder."""


def passages(lm: LanguageModel, held_out: Shards | None = None) -> tuple[list[list[int]], list[str], str]:
    """Eight rows of token ids of unequal length, the texts they are from, and a sentence saying so.

    From the held-out shards where there are any, else from a sentence in English and one in Chinese; without a
    tokenizer, ids drawn from a stream of its own.
    """
    longest = min(MOST_TOKENS, lm.context_tokens)
    texts = list(SENTENCES)
    if held_out is not None:
        ids = held_out.tokens(0, min(held_out.n_tokens, 64 * longest)).tolist()
        said = f"held-out text of the run, {held_out.folder}"
        if lm.tokenizer is not None:
            texts.append(lm.tokenizer.decode(ids))
    elif lm.tokenizer is not None:
        ids = [id for text in texts for id in lm.tokenizer.encode(text)]
        said = "embedded sentences in English and Chinese"
    else:
        ids = stream(1, "verify").integers(0, lm.model.cfg.vocab_size, ROWS * longest).tolist()
        said = "random ids, because the model has no tokenizer"
    lengths = [max(2, longest * share // 48) for share in (48, 36, 31, 24, 17, 11, 7, 3)]
    while len(ids) < sum(lengths):
        ids = ids * 2
    starts = [sum(lengths[:number]) for number in range(ROWS)]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)], texts, said


def verify(subject: Subject, gradients: Gradients) -> Iterator[Check]:
    """Each check's result, as it is made. A check that stops with an error has failed, and says so."""
    workplace = Path(tempfile.mkdtemp(prefix="ratoon-verify-"))
    checks: list[tuple[str, str, Callable[[], Check]]] = [
        ("cached", "reading at once = token by token", lambda: _cached(subject)),
        ("batched", "a padded batch = each prompt alone", lambda: _batched(subject)),
        ("packed", "documents in one row = each alone", lambda: _packed(subject)),
        ("accumulated", "gradients of 1 x 8 rows = 2 x 4 rows", lambda: _accumulated(subject, gradients)),
        ("native", "the decoding step in C = torch", lambda: _native(subject)),
        ("saved", "written to a folder and read = the model", lambda: _saved(subject, workplace)),
        ("transformers", "the same folder read by Transformers", lambda: _transformers(subject)),
        ("tokenizer", "text -> ids -> text, at once and streamed", lambda: _tokenizer(subject)),
        ("manifest", "files on the disk = their manifests' hashes", lambda: _manifest(subject)),
    ]
    try:
        for name, compares, check in checks:
            try:
                found = check()
            except NotChecked as reason:
                yield Check(name, compares, None, note=f"not checked: {reason}")
            except RatoonError as error:
                yield Check(
                    name, compares, False, note=f"{error.found} ({error.where})" if error.where else error.found
                )
            else:
                yield Check(name, compares, found.passed, found.difference, found.tolerance, found.unit, found.note)
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def _judge(difference: float, tolerance: float, unit: str, note: str = "") -> Check:
    # Not `difference > tolerance`: a difference that is no number has not passed.
    return Check("", "", difference <= tolerance, difference, tolerance, unit, note)


def _apart(pairs: Sequence[tuple[Tensor, Tensor]], note: str = "") -> Check:
    """The largest difference of scores, beside the largest score."""
    largest = max(float(wanted.abs().max()) for wanted, _ in pairs)
    difference = max(float((wanted - found).abs().max()) for wanted, found in pairs)
    return _judge(difference, SCORES_FRACTION * max(largest, 1e-6), "logits", note)


@torch.no_grad()
def _alone(subject: Subject) -> list[Tensor]:
    """The scores (T, V) of each row, read by itself without a cache: what everything else is compared with."""
    return [subject.lm.logits([row])[0] for row in subject.rows]


@torch.no_grad()
def _cached(subject: Subject) -> Check:
    model, row = subject.lm.model, subject.rows[0]
    weight = model.head_weight()
    ids_1T = torch.tensor([row], device=weight.device)
    wanted_TV = subject.lm.logits(ids_1T)[0]
    pairs = []
    for cut in sorted({1, len(row) // 2}):
        cache = Cache(model.cfg, 1, len(row), dtype=weight.dtype, device=weight.device)
        pieces = [model.logits(model(ids_1T[:, :cut], cache=cache))]
        pieces += [model.logits(model(ids_1T[:, t : t + 1], cache=cache)) for t in range(cut, len(row))]
        pairs.append((wanted_TV, torch.cat(pieces, dim=1)[0].float()))
    return _apart(pairs, f"{len(row)} tokens, cut at 1 and {len(row) // 2}")


@torch.no_grad()
def _batched(subject: Subject) -> Check:
    """Prompts padded on the left as the decoding loop pads them, and one token more."""
    prompts = [row[:-1] for row in subject.rows]
    reader = Reader(subject.lm.model, prompts, max(map(len, subject.rows)), "torch")
    before_BV = reader.prefill()
    after_BV = reader.step(Move([row[-1] for row in subject.rows], None))
    pairs = []
    for number, alone_TV in enumerate(_alone(subject)):
        pairs += [(alone_TV[-2], before_BV[number].float()), (alone_TV[-1], after_BV[number].float())]
    return _apart(pairs, f"{len(prompts)} prompts of {len(prompts[-1])} to {len(prompts[0])} tokens")


@torch.no_grad()
def _packed(subject: Subject) -> Check:
    model = subject.lm.model
    rows = [row for row in subject.rows if len(row) > 2] or subject.rows
    examples = [Example(row, [1.0] * (len(row) - 1)) for row in rows]
    together = pack_whole(examples, max(len(row) for row in rows) - 1)
    batch = whole_rows(examples, together, max(len(row) for row in rows) - 1)
    device = model.head_weight().device
    ids_BT, position_BT, document_BT = (
        torch.from_numpy(part).to(device) for part in (batch.ids_BT, batch.position_BT, batch.document_BT)
    )
    found_BTV = model.logits(model(ids_BT, position_BT, document_BT)).float()
    pairs = []
    for r, members in enumerate(together):
        for d, number in enumerate(members):
            alone_TV = subject.lm.logits([rows[number][:-1]])[0]
            pairs.append((alone_TV, found_BTV[r][document_BT[r] == d]))
    shared = sum(len(members) for members in together if len(members) > 1)
    return _apart(pairs, f"{len(rows)} documents in {len(together)} rows, {shared} of them share one")


def _accumulated(subject: Subject, gradients: Gradients) -> Check:
    """Rows with unequal masks, so that a mean of means would show."""
    examples = [
        Example(row, [float(place >= number * len(row) // 12) for place in range(len(row) - 1)])
        for number, row in enumerate(subject.rows)
    ]
    batch = whole_rows(examples, [[number] for number in range(ROWS)], max(len(row) for row in subject.rows) - 1)
    model = subject.lm.model
    trained = [parameter.requires_grad for parameter in model.parameters()]
    model.requires_grad_(True)
    try:
        loss, wanted = gradients(model, batch.split(1))
        loss_again, found = gradients(model, batch.split(2))
    finally:
        for parameter, was in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(was)
    largest = max(float(value.abs().max()) for value in wanted.values())
    difference = max(float((wanted[name] - found[name]).abs().max()) for name in wanted)
    difference = max(difference, abs(loss - loss_again) * largest / max(abs(loss), 1e-6))
    return _judge(difference, GRADIENTS_FRACTION * largest, "gradients", f"loss {loss:.6f} and {loss_again:.6f}")


@torch.no_grad()
def _native(subject: Subject) -> Check:
    model = subject.lm.model
    row = subject.rows[0]
    rows = [row, row[::-1], row[1:] + row[:1]]
    cache = Cache(model.cfg, len(rows), len(row), dtype=model.head_weight().dtype)
    try:
        step = NativeStep(model, cache)
    except Unavailable as reason:
        raise NotChecked(str(reason)) from None
    found = [step([one[t] for one in rows], [t] * len(rows), [0] * len(rows)) for t in range(len(row))]
    return _apart([(subject.lm.logits(rows), torch.stack(found, dim=1))], f"{len(rows)} rows of {len(row)} tokens")


@torch.no_grad()
def _saved(subject: Subject, workplace: Path) -> Check:
    lm = subject.lm
    need = sum(parameter.nbytes for parameter in lm.model.parameters())
    room = shutil.disk_usage(workplace).free
    if room < 1.2 * need:
        raise NotChecked(f"it takes {need / 1e9:.1f} GB in {workplace.parent}, and {room / 1e9:.1f} GB are free")
    try:
        folder = lm.save(workplace / "model")
    except ConfigError as error:
        raise NotChecked(f"no family of Transformers can say what this model is: {error.found}") from None
    again = load(folder, dtype=lm.model.head_weight().dtype, device=lm.model.head_weight().device)
    subject.saved = folder
    theirs = dict(again.model.named_parameters())
    pairs: list[tuple[Tensor, Tensor]] = [(value, theirs[name]) for name, value in lm.model.named_parameters()]
    pairs.append((lm.logits([subject.rows[0]]), again.logits([subject.rows[0]])))
    if (None if lm.tokenizer is None else lm.tokenizer.hash) != (
        None if again.tokenizer is None else again.tokenizer.hash
    ):
        raise ArtifactError("the tokenizer that was read gives other ids than the one that was written")
    difference = max(float((wanted - found).abs().max()) for wanted, found in pairs)
    return _judge(difference, 0.0, "weights", f"{len(pairs) - 1} weights, and the logits")


@torch.no_grad()
def _transformers(subject: Subject) -> Check:
    if importlib.util.find_spec("transformers") is None:
        raise NotChecked("the package transformers is not installed")
    if subject.saved is None:
        raise NotChecked("there is no folder of this model to read")
    from transformers import AutoConfig, AutoModelForCausalLM, __version__
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        AutoConfig.from_pretrained(subject.saved, local_files_only=True)
    except (ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:120]
        raise NotChecked(f"Transformers {__version__} does not know this family: {first}") from None
    theirs: Any = AutoModelForCausalLM.from_pretrained(subject.saved, dtype=torch.float32, local_files_only=True)
    theirs.eval()
    pairs = []
    for row, alone_TV in zip(subject.rows, _alone(subject), strict=True):
        pairs.append((theirs(torch.tensor([row])).logits[0].float(), alone_TV.cpu()))
    return _apart(pairs, f"Transformers {__version__}")


def _tokenizer(subject: Subject) -> Check:
    tokenizer = subject.lm.tokenizer
    if tokenizer is None:
        raise NotChecked("the model has no tokenizer")
    wrong = []
    for text in subject.texts:
        ids = tokenizer.encode(text)
        decoder = StreamDecoder(tokenizer)
        streamed = "".join([*(decoder.push(id) for id in ids), decoder.flush()])
        if tokenizer.decode(ids) != text or streamed != text:
            wrong.append(text)
    outside = tokenizer.vocab_size > subject.lm.model.cfg.vocab_size
    note = f"the first that changed: {wrong[0][:40]!r}" if wrong else f"{len(subject.texts)} texts"
    if outside:
        note = f"{tokenizer.vocab_size:,} tokens, but the model has scores for {subject.lm.model.cfg.vocab_size:,}"
    return _judge(float(len(wrong) + outside), 0.0, "texts", note)


def _manifest(subject: Subject) -> Check:
    found = [folder for folder in subject.sealed if (folder / MANIFEST).is_file()]
    if not found and not subject.known:
        raise NotChecked("no manifest: Ratoon did not write these files")
    files = 0
    for folder in found:
        manifest = read_manifest(folder, check="hash")
        files += len(manifest.files)
        parent = manifest.parent("tokenizer")
        tokenizer = subject.lm.tokenizer
        if manifest.kind == "model" and parent is not None and tokenizer is not None and parent.hash != tokenizer.hash:
            raise ArtifactError(
                f"the model was trained with another tokenizer ({parent.hash[:12]})",
                where=folder,
                expected=f"tokenizer {tokenizer.hash[:12]}",
            )
    for file, sha256 in subject.known.items():
        if file_hash(file) != sha256:
            raise ArtifactError("the file's contents changed", where=file, expected=f"sha256 {sha256}")
    places = f"{len(found)} folders" if found else "the catalogue"
    return _judge(0.0, 0.0, "files", f"{files + len(subject.known)} files of {places}")
