"""Task heads: each family both ways against Transformers, every parameter random; pooling; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from ratoon.base.errors import ArtifactError
from ratoon.model.config import HeadConfig, ModelConfig
from ratoon.model.folder import empty_model, read_model, write_model
from ratoon.model.heads import OWN_TYPE
from ratoon.model.init import add_head, init_weights
from ratoon.model.transformer import Transformer
from theirs import EXPERTS, GEMMA, GPT2, MIXED, NEOX, SMALL, randomize

LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SMALL),
    "mistral": ("Mistral", SMALL),
    "qwen2": ("Qwen2", SMALL),
    "qwen3": ("Qwen3", {**SMALL, "head_dim": 8}),
    "qwen3_moe": ("Qwen3Moe", {**SMALL, **EXPERTS}),
    "gpt2": ("GPT2", GPT2),
    "gpt_neox": ("GPTNeoX", NEOX),
    "gemma3": ("Gemma3Text", {**SMALL, **GEMMA, "layer_types": MIXED}),
}
KINDS = {"sequence": "ForSequenceClassification", "token": "ForTokenClassification", "span": "ForQuestionAnswering"}
CASES = [(name, kind) for name in FAMILIES for kind in KINDS if not (name == "gemma3" and kind != "sequence")]


def theirs(name: str, kind: str) -> Any:
    stem, table = FAMILIES[name]
    settings = {**table, "pad_token_id": 0, **({} if kind == "span" else LABELS)}
    model = getattr(transformers, stem + KINDS[kind])(getattr(transformers, stem + "Config")(**settings))
    randomize(model)
    return model.eval()


@torch.no_grad()
def scores_of_theirs(model: Any, kind: str, ids_BT: torch.Tensor) -> torch.Tensor:
    out = model(ids_BT)
    return (
        torch.stack([out.start_logits, out.end_logits], -1).flatten(0, 1)
        if kind == "span"
        else (out.logits if kind == "sequence" else out.logits.flatten(0, 1))
    )


@torch.no_grad()
def scores_of_ours(model: Transformer, kind: str, ids_BT: torch.Tensor) -> torch.Tensor:
    at_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    if kind == "sequence":
        at_BT[:, :-1] = False
    assert model.task_head is not None
    return model.task_head(model(ids_BT), at_BT)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_heads_both_ways(name: str, kind: str, tmp_path: Path) -> None:
    ids_BT = torch.randint(4, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    model = theirs(name, kind)
    model.save_pretrained(tmp_path / "theirs")
    wanted = scores_of_theirs(model, kind, ids_BT)
    ours = read_model(tmp_path / "theirs")
    assert ours.cfg.task_head is not None and ours.cfg.task_head.kind == kind
    assert torch.allclose(scores_of_ours(ours, kind, ids_BT), wanted, atol=1e-4)
    assert float(wanted.std()) > 0.03
    if kind != "span":
        assert ours.cfg.task_head.labels == ("a", "b", "c")
    write_model(ours, tmp_path / "ours")
    back, info = type(model).from_pretrained(
        tmp_path / "ours", output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info.values()), info
    assert torch.allclose(scores_of_theirs(back.eval(), kind, ids_BT), wanted, atol=1e-4)
    assert torch.equal(scores_of_ours(read_model(tmp_path / "ours"), kind, ids_BT), scores_of_ours(ours, kind, ids_BT))


def small(**more: Any) -> Transformer:
    table = {"vocab_size": 61, "width": 32, "layers": 2, "heads": 4, "mlp_width": 48, "context_tokens": 64, "pad_id": 0}
    model = Transformer(ModelConfig(**{**table, **more}))
    init_weights(model, 1)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("pooling", ["last", "mean", "attention"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_texts_are_scored_as_alone(pooling: Any, causal: bool) -> None:
    model = small(causal=causal)
    add_head(model, HeadConfig(kind="sequence", labels=("a", "b", "c"), pooling=pooling), 1)
    randomize(model)
    assert model.task_head is not None
    texts = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14]]
    alone = []
    for ids in texts:
        at = torch.zeros(1, len(ids), dtype=torch.bool)
        at[0, -1] = True
        alone.append(model.task_head(model(torch.tensor([ids])), at))
    rows = [[0, 1], [2, 3]]
    ids_BT, document_BT = torch.zeros(2, 6, dtype=torch.int64), torch.full((2, 6), -1, dtype=torch.int32)
    position_BT, at_BT = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 6, dtype=torch.bool)
    for row, members in enumerate(rows):
        start = 0
        for number, text in enumerate(members):
            n = len(texts[text])
            ids_BT[row, start : start + n] = torch.tensor(texts[text])
            document_BT[row, start : start + n] = number
            position_BT[row, start : start + n] = torch.arange(n)
            start += n
            at_BT[row, start - 1] = True
    packed = model.task_head(model(ids_BT, position_BT, document_BT), at_BT, document_BT)
    assert torch.allclose(packed, torch.cat(alone), atol=1e-5)


def test_attention_pooling_by_its_definition() -> None:
    model = small()
    add_head(model, HeadConfig(kind="sequence", labels=("a", "b"), pooling="attention"), 1)
    head = model.task_head
    assert head is not None and head.query is not None and not head.query.any(), "it begins as the mean"
    randomize(model)
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    hidden_BTD = model(ids_BT)
    weight_T = torch.softmax(hidden_BTD[0] @ head.query / 32**0.5, dim=0)
    wanted = head.score(weight_T @ hidden_BTD[0])
    at_BT = torch.tensor([[False, False, False, True]])
    assert torch.allclose(head(hidden_BTD, at_BT)[0], wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("more", "head"),
    [
        ({"causal": False}, HeadConfig(kind="token", labels=("a", "b"))),
        ({}, HeadConfig(kind="sequence", labels=("a", "b"), pooling="attention")),
        ({"causal": False}, HeadConfig(kind="sequence", labels=("x",), problem="number", pooling="mean")),
        ({"causal": False}, None),
    ],
)
def test_what_transformers_cannot_compute_it_refuses_to_read(
    more: Any, head: HeadConfig | None, tmp_path: Path
) -> None:
    model = small(**more)
    if head is not None:
        add_head(model, head, 1)
        randomize(model)
    write_model(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == OWN_TYPE
    with pytest.raises(ValueError, match=OWN_TYPE):
        transformers.AutoConfig.from_pretrained(tmp_path / "m")
    back = read_model(tmp_path / "m")
    assert back.cfg.task_head == head and back.cfg.causal == model.cfg.causal
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(back(ids_BT), model(ids_BT))


def test_seeing_both_ways_is_another_model() -> None:
    model = small()
    ids_BT = torch.tensor([[5, 6, 7, 8]])
    one = model(ids_BT)
    model.cfg = model.cfg.model_copy(update={"causal": False})
    for block in model.layers:
        block.attention.cfg = model.cfg
    assert not torch.allclose(one[0, 0], model(ids_BT)[0, 0])


def test_a_lost_head_is_told(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = small()
    add_head(model, HeadConfig(kind="token", labels=("a", "b")), 1)
    write_model(model, tmp_path / "m")
    weights = load_file(tmp_path / "m" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if not k.startswith("score")}, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "ratoon.json").unlink()
    with pytest.raises(ArtifactError, match=r"task_head\.score"):
        read_model(tmp_path / "m")


def test_first_values_of_a_head() -> None:
    model = small(tied_embeddings=False)
    head = HeadConfig(kind="token", labels=("a", "b", "c"))
    add_head(model, head, 3)
    assert model.task_head is not None and not model.task_head.score.bias.any()
    first = model.task_head.score.weight.clone()
    assert 0.01 < float(first.detach().std()) < 0.03
    add_head(model, head, 4)
    assert not torch.equal(model.task_head.score.weight, first)
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in empty_model(model.cfg).named_parameters()
    }
