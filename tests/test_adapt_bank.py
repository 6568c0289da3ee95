"""Several adapters on one base: each row of a batch computed as it is alone with its own adapter."""

from __future__ import annotations

import threading
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import little
from ratoon.adapt.bank import AdapterBank, these_rows
from ratoon.adapt.contract import Method, trained
from ratoon.adapt.folder import save_adapter
from ratoon.adapt.full import Full, FullSettings
from ratoon.adapt.methods import method_of
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.generate.decode import generate
from ratoon.generate.lm import LanguageModel
from ratoon.generate.sample import Sampling
from ratoon.model.config import HeadConfig
from ratoon.model.init import add_head
from ratoon.model.transformer import Transformer

Adapter = tuple[Method, dict[str, Tensor]]
METHODS: dict[str, dict[str, Any]] = {
    "houlsby": {"reduction": 4},
    "pfeiffer": {"reduction": 8, "layers": [1]},
    "prompt": {"tokens": 3},
    "prefix": {"tokens": 5},
    "lora": {"rank": 3, "targets": ["q", "v", "down"], "rank_stabilized": True, "dropout": 0.5},
    "dora": {"kind": "lora", "rank": 2, "decomposed": True},
    "adalora": {},
    "ia3": {},
}


def adapter(kind: str, seed: int) -> Adapter:
    """A method of that kind and random values of its parts, as a folder holds them."""
    model, method = little.model(), method_of({"kind": kind, **METHODS[kind]})
    method.install(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return method, {name: value.clone() for name, value in method.peft_weights(model).items()}


def alone(found: Adapter | None) -> Transformer:
    """The base with one adapter in it."""
    model = little.model().eval()
    if found is not None:
        method, weights = found
        method.install(model, seed=0)
        method.load_peft(model, weights)
    return model.eval()


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, little.VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def logits(model: Transformer, ids_BT: Tensor, *rest: Any) -> Tensor:
    return model.logits(model(ids_BT, *rest))


def slots(found: Adapter | None) -> int:
    return 0 if found is None else found[0].virtual_tokens


def filled(bank: AdapterBank, kinds: list[str]) -> dict[str | None, Adapter | None]:
    """Two adapters of each kind in the bank: `a.<kind>` and `b.<kind>`; None is the base."""
    found: dict[str | None, Adapter | None] = {None: None}
    for kind in kinds:
        for seed, letter in enumerate("ab"):
            found[f"{letter}.{kind}"] = adapter(kind, seed)
    for name, one in found.items():
        if name is not None and one is not None:
            bank.add(name, type(one[0])(one[0].settings), one[1])
    return found


def check_rows(bank: AdapterBank, found: dict[str | None, Adapter | None], names: list[Any]) -> None:
    """Rows of unequal lengths, padded on the right: each row's logits are those of the row alone."""
    texts = [ids_of(4 + number % 3, number) for number in range(len(names))]
    rows = [bank.with_virtual(name, ids) for name, ids in zip(names, texts, strict=True)]
    longest = max(map(len, rows))
    ids_BT = torch.tensor([row + [1] * (longest - len(row)) for row in rows])
    position_BT = torch.arange(longest).repeat(len(rows), 1)
    document_BT = torch.tensor([[0] * len(row) + [-1] * (longest - len(row)) for row in rows], dtype=torch.int32)
    with bank.rows(names):
        together = logits(bank.model, ids_BT, position_BT, document_BT)
    seen = set()
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        first, last = slots(found[name]), len(row)
        wanted = logits(alone(found[name]), torch.tensor([row]))[0, first:]
        torch.testing.assert_close(together[number, first:last], wanted, atol=1e-5, rtol=1e-5)
        seen.add((tuple(row[first:]), tuple(wanted[-1].tolist())))
    assert len(seen) == len(names), "rows that are all the same prove nothing"


@pytest.mark.parametrize("kind", METHODS)
def test_each_row_has_its_own_adapter(kind: str) -> None:
    bank = AdapterBank(little.model().eval())
    found = filled(bank, [kind])
    one, other = f"a.{kind}", f"b.{kind}"
    check_rows(bank, found, [one, other, None, one])
    check_rows(bank, found, [other, one])
    check_rows(bank, found, [one, one])
    check_rows(bank, found, [None, None])


def test_adapters_of_all_kinds_in_one_batch() -> None:
    bank = AdapterBank(little.model().eval())
    found = filled(bank, list(METHODS))
    names = [*found, *found]
    check_rows(bank, found, names[::-1])


@pytest.mark.parametrize("beams", [1, 3])
def test_generated_as_alone(beams: int) -> None:
    """A batch whose rows end at different times, are sorted and copied: each goes on with its own adapter."""
    model = little.model().eval()
    bank = AdapterBank(model)
    found = filled(bank, list(METHODS))
    names = [*found, *found]
    prompts = [ids_of(3 + 2 * number % 7, number % len(found)) for number in range(len(names))]
    eos, lengths = [0, 1, 2], set()
    sampling = Sampling(max_new_tokens=9, temperature=0.0, num_beams=beams)
    with bank.rows(names):
        together = generate(model, prompts, sampling, eos_ids=eos, batch_rows=7)
    for name, ids, answer in zip(names, prompts, together, strict=True):
        leading = [0] * slots(found[name])
        [wanted] = generate(alone(found[name]), [leading + ids], sampling, eos_ids=eos)
        assert answer.ids == wanted.ids, name
        assert answer.prompt_tokens == len(ids)
        lengths.add(len(answer.ids))
    assert len(lengths) > 2
    plain = generate(model, prompts, sampling, eos_ids=eos)
    assert [one.ids for one in plain] != [one.ids for one in together]


def test_room_for_virtual_tokens_is_kept() -> None:
    """A prompt that is cut loses its own first tokens, never the slots before it."""
    model = little.model().eval()
    bank = AdapterBank(model)
    found = filled(bank, ["prompt"])
    ids, sampling = ids_of(70, 1), Sampling(max_new_tokens=4, temperature=0.0)
    with bank.rows(["a.prompt"]):
        [answer] = generate(model, [ids], sampling, shorten="left")
    assert answer.dropped_prompt_tokens == 70 - (64 - 3 - 4 + 1)
    kept = ids[answer.dropped_prompt_tokens :]
    assert answer.ids == generate(alone(found["a.prompt"]), [[0] * 3 + kept], sampling)[0].ids
    lm = LanguageModel(alone(found["a.prompt"]), virtual_tokens=3)
    [same] = lm.generate([ids], sampling, shorten="left")
    assert (same.ids, same.dropped_prompt_tokens) == (answer.ids, answer.dropped_prompt_tokens)


def test_without_a_choice_and_afterwards_the_model_is_the_base() -> None:
    outcome = little.Outcome()
    outcome.model = model = little.model().eval()
    before, ids_BT = outcome.weights, torch.tensor([ids_of(9, 0), ids_of(9, 1)])
    modules, asked = dict(model.named_modules()), [p.requires_grad for p in model.parameters()]
    plain = logits(model, ids_BT)
    bank = AdapterBank(model)
    filled(bank, list(METHODS))
    named = {name.replace(".base.", ".") for name in trained(model)}
    assert named == trained(little.model()).keys(), "the parts ask for no gradient, and what did still does"
    assert model.sites() == little.model().sites()
    assert torch.equal(plain, logits(model, ids_BT))
    with bank.rows(["a.houlsby", "b.prefix"]):
        assert not torch.allclose(plain, logits(model, ids_BT), atol=0.01)
    assert torch.equal(plain, logits(model, ids_BT))
    bank.remove("a.houlsby")
    with pytest.raises(ConfigError, match=r"no adapter 'a\.houlsby'"), bank.rows(["a.houlsby", None]):
        pass
    bank.close()
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert little.same(before, outcome.weights)
    assert [p.requires_grad for p in model.parameters()] == asked
    assert torch.equal(plain, logits(model, ids_BT))


def test_parts_are_read_without_dropout() -> None:
    model, ids_BT = little.model(), torch.tensor([ids_of(9, 0)])
    bank = AdapterBank(model)
    found = filled(bank, ["lora"])  # with a dropout of one half
    for _ in range(2):
        with bank.rows(["a.lora"]):
            torch.testing.assert_close(
                logits(model, ids_BT), logits(alone(found["a.lora"]), ids_BT), atol=1e-5, rtol=1e-5
            )
        model.train()


def test_threads_do_not_disturb_each_other() -> None:
    """Two threads in the middle of one model at the same time, each with its own choice."""
    model = little.model().eval()
    bank = AdapterBank(model)
    filled(bank, ["houlsby"])
    ids_BT = torch.tensor([ids_of(9, 0)])
    expected = {}
    for name in ("a.houlsby", "b.houlsby", None):
        with bank.rows([name]):
            expected[name] = logits(model, ids_BT)
    barrier, found = threading.Barrier(3, timeout=30), {}

    def wait(*_: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            barrier.wait()

    hooks = [block.register_forward_hook(wait) for block in model.layers]  # all three are in each block at once

    def go(name: str | None) -> None:
        with bank.rows([name]):
            found[name] = logits(model, ids_BT)

    threads = [threading.Thread(target=copy_context().run, args=(go, name)) for name in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for hook in hooks:
        hook.remove()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_choice_can_be_nested_and_reordered() -> None:
    model = little.model().eval()
    bank = AdapterBank(model)
    filled(bank, ["pfeiffer"])
    ids_BT = torch.tensor([ids_of(9, 0)])
    with bank.rows(["a.pfeiffer"]):
        one = logits(model, ids_BT)
        with bank.rows(["b.pfeiffer"]):
            other = logits(model, ids_BT)
        assert torch.equal(one, logits(model, ids_BT))
    assert not torch.equal(one, other)
    with bank.rows(["a.pfeiffer", "b.pfeiffer"]), these_rows(model, [1, 0, 1]):
        found = logits(model, ids_BT.expand(3, -1))
    torch.testing.assert_close(found, torch.cat([other, one, other]), atol=1e-5, rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    model = little.model().eval()
    bank = AdapterBank(model)
    with pytest.raises(ConfigError, match="none was added yet"), bank.rows(["a"]):
        pass
    filled(bank, ["pfeiffer"])
    with pytest.raises(ConfigError, match=r"did you mean 'a\.pfeiffer'"), bank.rows(["a.pfeifer"]):
        pass
    with pytest.raises(ConfigError, match="already"):
        bank.add("a.pfeiffer", method_of({"kind": "pfeiffer"}))
    with pytest.raises(ConfigError, match="1 rows, and adapters were chosen for 2"), bank.rows(["a.pfeiffer", None]):
        logits(model, torch.tensor([ids_of(9, 0)]))
    with pytest.raises(ConfigError, match="the call has 1 rows"), bank.rows(["a.pfeiffer", None]):
        generate(model, [[1, 2]], Sampling(max_new_tokens=2))
    with pytest.raises(ConfigError, match="no parts of its own"):
        bank.add("all", Full(FullSettings()))
    with pytest.raises(ConfigError, match="carries an adapter already"):
        AdapterBank(model)
    assert bank.names == ("a.pfeiffer", "b.pfeiffer")


def test_adapters_from_folders(tmp_path: Path) -> None:
    """Saved by one process, added by another; made for another base: refused, and the bank stays as it was."""
    bank = AdapterBank(little.model().eval())
    found: dict[str | None, Adapter | None] = {None: None}
    for kind in ("lora", "prefix", "houlsby"):
        found[kind] = one = adapter(kind, 1)
        save_adapter(alone(one), type(one[0])(one[0].settings), tmp_path / kind)
        bank.add(kind, tmp_path / kind)
    check_rows(bank, found, ["prefix", None, "houlsby", "lora"])
    ids_BT = torch.tensor([ids_of(9, 0)])
    with pytest.raises(ArtifactError, match="another base"):
        AdapterBank(little.model(seed=2)).add("lora", tmp_path / "lora")
    with bank.rows(["lora"]):
        before = logits(bank.model, ids_BT)
    with pytest.raises(ArtifactError, match="no such folder"):
        bank.add("other", tmp_path / "other")
    with bank.rows(["lora"]):
        assert torch.equal(before, logits(bank.model, ids_BT))
    assert bank.names == ("lora", "prefix", "houlsby")


@pytest.mark.parametrize("own", ["a head", "a head where the base has one", "attention both ways"])
def test_what_the_rows_of_a_batch_share_is_the_base_s(own: str, tmp_path: Path) -> None:
    """Adapters that bring a head of their own, or read otherwise, are refused, and the base is as it was."""
    head = HeadConfig(kind="token", labels=("x", "y"))
    trained_model, model = little.model(), little.model().eval()
    if own == "a head where the base has one":
        add_head(trained_model, head, 1)
        add_head(model, head, 2)
    elif own == "a head":
        add_head(trained_model, head, 1)
    else:
        trained_model.set_causal(False)
    method = method_of({"kind": "pfeiffer"})
    method.install(trained_model, seed=0)
    save_adapter(trained_model, method, tmp_path / "adapter")
    bank, ids_BT, causal = AdapterBank(model), torch.tensor([ids_of(9, 0)]), model.cfg.causal
    before = {name: value.clone() for name, value in model.named_parameters()}
    cfg, hidden = model.cfg, model(ids_BT)
    with pytest.raises(ConfigError, match="task head of its own" if "head" in own else "in both directions"):
        bank.add("tags", tmp_path / "adapter")
    assert little.same(before, dict(model.named_parameters()))
    assert model.cfg == cfg and model.cfg.causal == causal and not bank.names
    assert torch.equal(hidden, model(ids_BT))
