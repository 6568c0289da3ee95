"""An encoder-decoder as a user meets it: it reads a source and writes a target, a translation or a summary.

Decides how sources become ids and where a target begins. The loop is `decode.py`'s, beams are `beam.py`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ratoon.base.errors import ConfigError
from ratoon.generate.decode import generate
from ratoon.generate.lm import LanguageModel
from ratoon.generate.rows import Generated
from ratoon.generate.sample import Sampling
from ratoon.model.encoder_decoder import EncoderDecoder

if TYPE_CHECKING:
    from ratoon.tasks.contract import Question


@dataclass
class Translator(LanguageModel):
    """An encoder-decoder with its tokenizer. What is given to `generate` is read by the encoder; the answer is what the
    decoder writes."""

    model: EncoderDecoder  # type: ignore[assignment]

    @torch.no_grad()
    def logits(
        self, ids_BT: Tensor | Sequence[Sequence[int]], sources: Tensor | Sequence[Sequence[int]] | None = None
    ) -> Tensor:
        """Scores of the next token after each position of a target, beside sources (B, S): (B, T, V) float32."""
        if sources is None:
            raise ConfigError("an encoder-decoder scores a target beside its source", expected="logits(ids, sources)")
        device = self.model.head_weight().device
        ids_BT, source_BS = (torch.as_tensor(one, dtype=torch.int64, device=device) for one in (ids_BT, sources))
        return self.model.logits(self.model(ids_BT, source_BS)).float()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        shorten: Literal["left"] | None = None,
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[Generated]:
        """A target for each source (texts, or token ids), in their order; settings are `Sampling`'s.

        `shorten="left"` keeps the end of a source that is longer than the encoder's context. An answer's
        `prompt_tokens` are its source's. Raises as `LanguageModel.generate` does.
        """
        sampling = self._sampling(sampling, settings)
        if isinstance(prompts, str):
            prompts = [prompts]
        sources = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        most = self.model.encoder.cfg.context_tokens
        kept = [source[-most:] if shorten == "left" else source for source in sources]
        made = self._write([[self.begin_id]] * len(kept), kept, sampling, logprobs=logprobs, on_text=on_text)
        for one, source, rest in zip(made, sources, kept, strict=True):
            one.prompt_tokens, one.dropped_prompt_tokens = len(rest), len(source) - len(rest)
        return made

    def answer(self, questions: Sequence[Question], sampling: Sampling) -> list[str]:
        """The text that is written for each question of a task, from its own beginning."""
        sources = []
        for question in questions:
            if question.source is None:
                raise ConfigError(
                    "the task puts its source into the prompt, and this model reads it apart",
                    where="task.as_source",
                    fix="say task.as_source: true",
                )
            sources.append(question.source)
        return self._texts(questions, self._write([question.ids for question in questions], sources, sampling))

    @property
    def begin_id(self) -> int:
        """The token that a target begins with."""
        begin = self.model.cfg.bos_id
        if begin is None:
            raise ConfigError("the model does not say what a target begins with", where=self.facts.get("path"))
        return begin

    @property
    def can_chat(self) -> bool:
        """Never: it holds no conversation."""
        return False

    def chat(self, messages: Sequence[dict[str, str]], *rest: Any, **more: Any) -> Generated:
        """Refused with a `ConfigError`."""
        raise ConfigError(
            f"'{self.name}' is an encoder-decoder: it writes a target for a source, and holds no conversation",
            expected="a model that goes on with a text",
            fix="use generate, which reads the source",
        )

    def _write(
        self,
        begun: list[list[int]],
        sources: list[list[int]],
        sampling: Sampling,
        *,
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Generated]:
        return generate(
            self.model,
            begun,
            sampling,
            # A target's text does not go on from its source: its decoder has seen nothing.
            decoder=(lambda _: self._decoder([])) if self.tokenizer is not None else None,
            eos_ids=self.eos_ids,
            sources=sources,
            logprobs=logprobs,
            on_text=on_text,
        )
