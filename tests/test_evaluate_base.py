"""The base beside a score: labels' likelihoods against a naive count, the same prompts where a model writes, and the
tasks that refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import little
from little_tasks import base, rows_of, table, write
from ratoon.base.errors import ArtifactError, DataError
from ratoon.cli.main import run as ratoon
from ratoon.cli.measure import task_of_model
from ratoon.evaluate.base_of_task import Labels, base_answers, sentence
from ratoon.evaluate.metrics.classification import classification
from ratoon.evaluate.score import LocalScorer
from ratoon.evaluate.task import evaluate_task
from ratoon.generate.lm import LanguageModel, load
from ratoon.tasks.registry import task_of
from ratoon.text.tokenizer import Tokenizer

LABELS = ("card", "card_arrival", "card_lost", "cash", "top_up_by_card", "x", "银行卡")
"""Names that begin alike, one that is the beginning of others, one of a single token, one of other letters."""
TEXTS = ("my card is gone", "a", "where is it? " * 5, "银行卡在哪里", "", "x y z")


@pytest.fixture
def place(with_base: Path) -> Path:
    return with_base


def tuned(kind: str, **changes: Any) -> None:
    write(Path("rows.jsonl"), rows_of(kind, 40))
    Path("recipe.yaml").write_text(yaml.safe_dump(table(kind, epochs=1, **changes)), encoding="utf-8")
    assert ratoon(["--debug", "finetune", "recipe.yaml"]) == 0


def measured(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert ratoon(["--debug", "evaluate", "tuned", "--base", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def labelled(texts: tuple[str, ...] = TEXTS, labels: tuple[str, ...] = LABELS) -> tuple[Any, list[Any]]:
    """A classification with these labels, and records of it."""
    task: Any = task_of({"kind": "classification"})
    task.labels = labels
    rows = [{"text": text or "-", "label": labels[at % len(labels)]} for at, text in enumerate(texts)]
    return task, [task.record(row, f"f:{at}") for at, row in enumerate(rows)]


# -- the likelihood of labels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"positions": "learned"}, {"windows": (8, None)}], ids=str)
@pytest.mark.parametrize("batch_tokens", [1 << 13, 150, 1])
def test_labels_are_as_likely_as_one_by_one(
    changes: dict[str, Any], batch_tokens: int, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    """Prompts of unequal length read together, their keys and values used for every label, against each pair of prompt
    and label read alone."""
    from ratoon.evaluate import base_of_task

    monkeypatch.setattr(base_of_task, "BATCH_TOKENS", batch_tokens)
    tokenizer = Tokenizer.bytes_only()
    made = little.model(3, vocab_size=tokenizer.vocab_size, context_tokens=160, **changes)
    lm = LanguageModel(made, tokenizer)
    task, records = labelled()
    asked = Labels(lm, task, "en")
    found_NK = asked.scores([asked.prompt(record, "refuse")[0] for record in records])
    scorer = LocalScorer(lm)
    for record, row_K in zip(records, found_NK, strict=True):
        pairs = [(f"{record.text}\nLabel:", f" {label.replace('_', ' ')}") for label in LABELS]
        wanted = [one.logprob / one.n_tokens for one in scorer.loglikelihood(pairs)]
        assert row_K.tolist() == pytest.approx(wanted, abs=1e-5)
    answers = asked.answers(records, "refuse")
    assert [one.answer for one in answers] == [LABELS[int(row_K.argmax())] for row_K in found_NK]


def test_what_stands_before_a_label_and_what_is_cut(one_thread: None) -> None:
    tokenizer = Tokenizer.bytes_only()
    lm = LanguageModel(little.model(3, vocab_size=tokenizer.vocab_size, context_tokens=64), tokenizer)
    task, records = labelled(("short", "0123456789" * 9))
    longest = len(" top up by card")
    english, chinese = Labels(lm, task, "en"), Labels(lm, task, "zh")
    assert tokenizer.decode(english.prompt(records[0], "refuse")[0]) == "short\nLabel:"
    assert tokenizer.decode(chinese.prompt(records[0], "refuse")[0]) == "short\n标签："
    assert tokenizer.decode(english.ids[1]) == " card arrival" and tokenizer.decode(chinese.ids[1]) == "card arrival"
    kept, cut = english.prompt(records[1], "cut-left")
    text = tokenizer.decode(kept)
    assert (
        text.endswith("789\nLabel:") and len(kept) + longest - 1 == 64 and len(kept) + cut == 1 + 90 + len("\nLabel:")
    )
    assert tokenizer.decode(english.prompt(records[1], "cut-right")[0]).startswith("012345")
    with pytest.raises(DataError, match="98 tokens"):
        english.prompt(records[1], "refuse")
    assert [one.cut_tokens for one in english.answers(records, "cut-left")] == [0, cut]
    task, records = labelled(("text",), ("a" * 70, "b"))
    with pytest.raises(DataError, match="tokens"):
        Labels(lm, task, "en").prompt(records[0], "cut-left")
    task.labels = ("", "a")
    with pytest.raises(DataError, match="has no token"):
        Labels(lm, task, "zh")
    lm.virtual_tokens = 3
    with pytest.raises(ArtifactError, match="no base"):
        english.scores([[1, 2]])


def test_a_label_that_was_learned_is_the_likeliest(one_thread: None) -> None:
    """A model that was taught to write the label behind the text answers with it, of three with a shared beginning."""
    tokenizer = Tokenizer.bytes_only()
    made = little.model(5, vocab_size=tokenizer.vocab_size)
    task, records = labelled(("red one", "blue two"), ("top_up", "top_down", "none"))
    rows = [tokenizer.encode(f"{one.text}\nLabel: {label.replace('_', ' ')}")
            for one, label in zip(records, ("top_down", "none"), strict=True)]  # fmt: skip
    optimizer = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(60):
        losses = [
            torch.nn.functional.cross_entropy(made.logits(made(torch.tensor([row[:-1]])))[0], torch.tensor(row[1:]))
            for row in rows
        ]
        optimizer.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        optimizer.step()
    made.requires_grad_(False)
    found, how = base_answers(LanguageModel(made, tokenizer), task, records, language="en", policy="refuse")
    assert [one.answer for one in found] == ["top_down", "none"]
    assert "highest mean log-likelihood per token" in how and "{text}\\nLabel:" in how


# -- the verb ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classification", "pairs"])
@pytest.mark.parametrize("method", [{"kind": "lora", "rank": 2}, {"kind": "full"}, {"kind": "prompt", "tokens": 3}])
def test_a_base_without_a_head_is_asked_for_the_label(
    kind: str, method: dict[str, Any], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(kind, method=method)
    found = measured(capsys)
    beside = found["base"]
    assert beside["name"] == "base" and "log-likelihood" in beside["what"] and beside["cut_tokens"] == 0
    lm, own = load("base"), load("tuned")
    task = task_of_model(own)
    parts = [json.loads(line) for line in
             (place / "runs/tuned/evaluation/predictions.jsonl").read_text(encoding="utf-8").splitlines()]  # fmt: skip
    scorer, right = LocalScorer(lm), 0
    for row in parts:
        pairs = [(f"{row['input']}\nLabel:", f" {label}") for label in task.labels]  # type: ignore[attr-defined]
        scores = [one.logprob / one.n_tokens for one in scorer.loglikelihood(pairs)]
        right += task.labels[scores.index(max(scores))] == row["expected"]  # type: ignore[attr-defined]
    assert beside["values"][0]["name"] == "accuracy"
    assert beside["values"][0]["value"] == pytest.approx(right / len(parts))
    assert beside["paired"]["difference"] == pytest.approx(found["values"][0]["value"] - right / len(parts))
    assert beside["paired"]["n"] == found["n"]


@pytest.mark.parametrize(
    "kind", ["generation", "dialogue", "translation", "summarization", "question-answering", "preference"]
)
def test_where_a_model_writes_its_base_answers_the_same_prompts(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(kind)
    found = measured(capsys)
    from ratoon.data.records import read_parts
    from ratoon.recipe.tuning import load_tuning
    from ratoon.train.device import fast_dtype

    recipe, task = load_tuning("runs/tuned/recipe.yaml"), task_of_model(load("tuned"))
    parts = read_parts(task, recipe.data, seed=recipe.seed)
    base = load("base", dtype=fast_dtype())
    alone = evaluate_task(base, task, parts.test, language="en", too_long=recipe.data.too_long)
    assert found["base"]["values"] == [one.as_dict() for one in alone.measured.values]
    if kind in ("generation", "dialogue"):  # the whole text is measured: training moved it
        assert found["base"]["values"][0]["value"] != found["values"][0]["value"]
        assert "the same tokens" in found["base"]["what"]


def test_it_stands_in_the_table_the_page_and_the_sentence(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification")
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--base"]) == 0
    said = capsys.readouterr()
    assert "Its base" in said.out and "untrained, the label of" in said.out
    assert " its base, base (untrained" in said.err
    kept = json.loads((place / "runs/tuned/evaluation/evaluation.json").read_text(encoding="utf-8"))
    value = f"{kept['base']['values'][0]['value']:.4f}"
    page = (place / "runs/tuned/evaluation/report.html").read_text(encoding="utf-8")
    section = page.split('<section id="base"')[1].split("</section>")[0]
    assert value in said.out and value in section
    assert ratoon(["evaluate", "tuned"]) == 0
    said = capsys.readouterr()
    assert "Its base" not in said.out and "its base" not in said.err


@pytest.mark.parametrize("kind", ["tagging", "extractive", "scoring", "pair-scoring", "multi-label"])
def test_tasks_that_a_base_cannot_answer_say_what_to_do(
    kind: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned(kind)
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--base"]) == 2
    said = capsys.readouterr().err
    assert f"answers no {kind} without a head" in said and "method.kind=full method.freeze_layers=2" in said
    # What it says to do works: a head alone on the frozen base, and the run against it.
    arguments = ["name=head", "method.kind=full", "method.freeze_layers=2"]
    assert ratoon(["finetune", "recipe.yaml", *arguments]) == 0
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--against", "head", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["against"][0]["model"] == "head"


def test_an_encoder_decoder_has_no_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = {"architecture": "encoder-decoder", "vocab_size": 300,
             "settings": {"encoder_layers": 1, "decoder_layers": 1, "width": 32, "heads": 2}}  # fmt: skip
    tuned("translation", model=model, method={"kind": "full"})
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--base"]) == 2
    assert "began with random weights: it has no base" in capsys.readouterr().err


def test_a_base_that_is_another_one_now_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", method={"kind": "full"})
    shutil.rmtree("base")
    base(Path("base"), seed=9)
    capsys.readouterr()
    assert ratoon(["evaluate", "tuned", "--base"]) == ArtifactError.exit_code
    assert "trained from another base than 'base' is now" in capsys.readouterr().err


def test_a_base_that_was_fine_tuned_itself_answers_by_its_head(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tuned("classification", name="first", method={"kind": "full"}, train__learning_rate=0.02)
    tuned("classification", method={"kind": "full"}, model={"base": "first"}, train__learning_rate=1e-9)
    found = measured(capsys)
    assert found["base"]["name"] == "first" and "head of its own" in found["base"]["what"]
    assert found["base"]["values"][0] == found["values"][0], "nothing was learned since"
    assert "calibration_error" in {one["name"] for one in found["base"]["values"]}


@pytest.mark.parametrize(
    ("options", "words"),
    [(["rows.jsonl", "--unlabelled"], "--base needs answers"), (["--pairs", "p.jsonl"], "no effect with --pairs")],
)
def test_where_it_has_no_effect(
    options: list[str], words: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned("classification")
    assert ratoon(["evaluate", "tuned", "--base", *options]) == 2
    assert words in capsys.readouterr().err
    write(place / "a.jsonl", [{"text": "a text of some words"}])
    assert ratoon(["evaluate", "base", "a.jsonl", "--base"]) == 2
    assert "was not fine-tuned for a task" in capsys.readouterr().err


def test_the_sentence_says_who_is_ahead() -> None:
    measured_as = classification(["a", "b"] * 20, ["a", "b"] * 15 + ["b", "a"] * 5, ["a", "b"], resamples=50)
    told = {"name": "base", "what": "w", "values": [{"value": 0.5}]}

    def said(low: float | None, high: float | None) -> str:
        interval = None if low is None else [low, high]
        return sentence(measured_as, told | {"paired": {"difference": 0.25, "interval": interval}})

    assert "beats its base, base (w): accuracy 0.7500 against 0.5000, difference +0.2500" in said(0.1, 0.4)
    assert "does NOT beat its base" in said(-0.4, -0.1) and "cannot be told from its base" in said(-0.1, 0.4)
    assert "undefined" in said(None, None)
