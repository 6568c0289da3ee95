"""Settings of the one loop; free of torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ratoon.base.settings import Settings

LENGTH = {"steps", "budget_minutes"}
FREE_ON_RESUME = LENGTH | {
    "compile", "evaluate_every_steps", "evaluate_tokens", "sample_every_steps", "log_every_steps",
    "checkpoint_every_steps", "checkpoint_every_minutes", "keep_checkpoints", "micro_batch_rows",
}  # fmt: skip
"""Settings that may change when a run is resumed: they decide how long and what is told, not what is computed."""


class TrainSettings(Settings):
    """How a model is trained. One step = one update of the weights, on `rows` rows of `context_tokens` tokens."""

    steps: int | None = Field(None, ge=1, description="updates of the weights; or give `budget_minutes`")
    budget_minutes: float | None = Field(
        None,
        gt=0,
        description="wall-clock minutes for training, in place of `steps`: the learning rate follows the clock; "
        "evaluating and saving on the way counts, the first step, which compiles, does not",
    )
    rows: int = Field(32, ge=1, description="rows a step, over all micro-batches and processes")
    context_tokens: int = Field(256, ge=2, description="tokens a row")
    micro_batch_rows: int | None = Field(None, ge=1, description="rows at once; absent: as many as fit the memory")
    seed: int = Field(1, ge=0, description="the one seed; every use of chance has its own stream under it")

    optimizer: Literal["adamw", "muon"] = Field(
        "muon", description="muon: hidden matrices by Muon, everything else by AdamW; adamw: all by AdamW"
    )
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of AdamW")
    matrix_learning_rate: float = Field(0.02, gt=0, description="peak learning rate of Muon; read with optimizer: muon")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices and embeddings")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW: decay of the mean")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW: decay of the mean square")
    epsilon: float = Field(1e-8, gt=0, description="AdamW: added to the root of the mean square")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="AdamW's mean and mean square; bfloat16: half their memory, rounded by chance, not down"
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's momentum; read with optimizer: muon")
    clip_norm: float | None = Field(1.0, gt=0, description="gradient norm above which it is scaled down; absent: never")

    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "wsd", description="after the warm-up: cosine to `final_fraction`; wsd: level, then linear decay; constant"
    )
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.6, gt=0, le=1, description="wsd: last share of the steps that decays")
    final_fraction: float = Field(0.0, ge=0, le=1, description="learning rate at the end, as a share of the peak")

    precision: Literal["auto", "bf16", "float32", "autocast-bf16", "autocast-fp16"] = Field(
        "auto",
        description="bf16: bfloat16 weights and activations with float32 master weights; autocast-…: float32 weights, "
        "lower precision inside; auto: bf16 where the processor multiplies it fast, else float32",
    )
    frozen_products: Literal["exact", "int8"] = Field(
        "exact",
        description="products with frozen matrices of the blocks, forward and backward. int8: rows of both factors "
        "rounded to 8 bits, up to twice as fast on a processor; what is learned, and the finished model, are not",
    )
    compile: Literal["auto", "model", "blocks", "off"] = Field(
        "auto", description="torch.compile of the whole model or of its blocks; auto: where a compiler is, by size"
    )
    recompute_blocks: bool = Field(False, description="gradient checkpointing: less memory, a third more arithmetic")

    evaluate_every_steps: int | None = Field(None, ge=1, description="held-out evaluation; absent: ten times a run")
    evaluate_tokens: int = Field(65_536, ge=1, description="held-out tokens an evaluation reads at most")
    sample_every_steps: int | None = Field(None, ge=1, description="samples are written; absent: at start and end")
    log_every_steps: int = Field(10, ge=1, description="a line of metrics")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="absent: every `checkpoint_every_minutes`")
    checkpoint_every_minutes: float = Field(5.0, gt=0, description="wall-clock minutes between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, description="latest checkpoints kept, besides the best")

    @model_validator(mode="after")
    def _fits(self) -> TrainSettings:
        if self.steps is None and self.budget_minutes is None:
            raise ValueError("give 'steps' or 'budget_minutes'")
        if self.steps is not None and self.budget_minutes is not None:
            raise ValueError("'steps' and 'budget_minutes' are both given: one of them decides when the run ends")
        if self.micro_batch_rows is not None and self.micro_batch_rows > self.rows:
            raise ValueError(f"micro_batch_rows {self.micro_batch_rows} is more than the {self.rows} rows of a step")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} leaves nothing of {self.steps} steps")
        return self

    @property
    def moment_bytes(self) -> int:
        """Of each of AdamW's two moments, for a parameter."""
        return 2 if self.moments == "bfloat16" else 4

    def without_effect(self) -> list[str]:
        """A sentence for each setting that was changed and that nothing reads beside the others."""
        unread: dict[str, tuple[bool, str]] = {
            "matrix_learning_rate": (self.optimizer != "muon", f"optimizer: {self.optimizer}"),
            "momentum": (self.optimizer != "muon", f"optimizer: {self.optimizer}"),
            "decay_fraction": (self.schedule != "wsd", f"schedule: {self.schedule}"),
            "final_fraction": (self.schedule == "constant", "schedule: constant"),
            "checkpoint_every_minutes": (self.checkpoint_every_steps is not None, "checkpoint_every_steps"),
        }
        return [
            f"train.{key} has no effect with {other}"
            for key, (idle, other) in unread.items()
            if idle and getattr(self, key) != type(self).model_fields[key].default
        ]


class NoiseSettings(Settings):
    """What makes training harder, so that the model stands more afterwards."""

    neftune_alpha: float | None = Field(
        None, gt=0, description="uniform noise on the embeddings of a text, at most alpha / √(tokens · width)"
    )
    adversarial_epsilon: float | None = Field(
        None, gt=0, description="each micro-batch is learned again with embeddings moved so far against it"
    )
    perturbed_copies: int = Field(0, ge=0, description="so many perturbed copies of each training record beside it")
    perturb: tuple[str, ...] = Field(
        ("typos", "swaps", "drops"), description="how copies are perturbed, in turn; read with perturbed_copies"
    )
    strength: float = Field(0.1, gt=0, le=1, description="share of the places touched; read with perturbed_copies")

    @property
    def on_embeddings(self) -> bool:
        """Whether anything happens to the embeddings."""
        return self.neftune_alpha is not None or self.adversarial_epsilon is not None
