"""Adapters on disk: PEFT computes what we saved and we what PEFT saved; an adapter knows its base."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import little
import theirs
from ratoon.adapt.contract import Method, trained
from ratoon.adapt.folder import (
    CONFIG,
    WEIGHTS,
    adapter_base,
    base_hash,
    is_adapter,
    load_adapter,
    save_adapter,
    weights_hash,
)
from ratoon.adapt.methods import METHODS, method_of
from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.cli.export import model_parent
from ratoon.model.config import HeadConfig
from ratoon.model.folder import read_model, write_model
from ratoon.model.init import add_head
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import MANIFEST, Parent, read_manifest

Table = dict[str, Any]
SMALL = theirs.SMALL
FAMILIES: dict[str, Table] = {
    "llama": {"model_type": "llama", **SMALL},
    "qwen2": {"model_type": "qwen2", **SMALL},
    "gpt2": {"model_type": "gpt2", **theirs.GPT2},
    "gpt_neox": {"model_type": "gpt_neox", **theirs.NEOX, "rotary_pct": 0.5},
    "gemma3_text": {"model_type": "gemma3_text", **SMALL, **theirs.GEMMA, "layer_types": theirs.MIXED},
}
OURS: dict[str, Table] = {
    "lora": {"kind": "lora", "rank": 3, "alpha": 5.0},
    "lora-some": {"kind": "lora", "rank": 3, "targets": ("q", "v", "down"), "layers": (0, 2)},
    "rslora": {"kind": "lora", "rank": 4, "rank_stabilized": True},
    "dora": {"kind": "lora", "rank": 3, "decomposed": True},
    "dora-some": {"kind": "lora", "rank": 3, "decomposed": True, "targets": ("k", "up")},
    "adalora": {"kind": "adalora", "initial_rank": 4, "rank": 2},
    "adalora-some": {"kind": "adalora", "initial_rank": 4, "rank": 2, "targets": ("q", "v")},
    "ia3": {"kind": "ia3"},
    "ia3-some": {"kind": "ia3", "targets": ("k", "down"), "layers": (1,)},
}


@cache
def their_weights(family: str) -> dict[str, Tensor]:
    model = their_model(family, random=False)
    theirs.randomize(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def their_model(family: str, *, random: bool = True, kind: str = "AutoModelForCausalLM", **more: Any) -> Any:
    """A small model of Transformers; every parameter random (norms too), the same ones at each call."""
    import transformers

    config = transformers.AutoConfig.for_model(**{**FAMILIES[family], **more})
    model = getattr(transformers, kind).from_config(config, attn_implementation="eager")
    if random:
        model.load_state_dict(their_weights(family), strict=kind == "AutoModelForCausalLM")
    return model.eval()


def our_model(family: str, tmp_path: Path) -> Transformer:
    their_model(family).save_pretrained(tmp_path / "base")
    return read_model(tmp_path / "base")


def ids_of(family: str = "llama") -> Tensor:
    return torch.randint(4, theirs.VOCAB, (2, 19), generator=torch.Generator().manual_seed(3))


def randomize_trained(model: torch.nn.Module, size: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                values = size * torch.randn(parameter.shape, generator=generator)
                gains = parameter.ndim == 1 or "ia3_l" in name or "magnitude" in name
                parameter.copy_(parameter + values if gains else values)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", OURS)
def test_peft_computes_what_we_saved(kind: str, family: str, tmp_path: Path) -> None:
    import peft

    model = our_model(family, tmp_path)
    plain = theirs.logits_of_ours(model, ids_of())
    table = dict(OURS[kind])
    method = method_of(table)
    method.install(model, seed=1)
    randomize_trained(model)
    ours = theirs.logits_of_ours(model, ids_of())
    assert theirs.difference(plain, ours) > 0.05, "an adapter that changes nothing proves nothing"
    save_adapter(model, method, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(their_model(family), tmp_path / "adapter").eval()
    assert theirs.difference(ours, theirs.logits_of_theirs(loaded, ids_of())) < 1e-4
    again = read_model(tmp_path / "base")
    other = load_adapter(again, tmp_path / "adapter")
    assert torch.equal(ours, theirs.logits_of_ours(again, ids_of()))
    assert other.settings == method.settings
    assert theirs.equal(other.peft_weights(again), method.peft_weights(model))


def peft_settings(family: str, kind: str) -> Any:
    import peft

    fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}.get(family)
    down = {"gpt2": "mlp.c_proj", "gpt_neox": "dense_4h_to_h"}.get(family, "down_proj")
    up = {"gpt2": "c_fc", "gpt_neox": "dense_h_to_4h"}.get(family, "up_proj")
    table: Table = {"task_type": "CAUSAL_LM"}
    if kind == "ia3":
        keys = [fused] if fused else ["k_proj", "v_proj"]
        return peft.IA3Config(**table, target_modules=[*keys, down], feedforward_modules=[down])
    if kind == "adalora":
        return peft.AdaLoraConfig(**table, init_r=4, target_r=2, total_step=10, target_modules=[fused or "q_proj", up])
    table |= {"r": 3, "lora_alpha": 7, "use_rslora": kind == "rslora", "use_dora": kind == "dora"}
    if kind == "patterns":
        last = "h.2" if family == "gpt2" else "layers.2"
        patterns = {"rank_pattern": {up: 5, rf"{last}.*.{down}": 2}, "alpha_pattern": {fused or "q_proj": 11}}
        return peft.LoraConfig(**table, **patterns, target_modules=[fused or "q_proj", up, down])
    if kind == "regex":
        return peft.LoraConfig(**table, target_modules=rf".*\.1\..*({fused or 'v_proj'}|{up})")
    if kind == "all":
        return peft.LoraConfig(**table, target_modules="all-linear", exclude_modules=[up], layers_to_transform=None)
    return peft.LoraConfig(**table, target_modules=[fused or "q_proj", down], layers_to_transform=[0, 1])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "patterns", "regex", "all", "adalora", "ia3"])
def test_we_compute_what_peft_saved(kind: str, family: str, tmp_path: Path) -> None:
    import peft

    model = our_model(family, tmp_path)
    found = peft.get_peft_model(their_model(family), peft_settings(family, kind)).eval()
    randomize_trained(found)
    wanted = theirs.logits_of_theirs(found, ids_of())
    found.save_pretrained(tmp_path / "adapter")
    said: list[str] = []
    plain = theirs.logits_of_ours(model, ids_of())
    method = load_adapter(model, tmp_path / "adapter", talk=said.append)
    assert theirs.difference(wanted, theirs.logits_of_ours(model, ids_of())) < 1e-4
    assert theirs.difference(wanted, plain) > 0.05
    assert len(said) == 1 and "could not be verified" in said[0]
    # Saved again, it says the same: by its own config, where our settings cannot.
    save_adapter(model, method, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(their_model(family), tmp_path / "again").eval()
    assert theirs.difference(wanted, theirs.logits_of_theirs(back, ids_of())) < 1e-4
    once_more = read_model(tmp_path / "base")
    load_adapter(once_more, tmp_path / "again")
    assert torch.equal(theirs.logits_of_ours(once_more, ids_of()), theirs.logits_of_ours(model, ids_of()))


def test_an_adalora_of_peft_with_fewer_ranks(tmp_path: Path) -> None:
    """PEFT leaves pruned triplets out of its folder, each matrix as many as it lost."""
    import peft

    model = our_model("llama", tmp_path)
    found = peft.get_peft_model(their_model("llama"), peft_settings("llama", "adalora")).eval()
    randomize_trained(found)
    masks = {}
    for number, (name, parameter) in enumerate(p for p in found.named_parameters() if "lora_E" in p[0]):
        keep = [True, number % 2 == 0, False, number % 3 > 0]
        with torch.no_grad():
            parameter[~torch.tensor(keep)] = 0
        masks[name.removeprefix("base_model.model.")] = keep
    found.peft_config["default"].rank_pattern = masks
    wanted = theirs.logits_of_theirs(found, ids_of())
    found.save_pretrained(tmp_path / "adapter")
    shapes = {tuple(v.shape) for n, v in load_file(tmp_path / "adapter" / WEIGHTS).items() if n.endswith("lora_E")}
    assert len(shapes) == 3
    method = load_adapter(model, tmp_path / "adapter", talk=lambda sentence: None)
    assert theirs.difference(wanted, theirs.logits_of_ours(model, ids_of())) < 1e-4
    assert sorted(method.facts(model)["ranks"].values()) == sorted(sum(keep) for keep in masks.values())


# -- task heads --------------------------------------------------------------------------------------------------------

HEADS = {
    "sequence": ("AutoModelForSequenceClassification", "score"),
    "token": ("AutoModelForTokenClassification", "score"),
    "span": ("AutoModelForQuestionAnswering", "qa_outputs"),
}


def with_head(family: str, kind: str, tmp_path: Path, **changes: Any) -> Transformer:
    model = our_model(family, tmp_path)
    labels = ("begin", "end") if kind == "span" else ("yes", "no", "perhaps")
    add_head(model, HeadConfig(kind=kind, labels=labels, **changes), seed=2)  # type: ignore[arg-type]
    return model


def scores(model: Transformer, at_BT: Tensor) -> Tensor:
    assert model.task_head is not None
    with torch.no_grad():
        return model.task_head(model(ids_of()), at_BT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("method_kind", ["lora", "prompt"])
def test_a_head_goes_along(method_kind: str, kind: str, family: str, tmp_path: Path) -> None:
    import peft

    if method_kind == "prompt" and (kind, family) != ("sequence", "llama"):
        pytest.skip("one kind shows where the head of a method with virtual tokens lies")
    model = with_head(family, kind, tmp_path)
    method = method_of({"kind": "lora", "rank": 3} if method_kind == "lora" else {"kind": "prompt", "tokens": 4})
    method.install(model, seed=1)
    assert any(name.startswith("task_head.") for name in trained(model))
    randomize_trained(model)
    save_adapter(model, method, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    assert config["task_type"] == {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}[kind]
    at_BT = torch.ones_like(ids_of(), dtype=torch.bool)
    if kind == "sequence":
        at_BT[:, :-1] = False
    again = read_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert again.cfg.task_head == model.cfg.task_head
    assert torch.equal(scores(model, at_BT), scores(again, at_BT))
    if method_kind == "prompt":
        assert "base_model.score.weight" in load_file(tmp_path / "adapter" / WEIGHTS)
    more = {} if kind == "span" else {"num_labels": 3, "pad_token_id": 0}
    if kind == "span":  # Transformers keeps the trunk of these under another name
        base = their_model(family, random=False, kind=HEADS[kind][0], **more)
        trunk = {n.removeprefix("transformer." if family == "gpt2" else "model."): v
                 for n, v in their_weights(family).items() if not n.startswith("lm_head")}  # fmt: skip
        getattr(base, "transformer").load_state_dict(trunk)  # noqa: B009
    else:
        base = their_model(family, kind=HEADS[kind][0], **more)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        if kind == "sequence":
            found = loaded(ids_of(), attention_mask=torch.ones_like(ids_of())).logits
            if method_kind == "prompt":
                virtual = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids_of()], 1)
                with torch.no_grad():
                    last_BT = torch.zeros_like(virtual, dtype=torch.bool)
                    last_BT[:, -1] = True
                    assert model.task_head is not None
                    ours = model.task_head(model(virtual), last_BT)
            else:
                ours = scores(model, at_BT)
        elif kind == "token":
            found, ours = loaded(ids_of()).logits.flatten(0, 1), scores(model, at_BT)
        else:
            given = loaded(ids_of())
            found, ours = torch.stack([given.start_logits, given.end_logits], -1).flatten(0, 1), scores(model, at_BT)
    assert float((found - ours).abs().max()) < 1e-4


def test_a_head_that_peft_saved(tmp_path: Path) -> None:
    """Its labels have no names there; a model that has the head already keeps its own."""
    import peft

    model = our_model("llama", tmp_path)
    base = their_model("llama", kind="AutoModelForSequenceClassification", num_labels=3)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["q_proj", "v_proj"])
    found = peft.get_peft_model(base, config).eval()
    randomize_trained(found)
    with torch.no_grad():
        wanted = found(ids_of(), attention_mask=torch.ones_like(ids_of())).logits
    found.save_pretrained(tmp_path / "adapter")
    load_adapter(model, tmp_path / "adapter", talk=lambda sentence: None)
    at_BT = torch.zeros_like(ids_of(), dtype=torch.bool)
    at_BT[:, -1] = True
    assert float((wanted - scores(model, at_BT)).abs().max()) < 1e-4
    assert model.cfg.task_head is not None and model.cfg.task_head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")
    other = with_head("llama", "sequence", tmp_path)
    load_adapter(other, tmp_path / "adapter", talk=lambda sentence: None)
    assert other.cfg.task_head is not None and other.cfg.task_head.labels == ("yes", "no", "perhaps")
    assert torch.equal(scores(other, at_BT), scores(model, at_BT))


def test_a_head_that_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    model = with_head("llama", "sequence", tmp_path)
    method = method_of({"kind": "lora", "rank": 3})
    method.install(model, seed=1)
    save_adapter(model, method, tmp_path / "adapter")
    (tmp_path / "adapter" / MANIFEST).unlink()
    path = tmp_path / "adapter" / WEIGHTS
    whole = load_file(path)
    name = "base_model.model.score.weight"
    for changed in ({**whole, name: whole[name][:, 1:].contiguous()}, {n: v for n, v in whole.items() if n != name}):
        save_file(changed, path)
        base = with_head("llama", "sequence", tmp_path)
        before = base.cfg, base.task_head
        if name in changed:
            with pytest.raises(ArtifactError, match=r"has the shape \(3, 31\)"):
                load_adapter(base, tmp_path / "adapter", talk=lambda sentence: None)
        else:
            with pytest.raises(ArtifactError, match="task_type is 'SEQ_CLS', and it holds no head"):
                load_adapter(base, tmp_path / "adapter", talk=lambda sentence: None)
        assert before == (base.cfg, base.task_head) and not any("base" in name for name, _ in base.named_modules())


def test_what_transformers_cannot_compute_peft_refuses(tmp_path: Path) -> None:
    import peft

    model = with_head("llama", "sequence", tmp_path, pooling="attention")
    model.set_causal(False)
    method = method_of({"kind": "lora", "rank": 3})
    method.install(model, seed=1)
    randomize_trained(model)
    save_adapter(model, method, tmp_path / "adapter")
    assert "base_model.model.pooling.query" in load_file(tmp_path / "adapter" / WEIGHTS)
    again = read_model(tmp_path / "base")
    load_adapter(again, tmp_path / "adapter")
    assert not again.cfg.causal and again.cfg.task_head == model.cfg.task_head
    at_BT = torch.zeros_like(ids_of(), dtype=torch.bool)
    at_BT[:, -1] = True
    assert torch.equal(scores(model, at_BT), scores(again, at_BT))
    with pytest.raises((ValueError, KeyError), match="RATOON_LORA"):
        peft.PeftModel.from_pretrained(their_model("llama"), tmp_path / "adapter")


# -- whose adapter it is -----------------------------------------------------------------------------------------------


def saved(folder: Path, table: Table | None = None, **more: Any) -> tuple[Transformer, Method]:
    model = little.model()
    method = method_of(table or {"kind": "lora", "rank": 3})
    method.install(model, seed=1)
    randomize_trained(model)
    save_adapter(model, method, folder, **more)
    return model, method


@pytest.mark.parametrize("kind", [kind for kind in METHODS if kind != "full"])
def test_the_hash_of_a_base_is_the_same_with_an_adapter(kind: str) -> None:
    model = little.model()
    before = weights_hash(model)
    method = method_of({"kind": kind})
    method.install(model, seed=1)
    randomize_trained(model)
    assert weights_hash(model) == before
    add_head(model, HeadConfig(kind="token", labels=("a", "b")), seed=1)  # type: ignore[call-arg]
    assert weights_hash(model) == before
    with torch.no_grad():
        model.final_norm.weight[3] += 1e-3
    assert weights_hash(model) != before


def test_an_adapter_refuses_another_base(tmp_path: Path) -> None:
    write_model(little.model(), tmp_path / "base")
    write_model(little.model(seed=9), tmp_path / "other")
    own, other = base_hash(tmp_path / "base"), base_hash(tmp_path / "other")
    model, _ = saved(tmp_path / "adapter", parents=[Parent(kind="model", hash=own, name="mine")])
    with torch.no_grad():
        wanted = model(torch.arange(9)[None])
    for given in (own, None):
        again = little.model()
        load_adapter(again, tmp_path / "adapter", base_hash=given)
        with torch.no_grad():
            assert torch.equal(again(torch.arange(9)[None]), wanted)
    with pytest.raises(ArtifactError, match=rf"another base \(mine, {own[:12]}\) than this one \({other[:12]}\)"):
        load_adapter(little.model(seed=9), tmp_path / "adapter", base_hash=other)
    stranger = little.model(seed=9)
    with pytest.raises(ArtifactError, match="another base"):
        load_adapter(stranger, tmp_path / "adapter")
    assert not any(name.endswith(".base") for name, _ in stranger.named_modules())
    said: list[str] = []
    load_adapter(little.model().bfloat16(), tmp_path / "adapter", talk=said.append)
    assert "could not be verified" in said[0] and "bfloat16" in said[0]


def test_the_hash_of_a_path(tmp_path: Path) -> None:
    """A folder without a manifest, whole or in shards, and a file."""
    write_model(little.model(), tmp_path / "base")
    assert base_hash(tmp_path / "base") == read_manifest(tmp_path / "base").hash
    (tmp_path / "base" / MANIFEST).unlink()
    one = base_hash(tmp_path / "base")
    assert one == base_hash(tmp_path / "base" / "model.safetensors")
    write_model(little.model(), tmp_path / "shards", shard_bytes=20_000)
    (tmp_path / "shards" / MANIFEST).unlink()
    several = base_hash(tmp_path / "shards")
    assert several != one
    assert model_parent("mine", tmp_path / "shards").hash == several, "what a run writes down is what loading asks for"
    first = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\x01")
    assert base_hash(tmp_path / "shards") != several
    with pytest.raises(ArtifactError, match="no weights"):
        base_hash(tmp_path)


def test_what_the_manifest_says(tmp_path: Path) -> None:
    saved(tmp_path / "adapter", base="runs/mine", facts={"task": "classification"}, extra_files={"note.txt": b"hello"})
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path)
    assert adapter_base(tmp_path / "adapter") == "runs/mine"
    manifest = read_manifest(tmp_path / "adapter", "adapter", check="hash")
    assert manifest.facts["method"]["kind"] == "lora" and manifest.facts["task"] == "classification"
    assert set(manifest.files) == {CONFIG, WEIGHTS, "note.txt"}
    with pytest.raises(ArtifactError, match="holds a adapter"):
        read_manifest(tmp_path / "adapter", "model")


# -- bad folders -------------------------------------------------------------------------------------------------------


def changed(folder: Path, config: Table | None = None, weights: dict[str, Tensor] | None = None) -> None:
    """The folder with other contents, as some other program would have written it."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if config is not None:
        table = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**table, **config}))
    if weights is not None:
        save_file(weights, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"peft_type": "VERA"}, "type 'VERA' are not known"),
        ({"bias": "all"}, "'bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_bias": True}, "'lora_bias' is True"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["c_attn"]}, r"names no linear layer"),
        ({"r": 5}, r"has the shape \(3, 32\)"),
        ({"target_modules": ["q_proj"]}, "tensors that no layer of this base takes"),
        ({"use_dora": True}, "no tensor .*lora_magnitude_vector"),
        ({"future": "knows more"}, "'future' is 'knows more'"),
    ],
)
def test_settings_that_are_not_known_are_refused(config: Table, error: str, tmp_path: Path) -> None:
    saved(tmp_path / "adapter")
    changed(tmp_path / "adapter", config)
    model = little.model()
    with pytest.raises(ArtifactError, match=error):
        load_adapter(model, tmp_path / "adapter", talk=lambda sentence: None)
    assert not any(name.endswith(".base") for name, _ in model.named_modules())


