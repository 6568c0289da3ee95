"""`ratoon plan`: what a recipe will cost on this machine, before it runs.

Decides what is counted, what is measured, and how sure each figure is. The counting is `model/count.py`'s; the
measured steps are those of the one loop, with the recipe's own settings, on random tokens.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.data.batch import Batch
    from ratoon.model.config import ModelConfig
    from ratoon.recipe import Plan, Recipe
    from ratoon.train.settings import TrainSettings

READ_BYTES = 64 << 20
"""Text that is read to be counted; more of it is left to `ratoon prepare`."""
SAMPLE_BYTES = 1 << 20
"""Text that says how many bytes a token has."""
FEWEST_STEPS = 3
FORWARD_SHARE = 1 / 3
"""Of a step's arithmetic; an evaluation is a forward pass."""


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]…")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=8.0,
    show_default=True,
    help="How long steps are measured, after the first one; 0: nothing is measured.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def command(recipe: str, overrides: tuple[str, ...], seconds: float, as_json: bool) -> None:
    """Say what RECIPE will cost: parameters, tokens, FLOPs, memory, disk and time. Nothing is written.

    KEY=VALUE changes single settings, as with `ratoon pretrain`. The time comes from a few real steps of the real
    model on random tokens, with the recipe's settings; compiling for the first one can take a minute.
    """
    from ratoon.base.settings import parse_overrides
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.recipe import load, settle

    plan = settle(load(recipe, parse_overrides(list(overrides))))
    found = facts(plan, seconds, talk)
    if as_json:
        answer_json(found)
    else:
        answer("\n".join(_page(found)))


def facts(plan: Plan, seconds: float, talk: Any) -> dict[str, Any]:
    """The plan as plain fields; what could not be known is null, with the reason beside it."""
    from ratoon.model.count import flops_per_token, hidden_matrices, multiplied_parameters, parameters
    from ratoon.train.device import find_place

    settings = plan.train
    cfg, vocabulary = _config(plan)
    place = find_place(settings)
    count = parameters(cfg)
    by_muon = hidden_matrices(cfg) if settings.optimizer == "muon" else 0
    data = _data(plan.recipe)
    measured = _measure(cfg, plan, seconds, talk) if seconds else None
    tokens_a_step = settings.rows * settings.context_tokens
    each = flops_per_token(cfg, settings.context_tokens)
    time_ = _time(settings, measured)
    steps: list[int] | None = [settings.steps] * 2 if settings.steps is not None else time_["steps"]
    tokens = None if steps is None else [step * tokens_a_step for step in steps]
    train_tokens = data["train_tokens"]
    return {
        "recipe": plan.recipe.name,
        "derived": [{"key": one.key, "value": one.value, "reason": one.reason} for one in plan.derived],
        "model": {
            "parameters": count,
            "multiplied_parameters": multiplied_parameters(cfg),
            "family": cfg.family,
            "layers": cfg.layers,
            "width": cfg.width,
            "vocab_size": cfg.vocab_size,
            "vocabulary": vocabulary,
        },
        "data": data,
        "steps": steps,
        "tokens_per_step": tokens_a_step,
        "tokens": tokens,
        "tokens_per_parameter": None if tokens is None else [one / count for one in tokens],
        "passes": None if tokens is None or not train_tokens else [one / train_tokens for one in tokens],
        "flops_per_token": each,
        "flops": None if tokens is None else [one * each for one in tokens],
        "device": str(place.device),
        "precision": place.precision,
        "memory": _memory(cfg, settings, by_muon),
        "disk": _disk(cfg, settings, by_muon),
        "measured": None if measured is None else measured.as_dict(tokens_a_step, each),
        "time": time_,
    }


# -- the model ---------------------------------------------------------------------------------------------------------


def _config(plan: Plan) -> tuple[ModelConfig, str]:
    """The model's settings, and where the size of its vocabulary comes from."""
    recipe = plan.recipe
    if recipe.model.init is not None:
        from ratoon.generate.lm import locate

        path = locate(recipe.model.init)
        if path.is_dir():
            from ratoon.model.folder import read_config

            return read_config(path), f"that of {recipe.model.init}"
        from ratoon.model.gguf import read_gguf_config

        return read_gguf_config(path), f"that of {recipe.model.init}"
    from ratoon.cli.tokenizer import tokenizer_of

    name = recipe.data.prepared or recipe.data.tokenizer
    if name is not None:
        tokenizer = tokenizer_of(name)
        ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        return plan.model_config(tokenizer.vocab_size, *ids), f"that of the tokenizer in {name}"
    why = "data.vocab_size, at most: the tokenizer is trained first, and little text gives fewer"
    return plan.model_config(recipe.data.vocab_size, None, None, None), why


