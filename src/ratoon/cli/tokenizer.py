"""`ratoon tokenizer`: train one on its own, or look into one: compression, unused tokens, round trip, special tokens.

How a tokenizer works is `text/tokenizer.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.text.tokenizer import Tokenizer

BATCH_CHARACTERS = 1 << 20
LONGEST, UNUSED_SHOWN = 12, 12
HARD = (
    "A\u00a0b\t c  \r\n\n  naïve café e\u0301 Ω≈ç√ 12345678 〇一二 ㍿ ﬁ 👩\u200d🔬🇨🇳 𠮷 "
    "\u202eabc\u202c \x07 <|im_start|> \ufffd end "
)
"""What tokenizers lose: runs of spaces, line ends, marks, joined emoji, signs outside the first plane, controls."""

SAMPLES = {
    "english": (
        "The morning train was late again, so the whole platform had time to read the notice about the new "
        "timetable. Nobody believed it. A girl with a red umbrella counted the pigeons under the roof, and her "
        "father, who had promised to be at work by eight, wrote three short messages and deleted two of them. "
        "When the train came at last it was almost empty: everyone had grown used to leaving the house later."
    ),
    "chinese": (
        "早上的火车又晚点了，站台上的人有足够的时间去读那张新时刻表的通知，可是谁也不相信。"
        "一个打着红伞的女孩在数屋檐下的鸽子，她的父亲本来答应八点以前到公司，写了三条短信，又删掉了两条。"
        "火车终于进站的时候，车厢里几乎是空的：大家早就习惯了晚一点出门。质量不错，送货也很快，下次还会再来。"
    ),
    "code": (
        "def moving_average(values: list[float], width: int = 3) -> list[float]:\n"
        '    """Mean of each run of `width` neighbours."""\n'
        "    if width < 1:\n"
        '        raise ValueError(f"width must be at least 1, not {width}")\n'
        "    total, means = 0.0, []\n"
        "    for i, value in enumerate(values):\n"
        "        total += value - (values[i - width] if i >= width else 0.0)\n"
        "        if i + 1 >= width:\n"
        "            means.append(total / width)\n"
        "    return means\n"
    ),
}


@click.group()
def command() -> None:
    """Train a tokenizer, or look into one."""


@command.command("train")
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option("--vocab-size", type=int, required=True, help="Tokens, the 256 bytes and the special ones included.")
@click.option("--split-han", is_flag=True, default=None, help="Every Chinese character is a token of its own.")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option("--split-documents", metavar="HOW", help="As in `ratoon prepare`.")
@click.option("--field", help="The field of rows that holds the text; recognised if not given.")
@click.option("--encoding", help="Encoding of the sources; utf-8 if not given.")
@click.option("--on-bad-row", type=click.Choice(["refuse", "skip"]), help="skip: leave such rows out, counted.")
@click.option("--replace", is_flag=True, help="Put the new folder in the place of one that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the folder, hash and figures as JSON.")
def train(sources: tuple[str, ...], vocab_size: int, out: Path, replace: bool, as_json: bool, **given: Any) -> None:
    """Train a byte-level BPE tokenizer on all of SOURCE… (files, folders, or a name of the catalogue).

    The answer is the folder; `data.tokenizer` of a recipe and `ratoon prepare --tokenizer` take it.
    """
    from ratoon.base.settings import build
    from ratoon.cli.output import answer, answer_json, expect_new, talk
    from ratoon.cli.prepare import named, paths_of, reading_of, say_if_fewer
    from ratoon.data.ledger import Ledger
    from ratoon.data.sources import find_files, read
    from ratoon.recipe import DataSettings, with_documents
    from ratoon.store.artifact import seal
    from ratoon.store.atomic import atomic_folder
    from ratoon.text.tokenizer import Tokenizer

    table = {key: value for key, value in given.items() if value is not None}
    table |= {"vocab_size": vocab_size, **named(sources)}
    expect_new(out, replace=replace)
    data, _ = with_documents(build(DataSettings, table, where="command line"), "command line")
    ledger = Ledger()
    files = find_files(paths_of(data, talk), ledger)
    counted = {"documents": 0, "bytes": 0}

    def texts() -> Iterator[str]:
        for document in read(files, reading_of(data), ledger):
            counted["documents"] += 1
            counted["bytes"] += document.bytes
            yield document.text

    with atomic_folder(out, replace=replace) as folder:
        tokenizer = Tokenizer.train(texts(), vocab_size=vocab_size, split_han=data.split_han)
        tokenizer.save(folder)
        seal(folder, "tokenizer", facts={"hash": tokenizer.hash, **counted}, packages=("tokenizers",))
    talk(f"{tokenizer.vocab_size:,} tokens from {counted['documents']:,} documents, {counted['bytes']:,} bytes")
    say_if_fewer(tokenizer.vocab_size, vocab_size, talk)
    for reason, account in ledger.accounts.items():
        talk(f"{reason}: {account.documents:,} documents left out (first: {account.places[0]})")
    for note in ledger.notes:
        talk(note)
    if as_json:
        answer_json({"folder": str(out), "hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, **counted})
    else:
        answer(str(out))


@command.command("inspect")
@click.argument("model", metavar="MODEL")
@click.argument("files", nargs=-1, metavar="[FILE]…")
@click.option("--field", help="The field of rows that holds the text; recognised if not given.")
@click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(model: str, files: tuple[str, ...], field: str | None, encoding: str, as_json: bool) -> None:
    """Look into the tokenizer of MODEL: a folder with a tokenizer, a run, a GGUF file or a name of the catalogue.

    Without FILE… short samples in English, Chinese and code are read; with them, the files, and the tokens that none
    of them uses are counted.
    """
    from ratoon.cli.output import answer, answer_json
    from ratoon.data.ledger import Ledger
    from ratoon.data.sources import Reading, find_files, read

    tokenizer = tokenizer_of(model)
    measures = [_measure(tokenizer, name, [text]) for name, text in SAMPLES.items()] if not files else []
    for path in find_files(files, Ledger()) if files else ():
        texts = (document.text for document in read([path], Reading(field, encoding=encoding), Ledger()))
        measures.append(_measure(tokenizer, str(path), texts))
    found = facts(tokenizer, model, measures, files_given=bool(files))
    if as_json:
        answer_json(found)
    else:
        answer("\n".join(_page(found)))


def tokenizer_of(name: str) -> Tokenizer:
    """The tokenizer that `name` means: in a folder (a prepared one too), or that of a model.

    Raises `ArtifactError` naming what was looked at.
    """
    from ratoon.base.errors import ArtifactError
    from ratoon.text.pieces import FILES
    from ratoon.text.tokenizer import Tokenizer

    path = Path(name)
    for folder in (path, path / "tokenizer", path / "model"):
        if any((folder / file).is_file() for file in ("tokenizer.json", *FILES)):
            return Tokenizer.load(folder)
    from ratoon.generate.lm import locate

    path = locate(name)
    if path.is_dir():
        return Tokenizer.load(path)
    from ratoon.model.gguf import read_head

    metadata = read_head(path)[0]
    if not any(key.startswith("tokenizer.") for key in metadata):
        raise ArtifactError("the GGUF file holds no tokenizer", where=path, expected="keys tokenizer.ggml.…")
    return Tokenizer.from_gguf_metadata(metadata)


@dataclass
class _Measure:
    """What a tokenizer makes of one text."""

    name: str
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    lost: str | None = None
    used: set[int] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "characters": self.characters,
            "bytes": self.bytes,
            "tokens": self.tokens,
            "bytes_per_token": self.bytes / self.tokens if self.tokens else None,
            "characters_per_token": self.characters / self.tokens if self.tokens else None,
            "round_trip": self.lost is None,
            "lost": self.lost,
        }


def _measure(tokenizer: Tokenizer, name: str, texts: Iterable[str]) -> _Measure:
    found = _Measure(name, used=set())
    assert found.used is not None
    for batch in _batches(texts):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            found.characters += len(text)
            found.bytes += len(text.encode("utf-8"))
            found.tokens += len(ids)
            found.used.update(ids)
            if found.lost is None:
                found.lost = lost_in_round_trip(tokenizer, text)
    return found


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def lost_in_round_trip(tokenizer: Tokenizer, text: str) -> str | None:
    """None when decoding gives the text back; otherwise the first place at which it does not."""
    back = tokenizer.decode(tokenizer.encode(text), skip_special=False)
    if back == text:
        return None
    at = next((i for i, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
    return f"at character {at}: {text[at : at + 8]!r} comes back as {back[at : at + 8]!r}"


def facts(tokenizer: Tokenizer, name: str, measures: list[_Measure], *, files_given: bool) -> dict[str, Any]:
    """Everything there is to say about a tokenizer, as plain values."""
    spelled: Callable[[int], str] = lambda number: tokenizer.decode([number], skip_special=False)  # noqa: E731
    plain = sorted(set(tokenizer.core.get_vocab(with_added_tokens=True).values()) - tokenizer.special_ids)
    words = {number: spelled(number) for number in plain}
    longest = sorted(plain, key=lambda number: (-len(words[number].encode("utf-8", "surrogatepass")), number))
    unused = None
    if files_given:
        used = {number for measure in measures for number in measure.used or ()}
        idle = [number for number in plain if number not in used]
        unused = {
            "count": len(idle),
            "of": len(plain),
            "first": [{"id": number, "text": words[number]} for number in idle[:UNUSED_SHOWN]],
        }
    return {
        "name": name,
        "kind": type(tokenizer.core.model).__name__,
        "hash": tokenizer.hash,
        "vocab_size": tokenizer.vocab_size,
        "special_tokens": tokenizer.special,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "begins_with_bos": tokenizer.adds_bos,
        "chat_template": tokenizer.chat_template is not None,
        "texts": [measure.as_dict() for measure in measures],
        "hard_round_trip": lost_in_round_trip(tokenizer, HARD),
        "unused": unused,
        "longest": [{"id": number, "text": words[number]} for number in longest[:LONGEST]],
    }


def _page(found: dict[str, Any]) -> list[str]:
    from ratoon.cli.output import aligned

    roles = ", ".join(
        f"{role} {found[f'{role}_id']}" for role in ("bos", "eos", "pad") if found[f"{role}_id"] is not None
    )
    lines = [
        f"{found['name']}: {found['kind']}, {found['vocab_size']:,} tokens, sha256 {found['hash']}",
        "special tokens: " + (", ".join(f"{text} = {n}" for text, n in found["special_tokens"].items()) or "none"),
        f"roles: {roles or 'none'}; a text of its own {'begins' if found['begins_with_bos'] else 'does not begin'} "
        f"with bos; chat template: {'yes' if found['chat_template'] else 'no'}",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("text", "characters", "bytes", "tokens", "bytes/token", "characters/token", "round trip")
    ]
    for one in found["texts"]:
        ratios = [f"{one[key]:.2f}" if one[key] else "-" for key in ("bytes_per_token", "characters_per_token")]
        counts = [f"{one[key]:,}" for key in ("characters", "bytes", "tokens")]
        rows.append((one["name"], *counts, *ratios, one["lost"] or "exact"))
    hard = found["hard_round_trip"]
    lines += [*aligned(rows), f"round trip of difficult signs: {hard or 'exact'}", ""]
    if found["unused"] is not None:
        unused = found["unused"]
        share = unused["count"] / unused["of"] if unused["of"] else 0.0
        shown = ", ".join(f"{one['text']!r}" for one in unused["first"])
        lines.append(f"unused on these files: {unused['count']:,} of {unused['of']:,} tokens ({share:.1%}): {shown}")
    lines.append("longest tokens: " + ", ".join(f"{one['text']!r}" for one in found["longest"]))
    return lines
