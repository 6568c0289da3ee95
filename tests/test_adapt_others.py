"""Prompt tuning, prefix tuning and bottleneck adapters: PEFT's numbers both ways, packed and decoded as alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import little
import theirs
from ratoon.adapt.bottleneck import Houlsby, HoulsbySettings, Pfeiffer, PfeifferSettings, WithBottleneck
from ratoon.adapt.contract import Method, trained
from ratoon.adapt.prefix import PrefixSettings, PrefixTuning
from ratoon.adapt.prompt import Prompt, PromptSettings
from ratoon.adapt.slots import VIRTUAL_ID, fill, with_virtual
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.generate import native
from ratoon.generate.decode import generate
from ratoon.generate.sample import Sampling
from ratoon.model import fused
from ratoon.model.folder import read_model
from ratoon.model.native import Unavailable
from ratoon.model.transformer import Transformer

P = 5
Table = dict[str, Any]


def prompt(**table: Any) -> Prompt:
    return Prompt(build(PromptSettings, {"tokens": P, **table}))


def prefix(**table: Any) -> PrefixTuning:
    return PrefixTuning(build(PrefixSettings, {"tokens": P, **table}))


def houlsby(**table: Any) -> Houlsby:
    return Houlsby(build(HoulsbySettings, {"reduction": 4, **table}))


def pfeiffer(**table: Any) -> Pfeiffer:
    return Pfeiffer(build(PfeifferSettings, {"reduction": 4, **table}))


ALL = {
    "prompt": prompt,
    "prefix": prefix,
    "prefix-mlp": lambda: prefix(reparametrize=True, mlp_width=7),
    "houlsby": houlsby,
    "pfeiffer": pfeiffer,
}
VIRTUAL = ["prompt", "prefix", "prefix-mlp"]


def installed(method: Method, model: Transformer, seed: int = 3) -> Transformer:
    """The model with the method in it and every trained number random."""
    method.install(model, seed=seed)
    randomize(model)
    return model.eval()


def randomize(model: Transformer) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))


def ids_of(*shape: int, vocab: int = little.VOCAB, seed: int = 0) -> Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def virtual(ids_BT: Tensor, tokens: int = P) -> Tensor:
    return torch.tensor([with_virtual(row, tokens) for row in ids_BT.tolist()])


@torch.no_grad()
def logits(model: Transformer, ids_BT: Tensor, *rest: Any) -> Tensor:
    return model.logits(model(ids_BT, *rest))


# -- the parts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_counted_trained_and_taken_out(name: str) -> None:
    """The paper's formula counts what asks for a gradient, each of which gets one; afterwards the base is whole."""
    model, method = little.model(), ALL[name]()
    base = little.Outcome()
    base.model = model
    before, ids_BT = base.weights, ids_of(2, 9)
    plain, counted = logits(model, ids_BT), method.count(model)
    installed(method, model)
    found = trained(model)
    assert counted == method.count(model) == sum(parameter.numel() for parameter in found.values()) > 0
    assert not found.keys() & before.keys()
    ids_BT = virtual(ids_BT, method.virtual_tokens)
    model.logits(model(ids_BT)).square().sum().backward()
    silent = [n for n, p in model.named_parameters() if (p.grad is None) == p.requires_grad]
    assert not silent
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in found.values())
    method.remove(model)
    assert little.same(before, base.weights)
    assert torch.equal(plain, logits(model, ids_of(2, 9)))


@pytest.mark.parametrize("name", ALL)
def test_cannot_be_merged(name: str) -> None:
    model, method = little.model(), ALL[name]()
    method.install(model, seed=0)
    with pytest.raises(ConfigError, match="cannot be merged"):
        method.merge(model)


