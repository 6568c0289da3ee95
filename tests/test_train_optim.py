"""The update: AdamW is torch's, Muon is its definition, the masters keep what bfloat16 would lose, the learning rate
follows its formula, decay falls where it should."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import little
from ratoon.data.batch import Batch
from ratoon.model.transformer import Transformer
from ratoon.train.loss import Inputs
from ratoon.train.optim import group_parameters, orthogonalize
from ratoon.train.schedule import share

STEPS = 12
Gradients = Callable[[int, str], Tensor]


def random_gradients(made: Transformer) -> Gradients:
    """For each step and parameter a gradient; sizes differ from parameter to parameter and from step to step."""
    shapes = {name: p.shape for name, p in made.named_parameters()}

    def gradient(step: int, name: str) -> Tensor:
        number = list(shapes).index(name)
        generator = torch.Generator().manual_seed(1000 * step + number)
        return torch.randn(shapes[name], generator=generator) * 10.0 ** (number % 5 - 2) * (1 + step % 3)

    return gradient


def pulled(gradient: Gradients) -> Callable[[Transformer, Inputs], tuple[Tensor, Tensor]]:
    """An objective whose gradient is the given one, exactly: Σ p·g, of weight 1."""

    def objective(model: Transformer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        step = int(inputs.rows[0].split(":")[1].split("/")[0])
        loss = torch.stack([(p * gradient(step, name)).sum() for name, p in model.named_parameters()]).sum()
        return loss, torch.ones(())

    return objective


def courses(gradient: Gradients, made: Transformer, **changes: Any) -> list[dict[str, Tensor]]:
    """The weights after each step of a run whose gradients are given."""
    seen: list[dict[str, Tensor]] = []

    def evaluate(step: int, model: Transformer) -> dict[str, Any]:
        seen.append({name: p.detach().float().clone() for name, p in model.named_parameters()})
        return {}

    little.go(
        made,
        objective=pulled(gradient),
        evaluate=evaluate,
        **{"steps": STEPS, "evaluate_every_steps": 1, "clip_norm": None, "micro_batch_rows": little.ROWS, **changes},
    )
    return seen[1:]


def is_decayed(name: str) -> bool:
    """Matrices and embeddings; gains and biases are vectors."""
    return not ("norm" in name or name.endswith("bias"))


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"positions": "learned", "norm": "layer", "mlp": "gelu", "qkv_bias": True, "mlp_bias": True},
    "experts, own head": {"moe": little.EXPERTS, "tied_embeddings": False, "head_bias": True},
    "qk norms": {"qk_norm": "before_rope"},
}


@pytest.mark.parametrize("case", SHAPES)
def test_adamw_is_torch_adamw_step_by_step(case: str) -> None:
    gradient = random_gradients(little.model(**SHAPES[case]))
    numbers = {"learning_rate": 0.02, "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.97, "epsilon": 1e-6}
    found = courses(
        gradient, little.model(**SHAPES[case]), optimizer="adamw", schedule="cosine", warmup_steps=3, **numbers
    )
    made = little.model(**SHAPES[case])
    named = dict(made.named_parameters())
    reference = torch.optim.AdamW(
        [
            {"params": [p for name, p in named.items() if is_decayed(name)], "weight_decay": 0.3},
            {"params": [p for name, p in named.items() if not is_decayed(name)], "weight_decay": 0.0},
        ],
        betas=(0.8, 0.97),
        eps=1e-6,
        foreach=False,
    )
    assert len(found) == STEPS
    for step, weights in enumerate(found):
        rate = 0.02 * min(1.0, (step + 1) / 4) * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        for group in reference.param_groups:
            group["lr"] = rate
        for name, p in named.items():
            p.grad = gradient(step, name)
        reference.step()
        for name, p in named.items():
            torch.testing.assert_close(weights[name], p.detach(), rtol=1e-5, atol=1e-6, msg=f"{name}, step {step}")


def newton_schulz(matrix: Tensor) -> Tensor:
    """Muon's orthogonalization by its definition: an odd polynomial of the singular values, five times, in float64."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(24, 24), (16, 40), (40, 16), (1, 7), (7, 1)])
def test_orthogonalize_is_its_definition(shape: tuple[int, int]) -> None:
    stack = (
        torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    )
    found = orthogonalize(stack)
    for one, matrix in zip(found, stack, strict=True):
        torch.testing.assert_close(one.double(), newton_schulz(matrix), rtol=0, atol=3e-4)