def test_torn_and_foreign_folders(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"

    def load() -> None:
        load_adapter(little.model(), folder, talk=lambda sentence: None)

    with pytest.raises(ArtifactError, match="no such folder"):
        load()
    saved(folder)
    whole = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=r"has .* bytes"):
        load()
    changed(folder)
    with pytest.raises(ArtifactError, match="cannot be read"):
        load()
    changed(folder, weights=dict(list(whole.items())[1:]))
    with pytest.raises(ArtifactError, match="has no tensor"):
        load()
    changed(folder, weights={**whole, "base_model.model.lm_head.lora_A.weight": torch.zeros(3, 32)})
    with pytest.raises(ArtifactError, match="1 tensors that no layer"):
        load()
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"but adapter_model\.bin"):
        load()
    (folder / CONFIG).write_text("{")
    with pytest.raises(ArtifactError, match="not readable as JSON"):
        load()
    (folder / CONFIG).unlink()
    with pytest.raises(ArtifactError, match=f"has no {CONFIG}"):
        load()


def test_what_has_no_adapter_is_refused(tmp_path: Path) -> None:
    model, method = little.model(), method_of({"kind": "full"})
    method.install(model, seed=1)
    with pytest.raises(ConfigError, match="full has no adapter"):
        save_adapter(model, method, tmp_path / "adapter")
    decoder = little.model(cross_attention=True)
    lora = method_of({"kind": "lora", "targets": ["cross_q"]})
    lora.install(decoder, seed=1)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        save_adapter(decoder, lora, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
