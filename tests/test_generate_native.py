"""The C step stands for the model's own forward pass: equal for every family it expresses, absent for the rest."""

from __future__ import annotations

import pytest
import torch

from ratoon.base.errors import ConfigError
from ratoon.generate import native
from ratoon.generate.decode import generate
from ratoon.generate.sample import Sampling
from ratoon.model.cache import Cache
from ratoon.model.transformer import Transformer
from test_generate import PROMPTS, SHAPES, build

DENSE = [family for family in SHAPES if "moe" not in family]


@pytest.fixture(autouse=True)
def _compiled() -> None:
    try:
        native.kernel()
    except native.Unavailable as error:
        pytest.skip(f"no C step on this machine: {error}")


@torch.no_grad()
def both(model: Transformer, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores after each of `tokens` tokens: of one forward pass, and of the C step token by token (rows, tokens, V)."""
    ids_BT = torch.randint(0, model.cfg.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(1))
    dtype = model.head_weight().dtype
    step = native.NativeStep(model, Cache(model.cfg, rows, tokens, dtype=dtype))
    found = [step(ids_BT[:, t].tolist(), [t] * rows, [0] * rows) for t in range(tokens)]
    return model.logits(model(ids_BT)).float(), torch.stack(found, dim=1)


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("family", DENSE)
def test_the_c_step_equals_the_forward_pass(family: str, rows: int) -> None:
    wanted, found = both(build(family), rows, 24)
    assert (wanted - found).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_sizes_that_fill_no_vector_and_any_number_of_threads(threads: int) -> None:
    model = build("gemma3", width=36, heads=3, kv_heads=1, head_dim=22, mlp_width=131, vocab_size=103)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        wanted, found = both(model, 2, 12)
    finally:
        torch.set_num_threads(before)
    assert (wanted - found).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("family", DENSE)
def test_bfloat16_differs_from_the_forward_pass_by_its_rounding_only(family: str) -> None:
    model = build(family)
    model.to(torch.bfloat16)
    exact = build(family)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    ours, found = both(model, 2, 16)
    wanted, _ = both(exact, 2, 16)
    # Activations stay float in C: nearer to the exact model than torch's own bfloat16.
    assert (found - wanted).abs().mean() < (ours - wanted).abs().mean()
    assert (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("family", DENSE)
def test_answers_equal_those_without_it(family: str) -> None:
    model = build(family)
    for prompts in ([PROMPTS[2]], PROMPTS):
        settings = Sampling(max_new_tokens=30)
        wanted = generate(model, prompts, settings, kernel="torch", logprobs=True)
        found = generate(model, prompts, settings, kernel="native", logprobs=True)
        for a, b in zip(wanted, found, strict=True):
            assert a.ids == b.ids
            assert a.logprobs == pytest.approx(b.logprobs, abs=2e-4)


def test_rows_that_leave_the_batch() -> None:
    """Rows end at different times, the cache's tensors change, and the C step follows them."""
    model = build()
    free = generate(model, PROMPTS, Sampling(max_new_tokens=30), kernel="torch")
    eos_ids = [free[0].ids[4], free[2].ids[9]]
    wanted = generate(model, PROMPTS, Sampling(max_new_tokens=30), eos_ids=eos_ids, kernel="torch")
    found = generate(model, PROMPTS, Sampling(max_new_tokens=30), eos_ids=eos_ids, kernel="native")
    assert [row.ids for row in found] == [row.ids for row in wanted]
    assert len({len(row.ids) for row in found}) > 1


def test_weights_are_read_in_place() -> None:
    """A weight changed between two calls changes the answer: only small vectors are copied, anew for each call."""
    model = build()
    before = generate(model, [[1, 2]], Sampling(max_new_tokens=8), kernel="native")[0].ids
    with torch.no_grad():
        model.layers[0].attention_norm.weight.mul_(-1)
        model.layers[1].mlp.up.weight.mul_(-2)
    after = generate(model, [[1, 2]], Sampling(max_new_tokens=8), kernel="native")[0].ids
    assert after != before
    assert after == generate(model, [[1, 2]], Sampling(max_new_tokens=8), kernel="torch")[0].ids


def test_what_it_cannot_express_keeps_its_own_forward_pass() -> None:
    assert native.why_not(build()) is None
    assert "mixtures" in str(native.why_not(build("qwen3_moe")))
    with pytest.raises(ConfigError, match="mixtures"):
        generate(build("qwen3_moe"), [[1]], Sampling(max_new_tokens=2), kernel="native")

    hooked = build()
    hooked.layers[1].mlp.up.register_forward_hook(lambda module, inputs, output: output * 0)
    assert "hook" in str(native.why_not(hooked))

    class Adapted(torch.nn.Linear):
        pass

    adapted = build()
    adapted.layers[0].attention.q = Adapted(32, 32)
    assert "Adapted" in str(native.why_not(adapted))

    half = build()
    half.to(torch.float16)
    assert "float16" in str(native.why_not(half))


def forget() -> None:
    native.kernel.cache_clear()
    native.library.cache_clear()


def test_a_missing_or_refusing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    forget()
    try:
        monkeypatch.setenv("RATOON_HOME", str(tmp_path))
        with monkeypatch.context() as without:
            without.setattr("shutil.which", lambda name: None)
            with pytest.raises(native.Unavailable, match="no C compiler"):
                native.kernel()
            found = generate(build(), [[1, 2]], Sampling(max_new_tokens=3))
            assert found[0].ids == generate(build(), [[1, 2]], Sampling(max_new_tokens=3), kernel="torch")[0].ids
        with monkeypatch.context() as refusing:
            refusing.setattr("shutil.which", lambda name: "/bin/false")
            with pytest.raises(native.Unavailable, match="refused"):
                native.kernel()
    finally:
        forget()