def test_singular_values_end_near_one() -> None:
    """The promise of the docstring, for matrices whose singular values lie up to a factor 100 apart."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((32, 32), (16, 48), (48, 16)):
        u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
        spread = torch.logspace(0, -2, min(shape))
        for dtype, low, high in ((torch.float32, 0.6, 1.25), (torch.bfloat16, 0.55, 1.3)):
            values = torch.linalg.svdvals(orthogonalize((u @ torch.diag(spread) @ v).to(dtype)).float())
            assert low < float(values.min()) and float(values.max()) < high, (shape, dtype, values)


def test_the_zero_matrix_stays_zero() -> None:
    assert not orthogonalize(torch.zeros(2, 5, 6)).any()


def is_matrix(name: str) -> bool:
    """What Muon moves: hidden matrices; not tables, head or router."""
    return is_decayed(name) and not any(word in name for word in ("embed", "place", "head", "router"))


@pytest.mark.parametrize("case", SHAPES)
def test_muon_is_its_definition_step_by_step(case: str) -> None:
    """Nesterov momentum, orthogonalized, times √(rows/columns) of tall matrices; everything else by AdamW."""
    gradient = random_gradients(little.model(**SHAPES[case]))
    numbers = {"matrix_learning_rate": 0.05, "weight_decay": 0.3, "momentum": 0.8, "learning_rate": 0.01}
    found = courses(gradient, little.model(**SHAPES[case]), optimizer="muon", schedule="constant", **numbers)
    rest = courses(gradient, little.model(**SHAPES[case]), optimizer="adamw", schedule="constant", **numbers)
    weights = {n: p.detach().double() for n, p in little.model(**SHAPES[case]).named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in weights.items()}
    moved = [name for name in weights if is_matrix(name)]
    assert 0 < len(moved) < len(weights)
    for step in range(STEPS):
        for name in moved:
            g = gradient(step, name).double()
            momentum[name] = 0.8 * momentum[name] + 0.2 * g
            direction = 0.2 * g + 0.8 * momentum[name]
            rows, columns = direction.shape[-2:]
            stack = direction.view(-1, rows, columns)
            update = torch.stack([newton_schulz(one) for one in stack]).view_as(g) * max(1.0, rows / columns) ** 0.5
            weights[name] = weights[name] * (1 - 0.05 * 0.3) - 0.05 * update
            torch.testing.assert_close(
                found[step][name].double(), weights[name], rtol=0, atol=5e-4, msg=f"{name}, step {step}"
            )
        for name in weights.keys() - set(moved):
            assert torch.equal(found[step][name], rest[step][name]), f"{name}, step {step}"


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", SHAPES)
def test_which_parameters_go_where(case: str, optimizer: str) -> None:
    made = little.model(**SHAPES[case])
    next(iter(made.layers)).attention_norm.weight.requires_grad_(False)
    groups = group_parameters(made, little.settings(optimizer=optimizer))
    place = {name: group for group, members in groups.items() for name, _ in members}
    wanted = {
        name: ("matrix" if optimizer == "muon" and is_matrix(name) else "decayed" if is_decayed(name) else "plain")
        for name, p in made.named_parameters()
        if p.requires_grad
    }
    assert place == wanted
    assert sum(len(members) for members in groups.values()) == len(wanted)  # none twice


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("case", SHAPES)
def test_decay_falls_on_matrices_and_tables_only(case: str, optimizer: str) -> None:
    """With a gradient of zero nothing but the decay moves anything."""
    before = little.model(**SHAPES[case])
    after = courses(
        lambda step, name: torch.zeros(dict(before.named_parameters())[name].shape),
        little.model(**SHAPES[case]),
        optimizer=optimizer,
        schedule="constant",
        steps=1,
        learning_rate=0.1,
        matrix_learning_rate=0.2,
        weight_decay=0.5,
    )[0]
    for name, p in before.named_parameters():
        rate = 0.2 if optimizer == "muon" and is_matrix(name) else 0.1
        kept = 1 - rate * 0.5 if is_decayed(name) else 1.0
        torch.testing.assert_close(after[name], p.detach() * kept, rtol=1e-6, atol=0, msg=name)


# -- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_masters_keep_what_bfloat16_would_round_away(optimizer: str) -> None:
    """Updates far below a weight's own rounding step: alone hardly one of them shows in bfloat16, together they do."""
    shapes = {name: p.shape for name, p in little.model().named_parameters()}

    def gradient(step: int, name: str) -> Tensor:
        return torch.ones(shapes[name])

    tiny = {"learning_rate": 2e-6, "matrix_learning_rate": 2e-6, "weight_decay": 0.0, "schedule": "constant"}

    def run(precision: str) -> dict[str, Tensor]:
        made = little.model()
        little.go(
            made, objective=pulled(gradient), optimizer=optimizer, precision=precision, steps=60, clip_norm=None, **tiny
        )
        return {name: p.detach().clone() for name, p in made.named_parameters()}

    start = {name: p.detach() for name, p in little.model().named_parameters()}
    exact, low = run("float32"), run("bf16")
    for name, value in exact.items():
        moved = float((value - start[name]).norm())
        assert moved > 0
        assert low[name].dtype == torch.float32
        assert float((low[name] - value).norm()) < 0.1 * moved, name  # Muon multiplies in bfloat16
        large = start[name].abs() > 0.01
        one = start[name] + (value - start[name]) / 60
        assert (one.bfloat16() != start[name].bfloat16())[large].sum() <= 0.05 * large.sum()


