"""`ratoon finetune` as a user types it: every task, every method, what is saved and loaded, resuming, what is shown."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from little_tasks import KINDS, rows_of, table, write
from ratoon.adapt.folder import is_adapter
from ratoon.base.errors import ConfigError
from ratoon.cli.main import run as ratoon
from ratoon.generate.lm import load
from ratoon.generate.translate import Translator


@pytest.fixture
def place(with_base: Path) -> Path:
    return with_base


def finetune(recipe: dict[str, Any], *arguments: str) -> int:
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ratoon(["--debug", "finetune", "recipe.yaml", *arguments])


def state(name: str = "tuned") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(f"runs/{name}/manifest.json").read_text(encoding="utf-8"))
    return found


def losses(name: str = "tuned") -> list[float]:
    lines = Path(f"runs/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [one["loss"] for one in map(json.loads, lines) if one["kind"] == "train"]


# -- every task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_from_rows_to_measures(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of(kind))
    assert finetune(table(kind, train__log_every_steps=1)) == 0
    said = capsys.readouterr()
    assert said.out.strip() == "runs/tuned"
    found = state()
    assert found["status"] == "done" and found["task"]["kind"] == kind and found["method"]["kind"] == "lora"
    assert found["evaluation"]["values"] and found["evaluation"]["n"] == found["data"]["test_records"] > 0
    assert all(one["value"] is not None for one in found["evaluation"]["values"][:1])
    ledger = json.loads(Path("runs/tuned/ledger.json").read_text(encoding="utf-8"))["parts"]
    assert sum(ledger["train"]["rows"].values()) == ledger["train"]["rows"]["read"] * 2
    predictions = Path("runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(predictions) == found["evaluation"]["n"]
    assert losses()[-1] != losses()[0]
    # What was saved answers again, and gives the same figures.
    assert is_adapter(Path("runs/tuned/model"))
    lm = load("tuned")
    assert lm.facts["task"]["kind"] == kind


def test_answers_are_sought_by_beams_where_the_task_says_so(place: Path) -> None:
    from ratoon.cli.measure import task_of_model
    from ratoon.evaluate.task import _searching, predict
    from ratoon.generate.sample import Sampling
    from ratoon.tasks.registry import task_of

    write(place / "rows.jsonl", rows_of("translation"))
    assert finetune(table("translation", task__num_beams=3, task__length_penalty=0.6)) == 0
    lm = load("tuned")
    own = task_of_model(lm)
    records = [own.record(row, f"rows.jsonl:{n}") for n, row in enumerate(rows_of("translation"))]
    told = Sampling(max_new_tokens=6, temperature=0.0, num_beams=3, length_penalty=0.6, length_norm="wu")
    greedy = predict(lm, own, records, sampling=Sampling(max_new_tokens=6, temperature=0.0))
    beams = [one.text for one in predict(lm, own, records)]
    assert beams == [one.text for one in predict(lm, own, records, sampling=told)]
    assert beams != [one.text for one in greedy]
    with pytest.raises(ConfigError, match="no effect without beams"):
        _searching(task_of({"kind": "translation", "length_penalty": 0.6}), 6)


def test_the_loss_falls_on_rows_that_can_be_learned(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    assert finetune(table("classification", epochs=30, train__log_every_steps=1, train__learning_rate=0.02,
                          method={"kind": "full"})) == 0  # fmt: skip
    assert losses()[-1] < 0.5 * losses()[0]


# -- every method ------------------------------------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "adalora": {"rank": 2, "initial_rank": 3},
    "ia3": {},
    "prefix": {"tokens": 3},
    "prompt": {"tokens": 3},
    "houlsby": {"reduction": 8},
    "pfeiffer": {"reduction": 8},
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("task", ["classification", "extractive", "question-answering"])
def test_every_method_is_saved_as_an_adapter_that_answers_as_it_did(kind: str, task: str, place: Path) -> None:
    write(place / "rows.jsonl", rows_of(task))
    assert finetune(table(task, method={"kind": kind, **METHODS[kind]})) == 0
    found = state()
    assert is_adapter(place / "runs/tuned/model") and not (place / "runs/tuned/model/config.json").exists()
    assert found["method"]["trained"] > 0
    before = (place / "base").glob("*.safetensors")
    assert all(load_file(file) for file in before), "the base is whole"
    from ratoon.cli.measure import task_of_model
    from ratoon.data.records import read_parts
    from ratoon.evaluate.task import evaluate_task
    from ratoon.recipe.tuning import load_tuning

    recipe = load_tuning("runs/tuned/recipe.yaml")
    saved = json.loads(Path("runs/tuned/evaluation/evaluation.json").read_text(encoding="utf-8"))
    lm = load("tuned", dtype=saved["dtype"])
    own = task_of_model(lm)
    parts = read_parts(own, recipe.data, seed=recipe.seed)
    again = evaluate_task(lm, own, parts.test, too_long=recipe.data.too_long, language=recipe.language)
    assert again.as_dict()["values"] == saved["values"]


def test_all_parameters_are_saved_as_a_whole_model(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    assert finetune(table("classification", method={"kind": "full"})) == 0
    assert (place / "runs/tuned/model/config.json").is_file() and not is_adapter(place / "runs/tuned/model")
    head = load("tuned").model.task_head
    assert head is not None and head.cfg.labels == ("even", "odd")


def test_merged_is_one_model_that_computes_the_same(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("generation"))
    assert finetune(table("generation")) == 0
    assert finetune(table("generation", name="merged", merge=True)) == 0
    adapted, merged, base = load("tuned"), load("merged"), load("base")
    assert not is_adapter(place / "runs/merged/model")
    ids = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
    assert float((adapted.logits(ids) - merged.logits(ids)).abs().max()) < 1e-4
    assert float((base.logits(ids) - merged.logits(ids)).abs().max()) > 1e-2


def test_an_adapter_is_gone_on_with(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    assert finetune(table("classification")) == 0
    first = load_file("runs/tuned/model/adapter_model.safetensors")
    assert finetune(table("classification", name="more", model__adapter="tuned", train__log_every_steps=1)) == 0
    assert "going on with the adapter 'tuned'" in capsys.readouterr().err
    second = load_file("runs/more/model/adapter_model.safetensors")
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)
    assert {parent["kind"] for parent in json.loads(Path("runs/more/model/ratoon.json").read_text())["parents"]} == {
        "model", "tokenizer", "adapter",
    }  # fmt: skip
    recipe = table("classification", name="other", model__adapter="tuned", method={"kind": "lora", "rank": 4})
    assert ratoon_fails(recipe) == ("method.rank is 4, but the adapter was made with 2", 2)


def ratoon_fails(recipe: dict[str, Any], *arguments: str) -> tuple[str, int]:
    """What the verb says is wrong, and its exit code."""
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    from ratoon.base.errors import RatoonError

    with pytest.raises(RatoonError) as caught:
        ratoon(["--debug", "finetune", "recipe.yaml", *arguments])
    return caught.value.found, caught.value.exit_code


# -- the best step -----------------------------------------------------------------------------------------------------


def best_at(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Let the validation find the model of one step the best."""
    from ratoon.evaluate.validate import Validation

    def callback(*_: Any, **__: Any) -> Any:
        return lambda step, model: {"loss": 1.0, "choose": float(abs(step - best))}

    monkeypatch.setattr(Validation, "callback", callback)


