"""Virtual tokens: the first slots of a document, which stand for no token of its text.

Decides how callers make room for them, how learned vectors get into them, and from which tokens the vectors start.
What the vectors are (embeddings, or keys and values) is decided in `prompt.py` and `prefix.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ratoon.adapt.contract import Method
from ratoon.base.errors import ConfigError
from ratoon.base.seeds import stream
from ratoon.base.settings import Settings
from ratoon.model.transformer import Transformer

VIRTUAL_ID = 0
"""What stands in a virtual slot; its embedding is computed and thrown away, so that any id would do."""
COMMON_TOKENS = 5000
"""Start vectors are sampled from so many tokens (Lester et al., arXiv:2104.08691, section 3.1: the most common ones;
the ids of a BPE vocabulary are in the order of the merges, the common ones first)."""


def with_virtual(ids: Sequence[int], tokens: int) -> list[int]:
    """A text's ids behind `tokens` placeholders. Masks and weights of those slots are 0, positions count them."""
    return [VIRTUAL_ID] * tokens + list(ids)


def fill(x_BTX: Tensor, values_PX: Tensor, start: int, position_BT: Tensor | None) -> Tensor:
    """`x_BTX` with row p of `values_PX` in every slot of position p < P.

    `position_BT` absent: positions are start, start + 1, … in every row. The rows are picked by a product with 0 and 1:
    exact, and its gradient is summed in float32 whatever the type of the values.
    """
    P, T = values_PX.shape[0], x_BTX.shape[1]
    if position_BT is None:
        if start >= P:
            return x_BTX
        position_BT = torch.arange(start, start + T, device=x_BTX.device)[None]
    position_BT1 = position_BT[..., None]
    slot_BTP = position_BT1 == torch.arange(P, device=x_BTX.device)
    return torch.where(position_BT1 < P, slot_BTP.to(x_BTX.dtype) @ values_PX.to(x_BTX.dtype), x_BTX)


class Virtual(Method):
    """What prompt and prefix tuning share: the number of slots, and the tokens they start from."""

    not_merged = "its parts are no change of the base's weights, but tokens in front of each text"

    def __init__(self, settings: Settings, tokens: int) -> None:
        super().__init__(settings)
        self.virtual_tokens = tokens
        self._text_ids: list[int] | None = None

    def read_text(self, encode: Callable[[str], Sequence[int]]) -> None:
        """Take the ids of the text that the slots start from, where the settings name one; before `install`."""
        text = getattr(self.settings, "text", None)
        if text is None:
            return
        self._text_ids = list(encode(text))
        if not self._text_ids:
            raise ConfigError("the text has no token", where="method.text", expected="at least one token")

    def _start_ids(self, model: Transformer, seed: int) -> Tensor:
        """Ids (P,) of the tokens that the slots start from: the text's, repeated or cut to fit, or sampled."""
        P, vocab = self.virtual_tokens, model.cfg.vocab_size
        device = model.embed.weight.device
        if getattr(self.settings, "text", None) is None:
            chosen = stream(seed, "method", self.kind, "tokens").integers(0, min(vocab, COMMON_TOKENS), P)
            return torch.from_numpy(chosen).to(device)
        if self._text_ids is None:
            raise ConfigError(
                "the slots start from a text, and nobody has read it",
                where="method.text",
                fix="call read_text(tokenizer.encode) before install",
            )
        if not 0 <= min(self._text_ids) <= max(self._text_ids) < vocab:
            raise ConfigError(
                "the text has ids outside the model's vocabulary",
                where="method.text",
                expected=f"ids from 0 to {vocab - 1}",
                fix="read the text with the model's own tokenizer",
            )
        times = -(-P // len(self._text_ids))
        return torch.tensor((self._text_ids * times)[:P], device=device)

    def facts(self, model: Transformer) -> dict[str, object]:
        """How many tokens the text had that the slots started from, and how many of them were used."""
        if self._text_ids is None:
            return {}
        found = len(self._text_ids)
        return {"text_tokens": found, "text_tokens_used": min(found, self.virtual_tokens)}


def room_for(model: Transformer, tokens: int) -> None:
    """Raises `ConfigError` where the slots would leave no place for a text."""
    if tokens >= model.cfg.context_tokens:
        raise ConfigError(
            f"{tokens} virtual tokens leave no room for a text",
            where="method.tokens",
            expected=f"fewer than the {model.cfg.context_tokens} tokens of the model's context",
        )