def test_what_bf16_computes_with_is_the_rounded_master() -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluate(step: int, model: Transformer) -> dict[str, Any]:
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return {}

    outcome = little.go(precision="bf16", steps=4, evaluate=evaluate, evaluate_every_steps=1)
    assert all(value.dtype == torch.bfloat16 for weights in seen for value in weights.values())
    last = {name: value.bfloat16() for name, value in outcome.weights.items()}
    for name, value in last.items():  # a half is rounded away from 0 here, to the even neighbour by torch
        half = (outcome.weights[name].view(torch.int32) & 0xFFFF) == 0x8000
        assert half.float().mean() < 0.05
        assert torch.equal(seen[-1][name][~half], value[~half])
    assert any(not torch.equal(outcome.weights[name], value.float()) for name, value in last.items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bf16_follows_the_float32_run(optimizer: str) -> None:
    exact = little.go(steps=30, optimizer=optimizer, precision="float32", learning_rate=3e-3)
    low = little.go(steps=30, optimizer=optimizer, precision="bf16", learning_rate=3e-3)
    assert exact.losses()[-1] < 0.7 * exact.losses()[0]
    for one, other in zip(exact.losses(), low.losses(), strict=True):
        assert one == pytest.approx(other, rel=0.05)


# -- the learning rate, and clipping -------------------------------------------------------------------------------


def test_schedules_are_their_formulas() -> None:
    steps, warmup, floor, decay = 200, 20, 0.1, 0.25
    for step in range(steps):
        progress = step / steps
        warm = min(1.0, (step + 1) / (warmup + 1))
        wanted = {
            "cosine": warm * (0.1 + 0.45 * (1 + math.cos(math.pi * progress))),
            "wsd": warm * (1.0 if progress <= 0.75 else 0.1 + 0.9 * (1 - progress) / 0.25),
            "constant": warm,
        }
        for name, value in wanted.items():
            settings = little.settings(
                steps=steps, schedule=name, warmup_steps=warmup, final_fraction=floor, decay_fraction=decay
            )
            assert share(step, progress, settings) == pytest.approx(value, rel=1e-12), (name, step)


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_loop_follows_the_schedule_and_records_it(schedule: str) -> None:
    settings = {"steps": 10, "schedule": schedule, "warmup_steps": 3, "final_fraction": 0.2, "learning_rate": 0.004}
    outcome = little.go(**settings)
    made = little.settings(**settings)
    rates = [record["learning_rate"] for record in outcome.records if record["kind"] == "train"]
    assert rates == pytest.approx([0.004 * share(step, step / 10, made) for step in range(10)])
    assert rates[0] == pytest.approx(0.001) and rates[3] >= rates[2] > rates[1]


def test_the_share_never_leaves_its_bounds() -> None:
    """A budget in minutes may be overrun by a step: progress beyond 1 ends at the floor."""
    for schedule in ("cosine", "wsd", "constant"):
        settings = little.settings(steps=100, schedule=schedule, final_fraction=0.3, warmup_steps=5)
        for step, progress in ((0, 0.0), (5, 0.05), (50, 0.5), (99, 1.0), (100, 1.2)):
            found = share(step, progress, settings)
            assert 0 < found <= 1
            if progress >= 1 and schedule != "constant":
                assert found == pytest.approx(0.3)


def test_with_a_budget_the_rate_follows_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step takes a minute of a clock of our own; the run ends when the budget is spent, which begins behind the
    first step."""
    from ratoon.train import loop

    clock = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])

    class Slow(little.Rows):
        def batch(self, step: int) -> Batch:
            clock[0] += 60.0
            return super().batch(step)

    outcome = little.go(loader=Slow(), budget_minutes=8.0, schedule="cosine", learning_rate=1.0)
    assert outcome.result is not None and outcome.result.steps == 9
    rates = [record["learning_rate"] for record in outcome.records if record["kind"] == "train"]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * minute / 8)) for minute in (0, *range(8))])


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_clipping_is_torch_clipping(clip: float | None) -> None:
    """One step of AdamW with an epsilon so large that the step is the gradient, scaled."""
    gradient = random_gradients(little.model())
    numbers = {"learning_rate": 1e6, "epsilon": 1e6, "weight_decay": 0.0, "optimizer": "adamw", "schedule": "constant"}
    found = courses(gradient, little.model(), steps=1, clip_norm=clip, **numbers)[0]
    made = little.model()
    for name, p in made.named_parameters():
        p.grad = gradient(0, name)
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(made.parameters(), clip)
    for name, p in made.named_parameters():
        assert p.grad is not None
        step = 1e6 * p.grad / (p.grad.abs() + 1e6)
        torch.testing.assert_close(p.detach() - found[name], step, rtol=1e-3, atol=1e-6, msg=name)
