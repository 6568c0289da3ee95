"""AdamW's moments in bfloat16: rounded by chance, so that on average nothing is lost; the same chance everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import little
from ratoon.recipe.tuning import load_tuning, settle_tuning
from ratoon.train import update

no_compiler = not update.usable(torch.empty(0))


def rounded(value: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """The same numbers as both moments."""
    low = tuple(torch.empty(len(value), dtype=torch.bfloat16) for _ in range(2))
    update.narrow_moments(value, value, *low, step=step)
    return low[0], low[1]


@pytest.mark.skipif(no_compiler, reason="needs a C compiler for the update")
@pytest.mark.parametrize("step", [1, 2, 77, 1_000_003, 2**31 + 5])
def test_the_c_code_and_torch_round_alike(step: int) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (200_000,), generator=torch.Generator().manual_seed(step % 1000))
    edges = torch.tensor([0, -(2**31), 1, 0x7F800000, 0x7F800000 - 2**31, 0x7F7FFFFF, 0x7FFFFFFF, 0x7FC00000])
    value = torch.cat([bits, edges]).to(torch.int32).view(torch.float32)
    ours = rounded(value, step)
    theirs = tuple(torch.empty(len(value), dtype=torch.bfloat16) for _ in range(2))
    update.narrow_moments_by_torch(value, value, *theirs, step=step)
    for one, other in zip(ours, theirs, strict=True):
        number = ~value.isnan()
        assert one[~number].isnan().all() and other[~number].isnan().all()
        assert torch.equal(one[number].view(torch.int16), other[number].view(torch.int16))
    assert not torch.equal(ours[0].view(torch.int16), ours[1].view(torch.int16))  # each has a chance of its own


def test_on_average_nothing_is_lost() -> None:
    """A number a fifth of the way between two neighbours goes up one time in five, at any place and step."""
    low, high = 1.0, 1.0 + 2**-7
    value = torch.full((4096,), low + 0.2 * (high - low))
    for moment in range(2):
        seen = torch.stack([rounded(value, step)[moment].float() for step in range(1, 101)])
        assert set(seen.unique().tolist()) == {low, high}
        up = (seen == high).double()
        assert float(up.mean()) == pytest.approx(0.2, abs=0.004)
        assert float(up.mean(0).std()) == pytest.approx(0.04, abs=0.005)  # √(0.2 · 0.8 / 100): places and
        assert float(up.mean(1).std()) == pytest.approx(0.00625, abs=0.002)  # steps do not hang together
    exact = torch.tensor([0.0, 1.5, -3.0])
    assert torch.equal(rounded(exact, 9)[0].float(), exact)


def test_small_changes_add_up() -> None:
    """A thousandth less at each step, as a decay of 0.999 has it: rounding to the nearest would never move."""
    by_chance, square = torch.ones(4096).bfloat16(), torch.ones(4096).bfloat16()
    nearest = torch.ones(4096).bfloat16()
    for step in range(1, 1001):
        update.narrow_moments(by_chance.float() * 0.999, square.float() * 0.999, by_chance, square, step=step)
        nearest = (nearest.float() * 0.999).bfloat16()
    assert float(nearest.float().mean()) == 1.0
    for moment in (by_chance, square):
        assert float(moment.float().mean()) == pytest.approx(0.999**1000, rel=0.01)


def trained(**changes: Any) -> little.Outcome:
    return little.go(little.model(width=64, mlp_width=128), steps=40, optimizer="adamw", learning_rate=0.005, **changes)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_learns_as_with_float32(precision: str) -> None:
    """And the weights differ by no more than the rounding explains: a step's direction by about 1/256."""
    low, whole = trained(precision=precision, moments="bfloat16"), trained(precision=precision)
    assert low.losses() != whole.losses()
    first, (ours, theirs) = low.losses()[0], (sum(one.losses()[-10:]) / 10 for one in (low, whole))
    assert ours < 0.7 * first
    assert ours == pytest.approx(theirs, rel=0.03)
    for name, value in low.weights.items():
        moved = float((whole.weights[name].float() - little.model(width=64, mlp_width=128).state_dict()[name]).norm())
        assert float((value.float() - whole.weights[name].float()).norm()) < 0.2 * moved, name


@pytest.mark.skipif(no_compiler, reason="needs a C compiler for the update")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_step_is_the_same_by_torch(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its arithmetic differs in the last place, which turns a few roundings over."""
    changes: dict[str, Any] = {"precision": precision, "moments": "bfloat16"}
    ours = little.go(steps=4, optimizer="adamw", **changes)
    monkeypatch.setattr(update, "_code", lambda: None)
    theirs = little.go(steps=4, optimizer="adamw", **changes)
    for name, value in ours.weights.items():
        torch.testing.assert_close(value.float(), theirs.weights[name].float(), rtol=2e-3, atol=2e-3, msg=name)


def test_who_has_them() -> None:
    """Fine-tuning all parameters; not a method of few, and not what the user said."""

    def moments(**changes: Any) -> str:
        recipe = load_tuning("sentiment-en", {key.replace("__", "."): value for key, value in changes.items()})
        return settle_tuning(recipe).train_settings(rows_an_epoch=100, examples=1000)[0].moments

    assert moments() == "float32"
    assert moments(method__kind="full") == "bfloat16"
    assert moments(method__kind="full", train__moments="float32") == "float32"