def test_what_is_saved_is_the_best_step(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    told = {"train__steps": 6, "train__evaluate_every_steps": 1, "epochs": None, "method": {"kind": "full"}}
    best_at(monkeypatch, 3)
    assert finetune(table("classification", **told)) == 0
    found = state()
    assert found["step"] == 3 and found["steps"] == 6 and found["best"]["step"] == 3
    saved = load_file("runs/tuned/model/model.safetensors")["score.weight"]
    kept = {step: load_file(f"runs/tuned/checkpoints/step-0000000{step}/weights.safetensors") for step in (3, 6)}
    assert torch.equal(saved, kept[3]["task_head.score.weight"])
    assert not torch.equal(saved, kept[6]["task_head.score.weight"])


@pytest.mark.parametrize("best", [2, 6])
def test_adalora_ends_with_the_rank_that_was_asked_for(
    best: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    method = {"kind": "adalora", "rank": 1, "initial_rank": 3, "every_steps": 1, "final_fraction": 0.4}
    told = {"train__steps": 6, "train__evaluate_every_steps": 1, "epochs": None, "method": method}
    best_at(monkeypatch, best)
    assert finetune(table("classification", **told)) == 0
    found = state()["method_facts"]
    assert found["budget_reached"] and found["rank_in_all"] == found["rank_asked_for"]
    assert state()["step"] == 6
    assert ("its ranks were not reduced yet" in capsys.readouterr().err) == (best == 2)


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "preference"])
def test_resumed_after_ctrl_c_equals_uninterrupted(
    kind: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ratoon.cli import progress

    write(place / "rows.jsonl", rows_of(kind))
    noise = {} if kind == "preference" else {"noise": {"neftune_alpha": 5.0}}
    recipe = table(kind, train__log_every_steps=1, train__steps=6, train__rows=2, epochs=None,
                   method={"kind": "lora", "rank": 2, "layers": [1]}, **noise)  # fmt: skip
    assert finetune(recipe | {"name": "whole"}) == 0

    shown = progress.TrainingLine.__call__

    def press(line: Any, record: dict[str, Any]) -> None:
        shown(line, record)
        if record["kind"] == "train" and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(progress.TrainingLine, "__call__", press)
    assert finetune(recipe | {"name": "cut"}) == 130
    assert state("cut")["status"] == "interrupted"
    assert "ratoon finetune" in state("cut")["reason"] and "--resume" in state("cut")["reason"]
    monkeypatch.setattr(progress.TrainingLine, "__call__", shown)
    assert ratoon(["--debug", "finetune", "runs/cut/recipe.yaml", "--resume"]) == 0
    assert "going on from step 3" in capsys.readouterr().err
    whole, cut = (load_file(f"runs/{name}/model/adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses("whole") == losses("cut")
    values = [state(name)["evaluation"]["values"] for name in ("whole", "cut")]
    assert values[0] == values[1]


def test_other_rows_are_refused_on_resuming(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    recipe = table("classification", train__steps=2, epochs=None)
    assert finetune(recipe) == 0
    write(place / "rows.jsonl", rows_of("classification")[::-1])
    found, code = ratoon_fails(table("classification", train__steps=4, epochs=None), "--resume")
    assert "other data" in found and code != 0


# -- the frozen trunk --------------------------------------------------------------------------------------------------


def test_a_half_frozen_model_reads_its_trunk_and_learns_the_same(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    upper = {"kind": "lora", "rank": 2, "layers": [1]}
    told = {"train__log_every_steps": 1, "epochs": 3, "method": upper}
    assert finetune(table("classification", **told)) == 0
    assert "the first 1 blocks are frozen: computed once" in capsys.readouterr().err
    assert finetune(table("classification", name="plain", keep_trunk=False, **told)) == 0
    assert losses() == losses("plain")
    found = state()["trunk"]
    assert found["layers"] == 1 and found["rows_read"] > found["rows_computed"] > 0
    assert not Path("runs/tuned/trunk/0").exists(), "it is removed at the end"


# -- encoder-decoders --------------------------------------------------------------------------------------------------

NEW: dict[str, Any] = {
    "architecture": "encoder-decoder",
    "vocab_size": 300,
    "settings": {"encoder_layers": 1, "decoder_layers": 1, "width": 32, "heads": 2},
}


@pytest.mark.parametrize("kind", ["translation", "summarization"])
def test_an_encoder_decoder_from_nothing(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of(kind))
    recipe = table(kind, model=NEW, method={"kind": "full"}, train__log_every_steps=1, epochs=4)
    assert finetune(recipe) == 0
    said = capsys.readouterr().err
    assert "trained a tokenizer" in said and "a new encoder-decoder: 1 + 1 layers" in said
    found = state()
    assert found["status"] == "done" and found["evaluation"]["values"] and found["task"]["settings"]["as_source"]
    lm = load("tuned")
    assert isinstance(lm, Translator) and lm.tokenizer is not None and lm.tokenizer.vocab_size == 300
    assert losses()[-1] < losses()[0]
    # Going on reads the tokenizer that was trained, and does not train another.
    more = f"train.steps={found['steps'] + 1}"
    assert ratoon(["--debug", "finetune", "runs/tuned/recipe.yaml", more, "--resume"]) == 0
    said = capsys.readouterr().err
    assert "trained a tokenizer" not in said and f"going on from step {found['steps']}" in said


def test_an_encoder_decoder_with_a_tokenizer_that_is_named(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("translation"))
    model = {key: value for key, value in NEW.items() if key != "vocab_size"} | {"tokenizer": "base"}
    assert finetune(table("translation", model=model, method={"kind": "full"})) == 0
    assert load("tuned").tokenizer.hash == load("base").tokenizer.hash  # type: ignore[union-attr]


def test_frozen_encoder(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("translation"))
    method = {"kind": "full", "freeze": ["encoder.layers.*"]}
    assert finetune(table("translation", model=NEW, method=method)) == 0
    assert 0 < state()["model"]["trained"] < state()["model"]["parameters"]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"task": {"kind": "classification"}}, "an encoder-decoder writes a text for a source"),
        ({"task": {"kind": "translation", "as_source": False}}, "the encoder of an encoder-decoder reads the source"),
        ({"method": {"kind": "lora"}}, "the parts of lora on an encoder-decoder cannot be saved apart"),
        ({"noise": {"neftune_alpha": 1.0}}, "noise on embeddings"),
    ],
)
def test_what_does_not_go_with_an_encoder_decoder(changes: dict[str, Any], found: str, place: Path) -> None:
    write(place / "rows.jsonl", rows_of("translation"))
    said, code = ratoon_fails(table("translation", model=NEW) | {"method": {"kind": "full"}} | changes)
    assert found in said and code == 2


def test_a_base_has_no_encoder(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("translation"))
    said, code = ratoon_fails(table("translation", task__as_source=True))
    assert "no encoder to read a source" in said and code == 2


# -- pairs of answers --------------------------------------------------------------------------------------------------


def test_the_reference_is_asked_once_and_the_chosen_answers_win(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("preference"))
    recipe = table(
        "preference", epochs=12, train__log_every_steps=1, train__learning_rate=0.02, data__test_fraction=0.0
    )
    assert finetune(recipe) == 0
    found = losses()
    assert found[0] == pytest.approx(0.6931, abs=1e-3), "the margin begins at 0"
    assert found[-1] < 0.5
    assert Path("runs/tuned/reference.npz").is_file()


def test_the_settings_of_pairs_have_effect(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("preference"))
    ended = set()
    for name, task in {
        "plain": {}, "beta": {"beta": 0.5}, "smooth": {"label_smoothing": 0.2}, "ipo": {"loss": "ipo"},
    }.items():  # fmt: skip
        recipe = table("preference", name=name, epochs=3, train__log_every_steps=1, data__test_fraction=0.0)
        recipe["task"] |= task
        assert finetune(recipe) == 0
        ended.add(round(losses(name)[-1], 6))
    assert len(ended) == 4


# -- noise in the data -------------------------------------------------------------------------------------------------


def test_perturbed_copies_stand_beside_their_rows(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    recipe = table("classification", noise={"perturbed_copies": 2, "strength": 0.3})
    assert finetune(recipe, "--show", "60", "--json") == 0
    said = capsys.readouterr()
    shown = json.loads(said.out)["examples"]
    rows = [one["id"] for one in shown if "~" not in one["id"]]
    copies = [one["id"] for one in shown if "~" in one["id"]]
    text = {one["id"]: "".join(token["text"] for token in one["text"]) for one in shown}
    label = {one["id"]: one["text"][-1]["target"] for one in shown}
    assert len(copies) > len(rows) and all(text[copy] != text[copy.split("~")[0]] for copy in copies)
    assert all(label[copy] == label[copy.split("~")[0]] for copy in copies)
    unchanged = 2 * len(rows) - len(copies)
    assert f"{len(copies):,} perturbed copies of training records; {unchanged:,} came out unchanged" in said.err
    assert finetune(recipe) == 0


def test_copies_after_which_an_answer_may_be_wrong_are_refused(place: Path) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    with pytest.raises(ConfigError, match="'negation' may change what the right label is"):
        finetune(table("classification", noise={"perturbed_copies": 1, "perturb": ["negation"]}))
    write(place / "rows.jsonl", rows_of("tagging"))
    with pytest.raises(ConfigError, match="'drops' may change the number of words"):
        finetune(table("tagging", name="other", noise={"perturbed_copies": 1, "perturb": ["drops"]}))


# -- what is shown -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_show_prints_what_is_read_and_learned(kind: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of(kind))
    assert finetune(table(kind), "--show", "2", "--json") == 0
    examples = json.loads(capsys.readouterr().out)["examples"]
    assert len(examples) == 2 and not Path("runs").exists()
    for one in examples:
        assert one["place"].startswith("rows.jsonl:")
        row = rows_of(kind)[int(one["place"].split(":")[1]) - 1]
        learned = "".join(token["text"] for token in one["text"] if token["weight"] > 0)
        read = "".join(token["text"] for token in one["text"])
        if kind == "classification":
            assert row["text"] in read and [t["target"] for t in one["text"] if t["weight"] > 0] == [row["label"]]
        elif kind == "tagging":
            asked = [token["target"] for token in one["text"] if token["weight"] > 0]
            assert asked == row["tags"]
        elif kind == "translation":
            assert learned.startswith(row["zh"]) and row["en"] in read and row["en"] not in learned
        elif kind == "dialogue":
            answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
            assert all(answer in learned for answer in answers) and row["messages"][0]["content"] not in learned
        elif kind == "preference":
            rejected = "".join(token["text"] for token in one["beside"] if token["weight"] > 0)
            assert learned.startswith(row["chosen"]) and rejected.startswith(row["rejected"])
        elif kind == "extractive":
            asked = [token["text"] for token in one["text"] if token["weight"] > 0]
            assert asked and asked[0].strip() == row["answers"]["text"][0][0]
        assert learned


def test_show_colours_what_is_learned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of("classification"))
    assert finetune(table("classification"), "--show", "1") == 0
    out = capsys.readouterr().out
    assert ("1 learned" in out and "odd" in out) or "even" in out


def test_show_of_an_encoder_decoder(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(place / "rows.jsonl", rows_of("translation"))
    model = {key: value for key, value in NEW.items() if key != "vocab_size"} | {"tokenizer": "base"}
    recipe = table("translation", model=model, method={"kind": "full"})
    assert finetune(recipe, "--show", "1") == 0
    assert "what the encoder reads" in capsys.readouterr().out
    assert "trained with the run" in ratoon_fails(recipe | {"model": NEW}, "--show", "1")[0]
