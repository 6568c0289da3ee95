"""How good a model is on held-out text: loss, perplexity, bits per byte, each with what it was counted on.

Decides what counts. Every token that has something before it in its row is predicted once, the token that ends a
document included: `loss` and `perplexity` are over these, as in training. `bits_per_byte` leaves the end tokens out,
because they stand for no byte of text: nats of the text's tokens over the UTF-8 bytes these very tokens stand for, so
that models with different tokenizers can be compared. Which rows there are is `data/loader.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ratoon import __version__
from ratoon.base.errors import ArtifactError, ConfigError, DataError, NumericError
from ratoon.data.batch import Batch
from ratoon.data.loader import held_out_grid
from ratoon.data.pack import Grid, stream_rows
from ratoon.data.shards import Shards
from ratoon.evaluate.interval import ratio_interval
from ratoon.model.likelihood import token_losses
from ratoon.model.transformer import Transformer
from ratoon.text.lengths import added_bytes, token_bytes
from ratoon.text.tokenizer import Tokenizer

FEWEST_DOCUMENTS = 8
"""With fewer documents than this an interval over them says little: runs of tokens take their place."""
RUN_TOKENS = 256
"""Length of such a run: losses of neighbouring tokens go together, those of neighbouring runs hardly."""
MOST_TOKENS = {"cpu": 1 << 14, "cuda": 1 << 16}
"""Tokens read at once, however many rows are asked for: training holds micro-batches of this order, and what it costs
to measure should not decide how much memory a run takes."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sums:
    """What was counted, unit by unit: nats and tokens with end tokens, nats and tokens of the text alone, and the
    bytes that these stand for (NaN where that cannot be known)."""

    units: Integers
    nats: Floats
    tokens: Floats
    text_nats: Floats
    text_tokens: Floats
    bytes: Floats


