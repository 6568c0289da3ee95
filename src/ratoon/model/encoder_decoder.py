"""An encoder and a decoder as one model: it reads a source and writes a target beside it.

Decides how the two Transformers stand together, and offers the surface that the one loop and the one decoding ask of
any model. What a block computes is `transformer.py`'s; how it lies on disk, `folder.py`'s.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ratoon.model.config import EncoderDecoderSettings, ModelConfig
from ratoon.model.fused import run_starts
from ratoon.model.layers import Linear
from ratoon.model.transformer import Block, Site, TaskHead, Transformer


class EncoderDecoder(nn.Module):
    """An encoder that sees its whole source and a decoder that attends to it (Vaswani et al., arXiv:1706.03762).

    `encoder` has `causal=False`, `decoder` has `cross_attention=True`; both have the same width. With
    `shared_embeddings` source and target use one table, whose name is `encoder.embed.weight`: with the encoder frozen,
    it is frozen too. Parameters are NaN until `init.py` or a reader sets them.
    """

    task_head: TaskHead | None = None
    """It has none: what it answers is text."""

    def __init__(self, encoder: ModelConfig, decoder: ModelConfig, *, shared_embeddings: bool = True) -> None:
        super().__init__()
        assert not encoder.causal and decoder.cross_attention and encoder.width == decoder.width
        assert encoder.moe is None and decoder.moe is None, "mixtures have a loss of balance, which nobody adds here"
        self.encoder = Transformer(encoder)
        self.decoder = Transformer(decoder)
        self.shared_embeddings = shared_embeddings
        if shared_embeddings:
            assert encoder.vocab_size == decoder.vocab_size
            self.encoder.embed = self.decoder.embed

    @property
    def cfg(self) -> ModelConfig:
        """The decoder's settings: its vocabulary, context and ends are those of what is written."""
        return self.decoder.cfg

    @property
    def configs(self) -> tuple[ModelConfig, ...]:
        """The settings of both parts, in the order of their blocks."""
        return self.encoder.cfg, self.decoder.cfg

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks of both parts, from the source to the target."""
        return [*self.encoder.layers, *self.decoder.layers]

    @property
    def head(self) -> Linear | None:
        """The decoder's own head; None where it is tied to the embedding."""
        return self.decoder.head

    def set_dropout(self, share: float) -> None:
        """In training, leave out so much of what each block adds to the stream."""
        for block in self.layers:
            assert isinstance(block, Block)
            block.dropout = share

    @property
    def recompute_blocks(self) -> bool:
        """Gradient checkpointing, in both parts."""
        return self.decoder.recompute_blocks

    @recompute_blocks.setter
    def recompute_blocks(self, wanted: bool) -> None:
        self.encoder.recompute_blocks = self.decoder.recompute_blocks = wanted

    def encode(self, source_BS: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """Source ids (B, S) -> memory (B, S, D). Padding has document -1; places count from 0 in each document."""
        position_BS = None
        if document_BS is not None:
            slot_S = torch.arange(source_BS.shape[1], device=source_BS.device)
            position_BS = slot_S - run_starts(document_BS)
        hidden: Tensor = self.encoder(source_BS, position_BS, document_BS)
        return hidden

    def forward(
        self,
        ids_BT: Tensor,
        source_BS: Tensor,
        document_BT: Tensor | None = None,
        source_document_BS: Tensor | None = None,
        position_BT: Tensor | None = None,
    ) -> Tensor:
        """Target ids (B, T) read beside source ids (B, S) -> the decoder's hidden states (B, T, D).

        A target document attends to the source of its own number in the row, and to nothing else of the row.
        """
        memory_BSD = self.encode(source_BS, source_document_BS)
        hidden: Tensor = self.decoder(
            ids_BT, position_BT, document_BT, memory_BSD=memory_BSD, memory_document_BS=source_document_BS
        )
        return hidden

    def head_weight(self) -> Tensor:
        """The matrix (V, D) that turns the decoder's hidden states into scores."""
        return self.decoder.head_weight()

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Scores of every token of the target's vocabulary (…, V)."""
        return self.decoder.logits(hidden_BTD)

    def sites(self) -> list[Site]:
        """The linear layers of both parts: `encoder.…`, then `decoder.…`; a site's block counts through both."""
        first = len(self.encoder.layers)
        return [replace(site, name=f"encoder.{site.name}") for site in self.encoder.sites()] + [
            replace(site, name=f"decoder.{site.name}", layer=first + site.layer) for site in self.decoder.sites()
        ]


AnyModel = Transformer | EncoderDecoder
"""What the loop trains and the decoding reads."""


def new_encoder_decoder(
    settings: EncoderDecoderSettings,
    vocab_size: int,
    *,
    bos_id: int,
    eos_ids: tuple[int, ...],
    pad_id: int | None = None,
) -> EncoderDecoder:
    """A model of that shape for one vocabulary on both sides. `bos_id` begins each target, `eos_ids` end it.

    Its parameters are NaN until `init_weights` sets them.
    """
    encoder, decoder = settings.configs(vocab_size, bos_id=bos_id, eos_ids=eos_ids, pad_id=pad_id)
    model = EncoderDecoder(encoder, decoder, shared_embeddings=settings.shared_embeddings)
    model.set_dropout(settings.dropout)
    return model