@pytest.mark.parametrize("make", [houlsby, pfeiffer])
@pytest.mark.parametrize("changes", [{}, {"mlp": "relu2", "norm_weight": "none"}, {"norm_layout": "parallel"}])
def test_bottlenecks_start_as_nothing(make: Any, changes: Table) -> None:
    model, ids_BT = little.model(**changes), ids_of(2, 9)
    plain = logits(model, ids_BT)
    make().install(model, seed=0)
    assert torch.equal(plain, logits(model, ids_BT))
    randomize(model)
    assert not torch.allclose(plain, logits(model, ids_BT), atol=0.1)


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_bottlenecks_compute_what_the_papers_say(activation: str) -> None:
    """Against a block written out by hand: behind attention and behind the MLP, before each sum."""
    model = installed(houlsby(activation=activation, layers=(1,)), little.model())
    sites = [name for name, module in model.named_modules() if isinstance(module, WithBottleneck)]
    assert sites == ["layers.1.attention.o", "layers.1.mlp.down"]
    act = {"relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu, "tanh": torch.tanh}

    def small(part: Any, h: Tensor) -> Tensor:
        return h + act[activation](h @ part.down.T + part.down_bias) @ part.up.T + part.up_bias

    ids_BT, block = ids_of(2, 9), model.layers[1]
    with torch.no_grad():
        x = model.trunk(ids_BT, 1)
        o, down = block.attention.o, block.mlp.down
        block.attention.o, block.mlp.down = o.base, down.base
        reading = model._reading(x, 0, None, None, None, None)
        x = x + small(o, block.attention(block.attention_norm(x), reading, None, None))
        x = x + small(down, block.mlp(block.mlp_norm(x))[0])
        by_hand = model.logits(model.final_norm(x))
        block.attention.o, block.mlp.down = o, down
    torch.testing.assert_close(logits(model, ids_BT), by_hand, atol=1e-5, rtol=1e-5)


def test_bottlenecks_refuse_what_they_cannot_stand_behind() -> None:
    with pytest.raises(ConfigError, match="mixture of experts"):
        pfeiffer().install(little.model(moe=little.EXPERTS, moe_layers=(1,)), seed=0)
    with pytest.raises(ConfigError, match="the layers 2"):
        pfeiffer(layers=(0, 2)).install(little.model(), seed=0)
    pfeiffer(layers=(0,)).install(little.model(moe=little.EXPERTS, moe_layers=(1,)), seed=0)


@pytest.mark.parametrize("kind", [houlsby, pfeiffer])
def test_bottlenecks_are_saved_and_loaded(kind: Any) -> None:
    method, ids_BT = kind(layers=(1,), activation="tanh"), ids_of(2, 9)
    model = installed(method, little.model())
    config, weights = method.peft_config(model), method.peft_weights(model)
    assert config["peft_type"] == "BOTTLENECK" and config["kind"] == method.kind
    again, other = type(method).from_peft(config), little.model()
    again.install(other, seed=99)
    again.load_peft(other, weights)
    assert torch.equal(logits(model, ids_BT), logits(other, ids_BT))
    with pytest.raises(ArtifactError, match="no tensor"):
        again.load_peft(other, dict(list(weights.items())[1:]))
    with pytest.raises(ArtifactError, match="has the shape"):
        again.load_peft(other, {name: value[:1] for name, value in weights.items()})


# -- virtual tokens --------------------------------------------------------------------------------------------------


def test_slots_are_filled_by_position() -> None:
    x_BTX, values_PX = torch.randn(2, 6, 3), torch.randn(2, 3)
    position_BT = torch.tensor([[0, 1, 2, 0, 1, 2], [4, 5, 6, 1, 7, 8]])
    found = fill(x_BTX, values_PX, 0, position_BT)
    for row in range(2):
        for slot in range(6):
            place = int(position_BT[row, slot])
            assert torch.equal(found[row, slot], values_PX[place] if place < 2 else x_BTX[row, slot])
    assert torch.equal(fill(x_BTX, values_PX, 1, None)[:, 0], values_PX[1].expand(2, 3))
    assert fill(x_BTX, values_PX, 2, None) is x_BTX


def test_a_prompt_of_tokens_is_those_tokens() -> None:
    """Slots that start from tokens' embeddings, or from their keys and values, compute what the tokens would."""
    for changes in ({}, {"embedding_scale": 3.0}, {"positions": "learned"}, {"qk_norm": "after_rope"}):
        for make in (prompt, prefix):
            model, method, ids_BT = little.model(**changes).eval(), make(init="text", text="x"), ids_of(2, 9)
            method.read_text(lambda text: [7, 3, 9])
            said = logits(model, torch.cat([torch.tensor([[7, 3, 9, 7, 3]] * 2), ids_BT], 1))
            method.install(model, seed=0)
            torch.testing.assert_close(said[:, P:], logits(model, virtual(ids_BT))[:, P:], atol=1e-5, rtol=1e-4)
            assert method.facts(model) == {"text_tokens": 3, "text_tokens_used": 3}


def test_first_values() -> None:
    """Sampled tokens and random numbers follow the seed."""
    for make in (prompt, prefix):
        for init in ("vocabulary", "random"):
            seen = []
            for seed in (0, 0, 1):
                model = little.model()
                make(init=init).install(model, seed=seed)
                seen.append({name: value.detach() for name, value in trained(model).items()})
            assert little.same(seen[0], seen[1]) and not little.same(seen[0], seen[2])
    model = little.model()
    prompt().install(model, seed=0)
    table = {tuple(row) for row in model.embed.weight.tolist()}
    assert model.virtual is not None
    assert all(tuple(row) in table for row in model.virtual.weight.tolist())


@pytest.mark.parametrize(
    ("make", "table"),
    [
        (prompt, {"init": "text"}),
        (prompt, {"text": "x"}),
        (prefix, {"reparametrize": True, "init": "vocabulary"}),
        (prefix, {"mlp_width": 4}),
        (prefix, {"tokens": 0}),
    ],
)
def test_settings_without_effect_are_refused(make: Any, table: Table) -> None:
    with pytest.raises(ConfigError):
        make(**table)


def test_what_virtual_tokens_cannot_do_is_said() -> None:
    for make in (prompt, prefix):
        with pytest.raises(ConfigError, match="no room for a text"):
            make(tokens=64).install(little.model(), seed=0)
        method = make(init="text", text="x")
        with pytest.raises(ConfigError, match="nobody has read it"):
            method.install(little.model(), seed=0)
        with pytest.raises(ConfigError, match="no token"):
            method.read_text(lambda text: [])
        method.read_text(lambda text: [little.VOCAB])
        with pytest.raises(ConfigError, match="outside the model's vocabulary"):
            method.install(little.model(), seed=0)


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"windows": (4, None)}, {"causal": False}])
def test_packed_is_alone(name: str, changes: Table) -> None:
    """Documents side by side in a row, and padding behind them: each has its own virtual tokens."""
    model = installed(ALL[name](), little.model(**changes))
    one, two = ids_of(1, 6, seed=1), ids_of(1, 9, seed=2)
    alone = [logits(model, virtual(one)), logits(model, virtual(two))]
    ids_BT = torch.cat([virtual(one), virtual(two), torch.zeros(1, 3, dtype=torch.int64)], 1)
    lengths = [P + 6, P + 9]
    position_BT = torch.cat([torch.arange(n) for n in lengths] + [torch.zeros(3, dtype=torch.int64)])[None]
    document_BT = torch.tensor([0] * lengths[0] + [1] * lengths[1] + [-1] * 3, dtype=torch.int32)[None]
    packed = logits(model, ids_BT, position_BT, document_BT)
    torch.testing.assert_close(packed[:, P : lengths[0]], alone[0][:, P:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed[:, lengths[0] + P : sum(lengths)], alone[1][:, P:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VIRTUAL)
def test_the_slots_ids_do_not_matter(name: str) -> None:
    """What stands in a virtual slot is read by nobody."""
    model, ids_BT = installed(ALL[name](), little.model()), ids_of(2, 9)
    other = virtual(ids_BT)
    other[:, :P] = 11
    assert VIRTUAL_ID != 11
    assert torch.equal(logits(model, virtual(ids_BT))[:, P:], logits(model, other)[:, P:])


@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"windows": (4, None)}])
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_decoding_is_the_naive_loop(name: str, changes: Table, kernel: Any) -> None:
    """Prompts of unequal lengths in one batch, padded on the left: each goes on as alone, without a cache; the C step
    too, which need not know what fills the slots."""
    if kernel == "native":
        need_c_step()
    model = installed(ALL[name](), little.model(**changes))
    prompts = [with_virtual(ids_of(1, length, seed=length)[0].tolist(), P) for length in (3, 11, 6, 6)]
    naive = []
    for ids in prompts:
        ids = list(ids)
        for _ in range(8):
            ids.append(int(logits(model, torch.tensor([ids]))[0, -1].argmax()))
        naive.append(ids[-8:])
    assert len({tuple(ids) for ids in naive}) > 1
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    assert [answer.ids for answer in generate(model, prompts, sampling, kernel=kernel)] == naive
    beams = Sampling(max_new_tokens=8, temperature=0.0, num_beams=3)
    together = [answer.ids for answer in generate(model, prompts, beams, kernel=kernel)]
    assert together == [generate(model, [ids], beams, kernel=kernel)[0].ids for ids in prompts]