@dataclass(frozen=True)
class Report:
    """A measurement: sums by document and by run of tokens, and what is derived from them.

    `interval_of` says what the 95 % intervals are over: "documents" (how far another draw of documents from the same
    source would differ), or, with fewer than 8 documents, "runs of N tokens" (of this very text).
    """

    documents: Sums
    runs: Sums
    run_tokens: int
    context_tokens: int
    stride_tokens: int
    n_tokens_in_all: int
    signature: str

    @property
    def loss(self) -> float:
        """Nats per token, end tokens included."""
        return float(self.documents.nats.sum() / self.documents.tokens.sum())

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of the text's own tokens over their UTF-8 bytes; None where the bytes cannot be known."""
        total = self.n_bytes
        return float(self.documents.text_nats.sum() / math.log(2) / total) if total else None

    @property
    def n_tokens(self) -> int:
        """Tokens that were predicted."""
        return int(self.documents.tokens.sum())

    @property
    def n_text_tokens(self) -> int:
        """Predicted tokens of the text itself, end tokens left out: those of `bits_per_byte`."""
        return int(self.documents.text_tokens.sum())

    @property
    def n_documents(self) -> int:
        """Documents with at least one predicted token."""
        return len(self.documents.units)

    @property
    def n_bytes(self) -> int | None:
        """Bytes of text that the predicted tokens stand for; None where a document was counted in part and there is
        no tokenizer to say which part."""
        total = float(self.documents.bytes.sum())
        return None if math.isnan(total) else round(total)

    @property
    def by_document(self) -> bool:
        """Whether intervals are over documents."""
        return self.n_documents >= FEWEST_DOCUMENTS

    @property
    def interval_of(self) -> str:
        """What the intervals are over."""
        return "documents" if self.by_document else f"runs of {self.run_tokens} tokens"

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the loss."""
        sums = self._sums
        found = ratio_interval(sums.nats, sums.tokens)
        assert found is not None, "`held_out` sees to two units"
        return found

    @property
    def bits_per_byte_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of bits per byte. Over runs, the text's own bytes per token are taken as given."""
        sums, total = self._sums, self.n_bytes
        if not total:
            return None
        if self.by_document:
            found, scale = ratio_interval(sums.text_nats, sums.bytes), 1.0
        else:
            kept = sums.text_tokens > 0
            found, scale = ratio_interval(sums.text_nats[kept], sums.text_tokens[kept]), sums.text_tokens.sum() / total
        return None if found is None else (found[0] * scale / math.log(2), found[1] * scale / math.log(2))

    @property
    def _sums(self) -> Sums:
        return self.documents if self.by_document else self.runs

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values."""
        low, high = self.interval
        bits = self.bits_per_byte_interval
        return {
            "loss": self.loss,
            "interval": [low, high],
            "perplexity": self.perplexity,
            "perplexity_interval": [_exp(low), _exp(high)],
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": None if bits is None else list(bits),
            "interval_of": self.interval_of,
            "n_tokens": self.n_tokens,
            "n_text_tokens": self.n_text_tokens,
            "n_documents": self.n_documents,
            "n_bytes": self.n_bytes,
            "n_tokens_in_all": self.n_tokens_in_all,
            "context_tokens": self.context_tokens,
            "stride_tokens": self.stride_tokens,
            "signature": self.signature,
        }


@torch.no_grad()
def held_out(
    model: Transformer,
    shards: Shards,
    *,
    context_tokens: int,
    rows: int,
    limit_tokens: int | None = None,
    stride_tokens: int | None = None,
    tokenizer: Tokenizer | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Loss of `model` on `shards`, each token predicted once, in rows of `context_tokens`, at most `rows` at a time.

    A row sees nothing of the row before it; with `stride_tokens` rows overlap, and a token has at least
    `context_tokens` - `stride_tokens` before it (as far as its document reaches back). `limit_tokens`: at most so many
    tokens, in rows spread evenly over the text. `tokenizer` (if absent, the one that was prepared beside the shards)
    counts the bytes of documents that are counted in part. `progress(rows done, rows in all)` is called now and then.
    Raises `DataError` for a text too short to measure, `ArtifactError` for ids that the model does not know,
    `NumericError` for a loss that is not a number.
    """
    _fits(model, shards, context_tokens, stride_tokens)
    grid, row_tokens = held_out_grid(
        shards, context_tokens=context_tokens, limit_tokens=limit_tokens, stride_tokens=stride_tokens
    )
    tokenizer = tokenizer or _beside(shards)
    counter = _Counter(shards, grid, tokenizer)
    rows = max(1, min(rows, MOST_TOKENS.get(model.head_weight().device.type, 1 << 14) // row_tokens))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(grid), rows):
            numbers = np.arange(start, min(start + rows, len(grid)))
            batch = stream_rows(shards, grid, numbers, row_tokens)
            counter.add(batch, numbers, _losses(model, batch))
            progress(int(numbers[-1]) + 1, len(grid))
    finally:
        model.train(was_training)
    stride = min(stride_tokens or row_tokens, row_tokens)
    return Report(
        documents=counter.by_document(),
        runs=counter.by_run(),
        run_tokens=counter.run_tokens,
        context_tokens=row_tokens,
        stride_tokens=stride,
        n_tokens_in_all=shards.n_tokens,
        signature=(
            f"ratoon {__version__}, {model.head_weight().dtype}".replace("torch.", "")
            + f", tokenizer {(shards.tokenizer_hash or 'unknown')[:12]}, text {shards.manifest.hash[:12]}"
        ),
    )


def _fits(model: Transformer, shards: Shards, context_tokens: int, stride_tokens: int | None) -> None:
    if context_tokens > model.cfg.context_tokens or context_tokens < 1:
        raise ConfigError(
            f"context_tokens is {context_tokens:,}",
            where="evaluation",
            expected=f"1 to {model.cfg.context_tokens:,}, the model's context",
        )
    if stride_tokens is not None and not 1 <= stride_tokens <= context_tokens:
        raise ConfigError(
            f"stride is {stride_tokens:,}", where="evaluation", expected=f"1 to {context_tokens:,}, the context"
        )
    if shards.n_tokens < 3:
        raise DataError(
            f"the text has {shards.n_tokens} tokens: nothing can be measured on it",
            where=shards.folder,
            expected="at least three tokens",
            fix="give more text",
        )
    if shards.largest_id >= model.cfg.vocab_size:
        raise ArtifactError(
            f"the text holds token {shards.largest_id}, the model knows {model.cfg.vocab_size}",
            where=shards.folder,
            expected="shards made with the model's tokenizer",
            fix="prepare the text with the model's tokenizer",
        )


def _losses(model: Transformer, batch: Batch) -> Floats:
    """-log p of the counted targets of a batch, in row order."""
    device = model.head_weight().device
    plain = batch.one_document_rows and not batch.position_BT[:, 0].any()
    hidden_BTD = model(
        torch.from_numpy(batch.ids_BT).to(device),
        None if plain else torch.from_numpy(batch.position_BT).to(device),
        None if plain else torch.from_numpy(batch.document_BT).to(device),
    )
    counted_BT = torch.from_numpy(batch.weight_BT != 0)
    targets_N = torch.from_numpy(batch.targets_BT)[counted_BT].to(device)
    if not len(targets_N):
        return np.zeros(0)
    losses_N = token_losses(model, hidden_BTD[counted_BT.to(device)], targets_N)
    found: Floats = losses_N.double().cpu().numpy()
    if not np.isfinite(found).all():
        row = int(np.nonzero(batch.weight_BT)[0][int(np.flatnonzero(~np.isfinite(found))[0])])
        raise NumericError("the loss is not finite", where=batch.rows[row], expected="finite weights in the model")
    return found


class _Counter:
    """Adds losses up by document and by run of tokens."""

    def __init__(self, shards: Shards, grid: Grid, tokenizer: Tokenizer | None) -> None:
        self.shards, self.grid = shards, grid
        self.lengths = None if tokenizer is None else token_bytes(tokenizer)
        self.added = 0 if tokenizer is None or self.lengths is None else added_bytes(tokenizer, self.lengths)
        learned = int((grid.learned_to - grid.learned_from).sum())
        self.run_tokens = max(1, min(RUN_TOKENS, learned // (2 * FEWEST_DOCUMENTS)))
        self._documents: list[npt.NDArray[np.float64]] = []
        self._runs: list[npt.NDArray[np.float64]] = []

    def add(self, batch: Batch, numbers: Integers, losses: Floats) -> None:
        """The losses of the counted targets of the grid's rows `numbers`."""
        row, place = np.nonzero(batch.weight_BT)
        targets = batch.targets_BT[row, place]
        index = self.grid.starts[numbers][row] + place
        starts = self.shards.document_starts
        # An end token is the last thing that its document's own tokens predict.
        document = np.searchsorted(starts[1:-1], index, side="right")
        separated = self.shards.separator_id is not None
        text = 1.0 - ((starts[document + 1] == index + 1) & separated)
        size = np.full(len(targets), np.nan)
        if self.lengths is not None:
            size = (self._sizes(targets) - self.added * ((starts[document] == index) & separated)) * text
        columns = np.stack([losses, np.ones(len(losses)), losses * text, text, size])
        self._documents.append(_grouped(document, columns))
        run = numbers[row] * (batch.ids_BT.shape[1] // self.run_tokens + 1) + place // self.run_tokens
        self._runs.append(_grouped(run, columns))

    def by_document(self) -> Sums:
        """The sums of each document. Bytes of whole documents are those of their text, whatever the tokenizer."""
        sums = _sums(self._documents)
        starts, begun = self.shards.document_starts, int(self.shards.separator_id is not None)
        whole = sums.text_tokens == np.diff(starts)[sums.units] - begun
        sums.bytes[whole] = self.shards.document_bytes[sums.units[whole]]
        return sums

    def by_run(self) -> Sums:
        """The sums of each run. Raises `DataError` when there are fewer than two."""
        sums = _sums(self._runs)
        if len(sums.units) < 2:
            raise DataError(
                f"{len(sums.units)} tokens could be predicted: nothing can be said of how sure the loss is",
                where=self.shards.folder,
                expected="at least two tokens",
                fix="give more text",
            )
        return sums

    def _sizes(self, targets: Integers) -> Floats:
        assert self.lengths is not None
        known = np.minimum(targets, len(self.lengths) - 1)
        return np.where(targets < len(self.lengths), self.lengths[known], 0).astype(np.float64)


def _grouped(keys: Integers, columns: Floats) -> Floats:
    """Columns summed where keys are equal; the first column of the result is the key."""
    units, place = np.unique(keys, return_inverse=True)
    return np.stack([units.astype(np.float64), *(np.bincount(place, column, len(units)) for column in columns)])


def _sums(parts: list[Floats]) -> Sums:
    joined = np.concatenate(parts, axis=1)
    units, *columns = _grouped(joined[0].astype(np.int64), joined[1:])
    return Sums(units.astype(np.int64), *columns)


def _beside(shards: Shards) -> Tokenizer | None:
    """The tokenizer that `prepare` put beside the shards, if it is theirs."""
    folder = shards.folder.parent / "tokenizer"
    if not (folder / "tokenizer.json").is_file():
        return None
    found = Tokenizer.load(folder)
    return found if found.hash == shards.tokenizer_hash else None


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