# -- the data ----------------------------------------------------------------------------------------------------------


def _data(recipe: Recipe) -> dict[str, Any]:
    """Bytes and tokens of the training part, counted where that is cheap, and how they were found."""
    from ratoon.cli.prepare import paths_of
    from ratoon.store.fetch import is_here

    data = recipe.data
    if data.prepared is not None:
        from ratoon.data.prepare import Prepared

        prepared = Prepared.open(data.prepared)
        return {
            "bytes": prepared.train.bytes_of_text,
            "train_tokens": prepared.train.n_tokens,
            "how": f"counted in {data.prepared}",
        }
    if data.corpus is not None and not is_here(data.corpus):
        from ratoon.base.catalog import entry

        return {
            "bytes": entry(data.corpus).bytes,
            "train_tokens": None,
            "how": f"the catalogue's size; {data.corpus} is not on this machine: `ratoon pull {data.corpus}`",
        }
    return _count(recipe, paths_of(data, lambda sentence: None))


def _count(recipe: Recipe, paths: list[Path]) -> dict[str, Any]:
    from ratoon.cli.prepare import reading_of
    from ratoon.data.ledger import Ledger
    from ratoon.data.sources import find_files, read

    data, ledger = recipe.data, Ledger()
    sample: list[str] = []
    size = sampled = 0
    for document in read(find_files(paths, ledger), reading_of(data), ledger):
        if len(document.text) < data.min_characters:
            continue
        size += document.bytes
        if sampled < SAMPLE_BYTES:
            part = document.text[: SAMPLE_BYTES - sampled]
            sample.append(part)
            sampled += len(part.encode())
        if size > READ_BYTES:
            return {
                "bytes": None,
                "train_tokens": None,
                "how": f"more than {READ_BYTES >> 20} MiB of text, which `ratoon prepare` counts",
            }
    bytes_a_token, how = _bytes_a_token(recipe, sample, sampled)
    share = 1 - data.held_out_fraction
    return {
        "bytes": size,
        "train_tokens": round(size * share / bytes_a_token) if size else 0,
        "how": f"about: all text read, duplicates and all, {data.held_out_fraction:.0%} held out; {how}",
    }


def _bytes_a_token(recipe: Recipe, sample: list[str], sampled: int) -> tuple[float, str]:
    """Bytes of a token in the sample, by the recipe's tokenizer or by one trained on the sample."""
    from ratoon.cli.tokenizer import tokenizer_of
    from ratoon.text.tokenizer import Tokenizer

    name = recipe.data.tokenizer or recipe.model.init
    if name is not None:
        tokenizer, which = tokenizer_of(name), f"the tokenizer of {name}"
    else:
        tokenizer = Tokenizer.train(iter(sample), vocab_size=recipe.data.vocab_size, split_han=recipe.data.split_han)
        which = "a tokenizer trained on that sample"
    tokens = sum(len(ids) + 1 for ids in tokenizer.encode_batch(sample))  # and the separator
    found = sampled / max(1, tokens)
    return found, f"{found:.2f} bytes a token in a sample of {sampled:,} bytes, by {which}"


# -- memory and disk ---------------------------------------------------------------------------------------------------


def _memory(cfg: ModelConfig, settings: TrainSettings, by_muon: int) -> dict[str, Any]:
    import torch

    from ratoon.model.attention import PLAIN_LIMIT_TOKENS
    from ratoon.model.count import bytes_needed, parameters
    from ratoon.train.device import find_place, fit_rows, free_bytes
    from ratoon.train.weights import can_split

    place = find_place(settings)
    rows = fit_rows(cfg, settings, place, settings.rows, parameters(cfg))
    half = (torch.bfloat16, torch.float16)
    split = not by_muon and can_split(place.work, place.device)
    need = bytes_needed(
        cfg,
        rows=rows,
        context_tokens=settings.context_tokens,
        weight_bytes=2 if place.work in half else 4,
        activation_bytes=2 if (place.autocast or place.work) in half else 4,
        by_muon=by_muon,
        recompute=settings.recompute_blocks,
        keeps_scores=place.device.type == "cpu" and settings.context_tokens <= PLAIN_LIMIT_TOKENS,
        split=split,
        summed=not split or rows < settings.rows,
        moment_bytes=settings.moment_bytes,
    )
    return {
        "micro_batch_rows": rows,
        "micro_batches": math.ceil(settings.rows / rows),
        "weights_bytes": need.weights,
        "masters_bytes": need.masters,
        "gradients_bytes": need.gradients,
        "optimizer_bytes": need.optimizer,
        "activations_bytes": need.activations,
        "total_bytes": need.total,
        "free_bytes": free_bytes(place.device),
    }