@pytest.mark.parametrize("name", VIRTUAL)
def test_the_c_step_leaves_virtual_slots_alone(name: str) -> None:
    """A prompt without placeholders is at fault, and yet both ways of decoding agree: tokens at the first places are
    read by the model itself."""
    need_c_step()
    model = installed(ALL[name](), little.model())
    sampling = Sampling(max_new_tokens=8, temperature=0.0)
    found = [generate(model, [[3], [4, 5]], sampling, kernel=kernel) for kernel in ("native", "torch")]
    assert [one.ids for one in found[0]] == [one.ids for one in found[1]]


def need_c_step() -> None:
    try:
        native.kernel()
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.skipif(fused.missing() is not None, reason="the C attention does not run here")
@pytest.mark.parametrize("name", VIRTUAL)
@pytest.mark.parametrize("changes", [{}, {"qk_norm": "after_rope", "norm_weight": "none"}, {"windows": (6, None)}])
def test_the_c_attention_is_the_plain_one(name: str, changes: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 through C against float32 through torch, of packed documents: outputs and each gradient."""
    table = {"width": 64, "heads": 2, "kv_heads": 1, "init_std": 0.1, **changes}
    base = little.model(**table)
    assert fused.turns_inside(base.cfg), "without a prefix the C code would turn the keys itself"
    lengths = [P + 7, P + 12, 4]
    position_BT = torch.cat([torch.arange(n) for n in lengths])[None]
    document_BT = torch.tensor([0] * lengths[0] + [1] * lengths[1] + [-1] * lengths[2], dtype=torch.int32)[None]
    ids_BT = ids_of(1, sum(lengths))
    real_T = (position_BT[0] >= P) & (document_BT[0] >= 0)
    weight_TV = torch.randn(int(real_T.sum()), little.VOCAB, generator=torch.Generator().manual_seed(1))
    calls: list[bool] = []
    attend, fits = fused.attend, fused.fits
    monkeypatch.setattr(fused, "attend", lambda *rest, **more: (calls.append(True), attend(*rest, **more))[1])
    found = []
    for kind, in_c in ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)):
        monkeypatch.setattr(fused, "fits", fits if in_c else lambda cfg, x: False)
        model = installed(ALL[name](), little.model(**table).bfloat16().to(kind))
        for parameter in trained(model).values():  # the same numbers in all three
            parameter.data = parameter.data.bfloat16().to(kind)
        scores_TV = model.logits(model(ids_BT, position_BT, document_BT))[0, real_T].float()
        (scores_TV * weight_TV).sum().backward()
        found.append([scores_TV.detach(), *(p.grad.float() for p in trained(model).values() if p.grad is not None)])
    assert len(calls) == 2 and len(found[0]) == len(found[1]) == len(found[2]) > 1
    for exact, plain, fast in zip(*found, strict=True):
        rounding = float((exact - plain).norm() / exact.norm())
        assert float((exact - fast).norm() / exact.norm()) < 2 * rounding + 0.01 < 0.2


# -- PEFT ------------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Table] = {
    "llama": {**theirs.SMALL, "model_type": "llama"},
    "gpt2": {**theirs.GPT2, "model_type": "gpt2"},
    "gemma3_text": {**theirs.SMALL, **theirs.GEMMA, "layer_types": theirs.MIXED, "model_type": "gemma3_text"},
    "gpt_neox": {**theirs.NEOX, "model_type": "gpt_neox"},
    "qwen3": {**theirs.SMALL, "head_dim": 8, "model_type": "qwen3"},
}


def base_of_theirs(family: str, folder: Path) -> Any:
    """A small model of Transformers with every parameter random, and its folder."""
    import transformers

    config = transformers.AutoConfig.for_model(**FAMILIES[family])
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    theirs.randomize(model)
    model.save_pretrained(folder)
    return model.eval()


def peft_settings(kind: str) -> Any:
    import peft

    table = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    if kind == "prompt":
        return peft.PromptTuningConfig(**table)
    return peft.PrefixTuningConfig(**table, prefix_projection=kind == "prefix-mlp", encoder_hidden_size=6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_we_compute_what_peft_saved(kind: str, family: str, tmp_path: Path) -> None:
    import peft

    their_base = base_of_theirs(family, tmp_path / "base")
    their_model = peft.get_peft_model(their_base, peft_settings(kind))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in their_model.parameters() if p.requires_grad):
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    their_model.save_pretrained(tmp_path / "adapter")
    ids_BT = ids_of(2, 12, vocab=theirs.VOCAB)
    with torch.no_grad():
        wanted = their_model.eval()(input_ids=ids_BT).logits[:, -12:]
        alone = base_of_theirs(family, tmp_path / "again")(ids_BT).logits
    model = read_model(tmp_path / "base")
    config, weights = read_adapter(tmp_path / "adapter")
    method = {"PROMPT_TUNING": Prompt, "PREFIX_TUNING": PrefixTuning}[config["peft_type"]].from_peft(config)
    method.install(model, seed=0)
    method.load_peft(model, weights)
    assert theirs.difference(wanted, logits(model, virtual(ids_BT))[:, P:]) < 1e-4
    assert theirs.difference(wanted, alone) > 1e-2, "an adapter that changes nothing proves nothing"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_peft_computes_what_we_saved(kind: str, family: str, tmp_path: Path) -> None:
    import json

    import peft
    from safetensors.torch import save_file

    their_base = base_of_theirs(family, tmp_path / "base")
    method, ids_BT = ALL[kind](), ids_of(2, 12, vocab=theirs.VOCAB)
    model = installed(method, read_model(tmp_path / "base"))
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {**method.peft_config(model), "task_type": "CAUSAL_LM", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({n: v.contiguous() for n, v in method.peft_weights(model).items()}, folder / "adapter_model.safetensors")
    their_model = peft.PeftModel.from_pretrained(their_base, folder).eval()
    with torch.no_grad():
        found = their_model(input_ids=ids_BT).logits[:, -12:]
    assert theirs.difference(found, logits(model, virtual(ids_BT))[:, P:]) < 1e-4


def read_adapter(folder: Path) -> tuple[Table, dict[str, Tensor]]:
    import json

    from safetensors.torch import load_file

    config: Table = json.loads((folder / "adapter_config.json").read_text())
    return config, load_file(folder / "adapter_model.safetensors")


def test_the_mlp_is_that_of_peft() -> None:
    """tanh(E W + b) V + c, keys before values, layer after layer."""
    import peft

    config = peft.PrefixTuningConfig(
        num_virtual_tokens=P, token_dim=16, num_layers=2, encoder_hidden_size=7, prefix_projection=True
    )
    encoder = peft.PrefixEncoder(config)
    method, model = ALL["prefix-mlp"](), little.model()
    installed(method, model)
    prefixes: list[Any] = [block.attention.prefix for block in model.layers]
    values = {
        "embedding.weight": prefixes[0].source.table,
        "transform.0.weight": prefixes[0].source.weight,
        "transform.0.bias": prefixes[0].source.bias,
        "transform.2.weight": torch.cat([one.weight for one in prefixes]),
        "transform.2.bias": torch.cat([one.bias for one in prefixes]),
    }
    encoder.load_state_dict(values)
    wanted = encoder(torch.arange(P)[None])[0].detach()
    torch.testing.assert_close(method.peft_weights(model)["prompt_embeddings"], wanted, atol=1e-5, rtol=1e-5)


def test_foreign_tensors_that_do_not_fit_are_refused() -> None:
    for make in (prompt, prefix):
        model, method = little.model(), make()
        method.install(model, seed=0)
        with pytest.raises(ArtifactError, match="alone"):
            method.load_peft(model, {})
        with pytest.raises(ArtifactError, match="has the shape"):
            method.load_peft(model, {"prompt_embeddings": torch.zeros(P, 3)})
        for said in ({}, {"num_virtual_tokens": 3, "num_transformer_submodules": 2}):
            with pytest.raises(ArtifactError, match="num_virtual_tokens"):
                type(method).from_peft(said)