def _disk(cfg: ModelConfig, settings: TrainSettings, by_muon: int) -> dict[str, Any]:
    import shutil

    from ratoon.model.count import MASTER_BYTES, checkpoint_bytes, parameters

    each = checkpoint_bytes(cfg, by_muon=by_muon, moment_bytes=settings.moment_bytes)
    # Those kept, the best one besides, and the one that is being written.
    most = settings.keep_checkpoints + 2
    model = parameters(cfg) * MASTER_BYTES
    return {
        "checkpoint_bytes": each,
        "checkpoints_at_most": most,
        "model_bytes": model,
        "total_bytes": most * each + model,
        "free_bytes": shutil.disk_usage(".").free,
    }


# -- time --------------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Enough steps were measured."""


@dataclass
class _Measured:
    """Seconds of measured steps, the first (which compiles) apart."""

    first_seconds: float
    step_seconds: list[float] = field(default_factory=list)
    memory_bytes: int = 0

    def quantile(self, share: float) -> float:
        """Seconds of the step at that share of the ordered steps."""
        ordered = sorted(self.step_seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def as_dict(self, tokens_a_step: int, flops_a_token: float) -> dict[str, Any]:
        """As plain fields."""
        middle = self.quantile(0.5)
        return {
            "steps": len(self.step_seconds),
            "first_step_seconds": self.first_seconds,
            "step_seconds": {"low": self.quantile(0.1), "median": middle, "high": self.quantile(0.9)},
            "tokens_per_second": tokens_a_step / middle,
            "flops_per_second": tokens_a_step * flops_a_token / middle,
            "process_memory_bytes": self.memory_bytes,
        }


class _RandomRows:
    """Rows of random tokens, until enough steps were measured."""

    def __init__(self, cfg: ModelConfig, settings: TrainSettings, seconds: float) -> None:
        self.cfg, self.settings, self.seconds = cfg, settings, seconds
        self.began: list[float] = []

    def batch(self, step: int) -> Batch:
        """The rows of a step; raises `_Enough` when the measurement is over."""
        import numpy as np

        from ratoon.base.seeds import stream
        from ratoon.data.batch import Batch

        now = time.perf_counter()
        if len(self.began) > FEWEST_STEPS and now - self.began[1] > self.seconds:
            raise _Enough
        shape = (self.settings.rows, self.settings.context_tokens + 1)
        ids = stream(self.settings.seed, "plan", step).integers(0, self.cfg.vocab_size, shape)
        place = np.broadcast_to(np.arange(shape[1] - 1), (shape[0], shape[1] - 1))
        batch = Batch(
            ids_BT=np.ascontiguousarray(ids[:, :-1]),
            targets_BT=np.ascontiguousarray(ids[:, 1:]),
            weight_BT=np.ones((shape[0], shape[1] - 1), np.float32),
            document_BT=np.zeros((shape[0], shape[1] - 1), np.int32),
            position_BT=np.ascontiguousarray(place),
            rows=tuple(f"random row {row}" for row in range(shape[0])),
        )
        self.began.append(time.perf_counter())
        return batch

    def state(self) -> dict[str, Any]:
        """Nothing is resumed."""
        return {}


def _measure(cfg: ModelConfig, plan: Plan, seconds: float, talk: Any) -> _Measured:
    """A few real steps of a model of that shape, with the recipe's settings and nothing written."""
    from ratoon.model.init import init_weights
    from ratoon.model.transformer import Transformer
    from ratoon.train.device import find_place, memory_bytes
    from ratoon.train.loop import Hooks, train

    talk(f"measuring steps for about {seconds:g} s on random tokens")
    model = Transformer(cfg)
    init_weights(model, plan.train.seed)
    # No end but the measurement's own.
    settings = plan.train.model_copy(update={"steps": 1_000_000_000, "budget_minutes": None, "warmup_steps": 0})
    rows = _RandomRows(cfg, settings, seconds)
    try:
        train(model, rows, settings, hooks=Hooks(talk=talk))
    except _Enough:
        pass
    ended = time.perf_counter()
    starts = [*rows.began, ended]
    lengths = [stop - start for start, stop in itertools.pairwise(starts)]
    return _Measured(lengths[0], lengths[1:], memory_bytes(find_place(settings).device))


def _time(settings: TrainSettings, measured: _Measured | None) -> dict[str, Any]:
    """Seconds from the slowest to the fastest expectation, or the steps that a budget of minutes holds."""
    budget = settings.budget_minutes
    if measured is None:
        return {
            "seconds": None if budget is None else [60 * budget] * 2,
            "steps": None,
            "how": "nothing was measured" if budget is None else "the budget; without a measurement no steps",
        }
    fast, slow = measured.quantile(0.1), measured.quantile(0.9)
    if budget is not None:
        steps = [max(1, int(60 * budget / one)) for one in (slow, fast)]
        return {
            "seconds": [60 * budget] * 2,
            "steps": steps,
            "how": "the budget; the steps that fit it at the pace of the slowest and the fastest tenth measured, "
            "evaluations not taken off",
        }
    assert settings.steps is not None
    evaluations = _evaluations(settings)
    a_token = measured.quantile(0.5) / (settings.rows * settings.context_tokens)
    evaluating = evaluations * settings.evaluate_tokens * a_token * FORWARD_SHARE
    # An evaluation reads at most so many tokens, and may be a little slower or quicker than a third of a step.
    return {
        "seconds": [settings.steps * fast, settings.steps * slow + evaluating + measured.first_seconds],
        "steps": None,
        "how": f"{settings.steps:,} steps at the pace of the fastest tenth measured, up to that of the slowest with "
        f"the first step's {measured.first_seconds:.1f} s and {evaluations} evaluations; preparing the data, samples "
        "and writing are not in it",
    }


def _evaluations(settings: TrainSettings) -> int:
    from ratoon.train.loop import EVALUATIONS_A_RUN

    assert settings.steps is not None
    if settings.evaluate_every_steps is None:
        return min(EVALUATIONS_A_RUN, settings.steps) + 1
    return settings.steps // settings.evaluate_every_steps + 1


# -- for people --------------------------------------------------------------------------------------------------------


def _page(found: dict[str, Any]) -> list[str]:
    from ratoon.cli.output import aligned, size_words

    model, data, memory, disk = found["model"], found["data"], found["memory"], found["disk"]
    measured, clock = found["measured"], found["time"]
    unknown = "not known without a measurement"
    read = "not counted" if data["bytes"] is None else f"{data['bytes']:,} bytes"
    if data["train_tokens"] is not None:
        read += f", {data['train_tokens']:,} tokens to train on"
    parts = ", ".join(
        f"{name} {size_words(memory[name + '_bytes'])}"
        for name in ("weights", "masters", "gradients", "optimizer", "activations")
        if memory[name + "_bytes"]
    )
    rows: list[tuple[str, ...]] = [
        ("model", f"{model['parameters']:,} parameters, {model['layers']} layers, {model['width']} wide, "
                  f"family {model['family']}"),
        ("vocabulary", f"{model['vocab_size']:,} tokens ({model['vocabulary']})"),
        ("data", f"{read} ({data['how']})"),
        ("steps", _range(found["steps"], "{:,}", f"{unknown};") + f" of {found['tokens_per_step']:,} tokens"),
        ("tokens", _range(found["tokens"], "{:,}", unknown)
         + ("" if found["tokens"] is None else f", {_range(found['tokens_per_parameter'], '{:.1f}', '')} a parameter")),
        ("passes", _range(found["passes"], "{:.2f} over the data", "not known")),
        ("arithmetic", f"{found['flops_per_token'] / 1e6:,.1f} MFLOPs a token, in all "
                       + _range(found["flops"], "{:.3g} FLOPs", unknown)),
        ("place", f"{found['device']}, {found['precision']}"),
        ("micro-batch", f"{memory['micro_batch_rows']} rows, {memory['micro_batches']} a step"),
        ("memory", f"about {size_words(memory['total_bytes'])} of {size_words(memory['free_bytes'])} free ({parts})"),
        ("disk", f"up to {size_words(disk['total_bytes'])} of {size_words(disk['free_bytes'])} free "
                 f"({disk['checkpoints_at_most']} checkpoints of {size_words(disk['checkpoint_bytes'])}, the model "
                 f"{size_words(disk['model_bytes'])}; the prepared data besides)"),
    ]  # fmt: skip
    if measured is not None:
        rows.append(
            (
                "measured",
                f"{measured['steps']} steps, {measured['tokens_per_second']:,.0f} tokens/s, "
                f"{measured['flops_per_second'] / 1e9:,.0f} GFLOP/s, the first step "
                f"{measured['first_step_seconds']:.1f} s, {size_words(measured['process_memory_bytes'])} in use by "
                "the process",
            )
        )
    seconds = None if clock["seconds"] is None else [_duration(one) for one in clock["seconds"]]
    rows.append(("time", _range(seconds, "{}", unknown) + f" ({clock['how']})"))
    derived = [f"derived {one['key']} = {one['value']} ({one['reason']})" for one in found["derived"]]
    return [*aligned(rows), *derived]


def _range(pair: list[Any] | None, form: str, otherwise: str) -> str:
    if pair is None:
        return otherwise
    low, high = (form.format(one) for one in pair)
    return low if low == high else f"{low} to {high}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
