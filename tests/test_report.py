"""The page of a run: what it says, that it says it whatever the run's end, and that nothing leaves the file."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import statistics
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ratoon import recipe as recipes
from ratoon.base.errors import ArtifactError, StorageError
from ratoon.base.seeds import stream
from ratoon.report import phrases, plots
from ratoon.report.page import write_page
from ratoon.report.phrases import PHRASES
from ratoon.report.records import CURVES, Records
from ratoon.store.runs import Run

STEPS = 420
VOCAB = 4096
HOSTILE = "<script>alert('x')</script><img src=http://evil.example/a.png onerror=alert(1)> & \"quoted\" '{{ 7*7 }}'"
PROMPTS = ("The following example", "Return a new string", "Raises ValueError if")
LEDGER = {
    "read": {"documents": 9120, "bytes": 2_214_887, "tokens": 601_204},
    "accounts": {
        "train": {"documents": 8301, "bytes": 2_001_004, "tokens": 543_117, "places": []},
        "held_out": {"documents": 437, "bytes": 105_411, "tokens": 28_621, "places": []},
        "duplicate": {
            "documents": 361,
            "bytes": 108_460,
            "tokens": 29_463,
            "places": [f"python-docs/topics.jsonl:{line}" for line in range(41, 1041, 50)],
        },
        "empty": {"documents": 21, "bytes": 12, "tokens": 3, "places": ["python-docs/docstrings.jsonl:7"]},
    },
    "notes": ["text is taken from the field 'text' of docstrings.jsonl"],
}


def loss_at(step: int) -> float:
    return 3.1 + 5.2 * math.exp(-step / 60)


def evaluation(step: int, n_tokens: int = 28_600) -> dict[str, Any]:
    loss = loss_at(step) + 0.05
    bits = loss * 28_184 / 105_411 / math.log(2)
    return {
        "loss": loss,
        "interval": [loss - 0.03, loss + 0.03],
        "perplexity": math.exp(loss),
        "perplexity_interval": [math.exp(loss - 0.03), math.exp(loss + 0.03)],
        "bits_per_byte": bits,
        "bits_per_byte_interval": [bits - 0.011, bits + 0.012],
        "interval_of": "documents",
        "n_tokens": n_tokens,
        "n_text_tokens": 28_184,
        "n_tokens_in_all": 28_622,
        "n_documents": 437,
        "n_bytes": 105_411,
        "signature": "ratoon 0.1.0, bfloat16, tokenizer 0123456789ab, text ba9876543210",
    }


def make_run(root: Path, *, steps: int = STEPS, every: int = 10, language: str = "en", **state: Any) -> Run:
    """A finished run with the records that the loop and the verb write, of plausible numbers."""
    run = Run.create("garden", root)
    noise = stream(1, "report test")
    marks = {round(steps * tenth / 10 / every) * every for tenth in range(11)}
    with open(run.metrics_path, "w", encoding="utf-8") as out:

        def put(step: int, kind: str, **facts: Any) -> None:
            record = {"step": step, "kind": kind, "time_seconds": step * 0.42, "tokens": step * 8192, **facts}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")

        for step in [0, 1, *range(every, steps + 1, every)]:
            if step:
                progress = step / max(1, steps)
                put(
                    step,
                    "train",
                    loss=loss_at(step) + 0.08 * float(noise.standard_normal()),
                    learning_rate=3e-3 * min(1.0, (1 - progress) / 0.6),
                    grad_norm=0.4 + 0.1 * float(noise.random()),
                    tokens_per_second=19_000 + 900 * float(noise.standard_normal()),
                    memory_bytes=int(6.1e8 + 4e7 * (1 - math.exp(-step / 40))),
                    progress=progress,
                )
            if step in marks:
                put(step, "eval", **evaluation(step))
            if step in (0, steps):
                for prompt in PROMPTS:
                    text = (
                        " of the string that is the same as the given one.\n\n    >>> s = 'a'"
                        if step
                        else " the the, xq"
                    )
                    put(step, "sample", prompt=prompt, text=text)
    (run.folder / "ledger.json").write_text(json.dumps(LEDGER), encoding="utf-8")
    recipe = {
        "name": "garden",
        "language": language,
        "seed": 1,
        "minutes": 3.0,
        "data": {"corpus": "python-docs", "vocab_size": VOCAB, "held_out_fraction": 0.05},
        "model": {"size": "small", "settings": {"layers": 6, "width": 256}},
        "train": {
            "rows": 32,
            "context_tokens": 256,
            "optimizer": "muon",
            "learning_rate": 0.003,
            "matrix_learning_rate": 0.02,
        },
        "samples": list(PROMPTS),
    }
    run.recipe_path.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    (run.folder / "log.txt").write_text(
        "2026-01-02 03:04:05 model: 6,815,744 parameters, 6 layers, 256 wide, family nanochat\n", encoding="utf-8"
    )
    facts: dict[str, Any] = {
        "name": "garden",
        "status": "done",
        "reason": None,
        "language": language,
        "machine": {
            "system": "Linux x86_64",
            "processor": "AMD EPYC 9R14",
            "cores": 2,
            "threads": 2,
            "memory_bytes": 16_480_919_552,
            "python": "3.11.2",
            "torch": "2.13.0+cpu",
        },
        "derived": [
            {"key": "model.size", "value": "small", "reason": "what learns most in 3 minutes on two cores"},
            {"key": "train.budget_minutes", "value": 3.0, "reason": "the dial `minutes`"},
            {"key": "train.context_tokens", "value": 256, "reason": "size small"},
        ],
        "model": {
            "parameters": 6_815_744,
            "family": "nanochat",
            "vocab_size": VOCAB,
            "layers": 6,
            "width": 256,
            "heads": 4,
            "context_tokens": 256,
        },
        "data": {
            "sources": ["python-docs"],
            "prepared": "runs/garden/data",
            "train_tokens": 543_117,
            "held_out_tokens": 28_621,
            "vocab_size": VOCAB,
        },
        "init": None,
        "passes": steps * 8192 / 543_117,
        "step": steps,
        "steps": steps,
        "tokens": steps * 8192,
        "seconds": steps * 0.42 + 4,
        "evaluation": evaluation(steps, 28_621),
        "next_commands": ['ratoon generate garden "The function" --temperature 0.8', "ratoon verify garden"],
    }
    run.write_state(**facts | state)
    return run


class Page(HTMLParser):
    """A page taken apart: texts by element id, sections, tags, attributes."""

    VOID = {"meta", "link", "img", "br", "path", "use"}
    INLINE = {"b", "i", "u", "span", "code", "small", "a"}

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self._open: list[tuple[str, str | None]] = []
        self.feed(html)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if tag not in self.INLINE:
            self.handle_data(" ")
        if tag not in self.VOID:
            self._open.append((tag, found.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
            self._open.pop()

    def handle_data(self, data: str) -> None:
        for _, name in [("", ""), *self._open]:
            if name is not None:
                self.texts[name] = self.texts.get(name, "") + data

    def text(self, name: str = "") -> str:
        """The text of the element with that id (of the whole page without one), white space as one blank."""
        return " ".join(self.texts.get(name, "").split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(run: Run, language: Any = "en") -> Page:
    return Page(write_page(run, language=language).read_text(encoding="utf-8"))


# -- what it says --------------------------------------------------------------------------------------------------


def test_the_figures_are_those_of_the_records(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found, final, start = page(run), evaluation(STEPS, 28_621), evaluation(0)
    result = found.text("result")
    for shown in (
        f"{final['loss']:.4f}",
        f"{final['interval'][0]:.4f} – {final['interval'][1]:.4f}",
        f"{final['perplexity']:.2f}",
        f"{final['perplexity_interval'][0]:.2f} – {final['perplexity_interval'][1]:.2f}",
        f"{final['bits_per_byte']:.4f}",
        f"{final['bits_per_byte_interval'][0]:.4f} – {final['bits_per_byte_interval'][1]:.4f}",
        "Measured on 28,621 of 28,622 held-out tokens, from 437 documents, 105,411 bytes.",
        "Measured as: ratoon 0.1.0, bfloat16, tokenizer 0123456789ab, text ba9876543210",
        f"Before training (step 0) {start['loss']:.4f} {start['perplexity']:,.2f} {start['bits_per_byte']:.4f} 28,600",
        f"Uniform guess over 4,096 tokens {math.log(VOCAB):.4f} 4,096.00 {math.log2(VOCAB) * 28_184 / 105_411:.4f} –",
    ):
        assert shown in result, shown
    records = [record for record in run.read_metrics() if record["kind"] == "train"]
    speeds = [record["tokens_per_second"] for record in records]
    assert f"{statistics.median(speeds):,.0f} tokens/s median, n = {len(records)}" in result
    assert f"{max(record['memory_bytes'] for record in records) / 1e6:.0f} MB highest, n = {len(records)}" in result
    assert "3 min 0 s" in result and f"{STEPS * 8192:,} steps: {STEPS}" in result
    lead = found.text()
    assert "A GPT with 6,815,744 parameters, trained from scratch on python-docs." in lead
    assert f"{STEPS * 8192:,} tokens ({STEPS * 8192 / 543_117:.1f} passes over the training part)" in lead


def test_the_parts_are_there(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    found = page(run)
    assert {"html", "head", "title", "main", "nav"} <= {tag for tag, _ in found.tags}
    assert found.texts["recipe-text"] == run.recipe_path.read_text(encoding="utf-8")
    assert found.text("command-1") == 'ratoon generate garden "The function" --temperature 0.8'
    assert found.text("command-2") == "ratoon verify garden"
    for prompt in PROMPTS:
        assert f"{prompt} the the, xq" in found.text("samples")
        assert f"{prompt} of the string that is the same as the given one. >>> s = 'a'" in found.text("samples")
    assert "model.size small what learns most in 3 minutes on two cores" in found.text("derived")
    assert "train.budget_minutes 3 the dial minutes" in found.text("derived")
    for fact in ("AMD EPYC 9R14", "16.5 GB", "2.13.0+cpu", "nanochat, 6 layers, 256 wide, 4 heads"):
        assert fact in found.text("machine")
    labels = [box["aria-label"] for box in found.of("div") if box.get("role") == "img"]
    assert len(labels) == 10, "five curves, each for wide and narrow windows"
    for title in ("Loss", "Learning rate", "Throughput", "Memory of the process", "Gradient norm"):
        assert any(label.startswith(f"{title} by step: from ") for label in labels)
    assert "best held-out: 3.1547 at step 420" in found.text("curves")
    assert f"uniform guess: {math.log(VOCAB):.4f}" in found.text("curves")
    links = [link["href"][1:] for link in found.of("a")]
    assert links == [section["id"] for section in found.of("section")], "the contents name the sections in order"


def test_the_ledger_visibly_adds_up(tmp_path: Path) -> None:
    text = page(make_run(tmp_path)).text("ledger")
    assert "Read 9,120 2,214,887 601,204" in text
    assert "Training part 8,301 2,001,004 543,117 90.34 %" in text
    assert "Held-out part 437 105,411 28,621 4.76 %" in text
    assert "Exact duplicates 361 108,460 29,463 4.90 %" in text
    assert "Sum of the accounts 9,120 2,214,887 601,204 ✓ The sum equals what was read." in text
    assert "python-docs/topics.jsonl:41 " in text and "python-docs/docstrings.jsonl:7" in text
    assert f"20 of 361 places are shown; all are in {Path('runs/garden/data/left_out.jsonl')}" in text


def test_a_ledger_that_is_off_is_called_off(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    ledger = json.loads(json.dumps(LEDGER))
    ledger["accounts"]["duplicate"]["tokens"] -= 1
    (run.folder / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
    text = page(run).text("ledger")
    assert "601,203 ✗ The sum differs from what was read" in text and "The sum equals" not in text


def test_the_best_model_is_told_from_the_last(tmp_path: Path) -> None:
    text = page(make_run(tmp_path, step=340)).text("result")
    assert "The model that was kept is that of step 340, the best on held-out text; the last step was 420." in text
    assert "The model of this run (step 340)" in text


def test_a_model_that_was_trained_further(tmp_path: Path) -> None:
    found = page(make_run(tmp_path, init="smollm2-135m-instruct"))
    assert "smollm2-135m-instruct, trained further on python-docs" in found.text()
    assert "The model it started from (step 0)" in found.text("result")


def test_samples_in_between_and_prompts_that_stand_twice(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=20)
    run.metrics_path.write_text("", encoding="utf-8")
    for step in (0, 10, 20):
        for text in ("first", "second"):
            run.append_metrics({"step": step, "kind": "sample", "prompt": "Say", "text": f" {text} {step}"})
    samples = Records.read(run).samples
    assert [one.texts for one in samples] == [
        ((0, f" {text} 0"), (10, f" {text} 10"), (20, f" {text} 20")) for text in ("first", "second")
    ]
    assert "In between (1) step 10 Say first 10" in page(run).text("samples")


# -- nothing leaves it, nothing breaks it --------------------------------------------------------------------------


def test_nothing_is_asked_of_the_network(tmp_path: Path) -> None:
    html = write_page(make_run(tmp_path)).read_text(encoding="utf-8")
    found = Page(html)
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            if name in {"src", "href", "action", "data", "poster", "srcset", "background", "xlink:href"}:
                assert value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
            assert "url(" not in value or "url(#" in value
    assert not {"img", "iframe", "object", "embed", "form", "base", "video", "audio"} & {tag for tag, _ in found.tags}
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert "//" not in re.sub(r"data:[^\"]*", "", html).replace("</", "<"), "an address stands in the page"
    policy = next(meta["content"] for meta in found.of("meta") if meta.get("http-equiv"))
    script = html[html.index("<script>") + 8 : html.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    run = make_run(
        tmp_path,
        name=HOSTILE,
        status="failed",
        reason=HOSTILE,
        machine={"processor": HOSTILE, HOSTILE: HOSTILE},
        derived=[{"key": HOSTILE, "value": HOSTILE, "reason": HOSTILE}],
        init=HOSTILE,
        data={"sources": [HOSTILE], "prepared": HOSTILE, "vocab_size": VOCAB},
        model={"parameters": 5, "family": HOSTILE},
    )
    place = {"documents": 2, "bytes": 1, "tokens": 1, "places": [HOSTILE]}
    ledger = {"read": {"documents": 2, "bytes": 1, "tokens": 1}, "accounts": {HOSTILE: place}, "notes": [HOSTILE]}
    (run.folder / "ledger.json").write_text(json.dumps(ledger), encoding="utf-8")
    run.recipe_path.write_text(f"samples:\n- {HOSTILE}\n", encoding="utf-8")
    (run.folder / "log.txt").write_text(HOSTILE, encoding="utf-8")
    for step in (0, 10, STEPS):
        run.append_metrics({"step": step, "kind": "sample", "prompt": HOSTILE, "text": HOSTILE})
    for language in ("en", "zh"):
        found = page(run, language)
        assert len(found.of("script")) == 1 and not found.of("img")
        assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]
        for part in ("samples", "ledger", "derived", "recipe", "machine"):
            assert " ".join(HOSTILE.split()) in found.text(part), part
        assert found.text().count(HOSTILE) > 20


def test_strange_characters_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    sample = {"step": STEPS, "kind": "sample", "prompt": "鸟\u200f", "text": "a\x00\x1b[31m\x7f\ud800b\tc\n"}
    with open(run.metrics_path, "a", encoding="utf-8") as out:
        out.write(json.dumps(sample) + "\n")
    text = page(run).text("samples")
    assert "鸟\u200f" in text and "a␀␛[31m␡?b c" in text


def test_ids_are_unique_and_references_resolve(tmp_path: Path) -> None:
    html = write_page(make_run(tmp_path)).read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", html)) | set(re.findall(r'aria-labelledby="([^"]+)"', html))
    assert wanted <= set(ids)


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert write_page(run).read_bytes() == write_page(run).read_bytes()


# -- a run in any state --------------------------------------------------------------------------------------------


def cut(run: Run, step: int) -> Run:
    """As the run would lie there had it ended after `step`."""
    run.rewind_metrics(step)
    state = run.read_state()
    for late in ("evaluation", "next_commands", "step", "steps", "tokens", "seconds", "passes"):
        state.pop(late)
    run.state_path.write_text(json.dumps(state), encoding="utf-8")
    return run


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("status", ["failed", "interrupted", "running"])
def test_a_run_that_did_not_end(tmp_path: Path, status: str, language: str) -> None:
    reason = None if status == "running" else "the loss became nan at step 200; the weights were not touched"
    run = cut(make_run(tmp_path, status=status, reason=reason), 200)
    found = page(run, language)
    said = {"en": 0, "zh": 1}[language]
    above = found.text()[: found.text().index(PHRASES["nats"][said])]
    assert PHRASES[f"banner_{status}"][said] in above
    assert reason is None or reason in above
    assert PHRASES["reached"][said].format(step=200, percent="48 %") in above
    assert found.text("resume") == f"ratoon pretrain {run.recipe_path} --resume" == found.text("command-1")
    latest = evaluation(170)
    assert PHRASES["row_latest"][said].format(step=170) in found.text("result")
    assert f"{latest['loss']:.4f}" in found.text("result")
    assert PHRASES["before"][said] in found.text("samples") and PHRASES["after"][said] not in found.text("samples")


def test_figures_of_an_earlier_end_are_not_those_of_a_resumed_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, status="interrupted", reason="stopped")
    run.rewind_metrics(200)
    records = Records.read(run)
    assert (records.final, records.steps, records.tokens, records.passes) == (None, 200, 200 * 8192, None)
    assert records.shown is not None and records.shown.step == 170


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    run = Run.create("new", tmp_path)
    run.write_state(name="new", status="running", reason=None)
    for language in ("en", "zh"):
        said = {"en": 0, "zh": 1}[language]
        found = page(run, language)
        for part, key in {
            "result": "no_evaluation", "curves": "none_yet", "samples": "none_yet", "ledger": "ledger_missing",
            "recipe": "recipe_missing", "machine": "machine_missing", "next": "none_yet",
        }.items():  # fmt: skip
            assert PHRASES[key][said] in found.text(part), part
        assert PHRASES["banner_running"][said] in found.text() and PHRASES["reached_nothing"][said] in found.text()
        assert not found.of("button")


def test_a_run_that_failed_before_there_was_a_model(tmp_path: Path) -> None:
    run = Run.create("new", tmp_path)
    run.write_state(name="new", status="failed", reason="nothing is left of 7 documents")
    found = page(run)
    assert "Reason: nothing is left of 7 documents" in found.text()
    assert "The run ended before a model was made." in found.text()


def test_a_run_without_a_step_is_not_praised(tmp_path: Path) -> None:
    run = make_run(tmp_path, steps=0, passes=0.0)
    assert "this model has learned nothing" in page(run).text()


def test_metrics_that_a_crash_cut(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    before = Records.read(run)
    whole = run.metrics_path.read_bytes()
    with open(run.metrics_path, "ab") as out:
        out.write(b'{"step": 430, "kind": "train", "lo\xff')
    after = Records.read(run)
    assert (before.torn, after.torn) == (0, 1) and before.metrics == after.metrics
    assert (
        "Lines of metrics.jsonl that could not be read (a crash cuts a line) and are left out: 1." in page(run).text()
    )
    run.metrics_path.write_bytes(whole[:-40])
    assert page(run).text("curves")


def test_records_of_another_shape_do_no_harm(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    for record in (
        {"step": 430, "kind": "train", "loss": math.nan, "grad_norm": None, "tokens_per_second": math.inf},
        {"step": 430, "kind": "eval", "loss": math.nan},
        {"step": 430, "kind": "eval", "loss": "low"},
        {"step": 430, "kind": "note", "text": "something"},
        {"step": None, "kind": "sample"},
        {},
    ):
        run.append_metrics(record)
    with open(run.metrics_path, "a", encoding="utf-8") as out:
        out.write("[1, 2]\n17\n")
    found = page(run)
    assert "not finite numbers and are not drawn: 3." in found.text()
    assert "are left out: 2." in found.text(), "a list and a number are no records"
    assert "nan" not in found.text("curves")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"read": 3}'])
def test_a_ledger_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    run = make_run(tmp_path)
    (run.folder / "ledger.json").write_text(text, encoding="utf-8")
    assert PHRASES["ledger_missing"][0] in page(run).text("ledger")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no run in this folder"):
        write_page(Run(tmp_path))
    (tmp_path / "manifest.json").write_text('{"sta', encoding="utf-8")
    with pytest.raises(ArtifactError, match="not readable"):
        write_page(Run(tmp_path))


def test_a_page_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path)
    old = write_page(run).read_bytes()
    run.write_state(status="failed")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError):
        write_page(run)
    monkeypatch.undo()
    assert run.report.read_bytes() == old
    assert not [path for path in run.folder.iterdir() if "partial" in path.name]


# -- curves --------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_the_envelope_keeps_every_extreme(values: list[float], buckets: int, data: st.DataObject) -> None:
    y = np.array(values)
    gaps = data.draw(st.lists(st.floats(0, 10), min_size=len(y), max_size=len(y)))
    x = np.cumsum(gaps)
    ex, ey = plots.envelope(x, y, buckets)
    assert len(ex) <= 2 * buckets + 2 and (np.diff(ex) >= 0).all()
    assert set(zip(ex, ey, strict=True)) <= set(zip(x, y, strict=True))
    assert (ey.min(), ey.max(), ey[0], ey[-1]) == (y.min(), y.max(), y[0], y[-1])
    if len(y) > 2 * buckets + 2 and x[-1] > x[0]:
        for bucket in range(buckets):
            inside = np.minimum((x - x[0]) / (x[-1] - x[0]) * buckets // 1, buckets - 1) == bucket
            if inside.any():
                kept = ey[np.isin(ex, x[inside])]
                assert y[inside].min() in kept and y[inside].max() in kept


def test_a_spike_of_one_step_among_thousands_is_drawn() -> None:
    x = np.arange(50_000.0)
    y = np.full(50_000, 3.0)
    y[31_337] = 7.0
    svg = plots.draw([plots.Curve(x, y)], plots.Frame(510, 230), key="a")
    line = next(path for path in re.findall(r'<path d="([^"]+)"[^>]*stroke: var\(--train\)', svg))
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] (\S+) (\S+)", line)]
    assert len(points) <= 2 * plots.BUCKETS + 2
    tops = [point for point in points if point[1] == min(point[1] for point in points)]
    assert len(tops) == 1
    share = (tops[0][0] - points[0][0]) / (points[-1][0] - points[0][0])
    assert share == pytest.approx(31_337 / 49_999, abs=1e-3)


def test_smoothing_is_the_mean_of_neighbours() -> None:
    y = stream(1, "smooth").standard_normal(37)
    for window in (1, 3, 9):
        expected = []
        for i in range(len(y)):
            reach = min(i, len(y) - 1 - i, window // 2)
            expected.append(y[i - reach : i + reach + 1].mean())
        np.testing.assert_allclose(plots.smooth(y, window), expected, atol=1e-12)
    assert plots.smooth(np.array([5.0]), 9) == [5.0]
    assert [plots.smoothing_window(count) % 2 for count in range(200)] == [1] * 200


def test_a_curve_far_above_the_rest_makes_the_axis_logarithmic(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "logarithmic axis" not in page(run).text("curves")
    run.append_metrics({"step": STEPS + 10, "kind": "train", "loss": 900.0})
    found = page(run)
    assert "logarithmic axis" in found.text("curves")
    assert any("highest 900.0." in box.get("aria-label", "") for box in found.of("div"))


def test_numbers_are_written_for_people() -> None:
    assert [phrases.size(n) for n in (0, 999, 1000, 650_000_000, 16_480_919_552)] == [
        "0\u00a0B", "999\u00a0B", "1.0\u00a0kB", "650\u00a0MB", "16.5\u00a0GB",
    ]  # fmt: skip
    assert [phrases.duration(s, "en").replace("\u00a0", " ") for s in (0.04, 59.94, 60, 3599.7, 7384)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "1 h 0 min", "2 h 3 min",
    ]  # fmt: skip
    assert [phrases.figure(v) for v in (0, 3.14159, 1234.56, 0.00123456, -2.5, 1e9)] == [
        "0", "3.142", "1,235", "0.001235", "-2.500", "1,000,000,000",
    ]  # fmt: skip
    assert [phrases.plain(v) for v in (None, True, 12345, 3.0, 0.003, 1e-8, "small")] == [
        "–", "true", "12,345", "3", "0.003", "1e-08", "small",
    ]  # fmt: skip
    assert [plots.number_label(v) for v in (0, 0.003, 2.5, 1500, 20_000, 1.25e6, 2e-5)] == [
        "0", "0.003", "2.5", "1,500", "20k", "1.25M", "2e-5",
    ]  # fmt: skip


# -- languages -----------------------------------------------------------------------------------------------------


def fields(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_everything() -> None:
    for key, (english, chinese) in PHRASES.items():
        assert english and (chinese or key == "gap"), key
        assert fields(english) == fields(chinese), key
        han = re.search(r"[\u4e00-\u9fff]", chinese)
        same = english == chinese or key in {"html_lang", "list_and", "gap", "unit_learning_rate"}
        assert han or same, f"{key} is not Chinese: {chinese}"
        assert not re.search(r"[\u4e00-\u9fff]", english), f"{key} is not English: {english}"


def test_no_phrase_is_unused() -> None:
    folder = Path(phrases.__file__).parent
    files = ("page.py", "curves.py", *(f"templates/{name}.html" for name in ("frame", "page", "run", "curves")))
    used = "".join((folder / name).read_text("utf-8") for name in files)
    used += (folder / "phrases.py").read_text("utf-8").split("def phrase")[1]
    families = ("h_", "m_", "account_", "status_", "banner_", "unit_", "row_")
    for key in PHRASES:
        assert f'"{key}"' in used or key in {name for name, _ in CURVES} or key.startswith(families), key
    for family in families:
        assert f'"{family}"' in used or family == "row_"


def test_sentences_from_the_records_are_translated() -> None:
    reasons = {
        one.reason
        for name in recipes.shipped()
        if "task" not in recipes.read_table(name)[0]
        for changes in ({}, {"minutes": 30}, {"train.steps": 7}, {"model.size": "tiny"})
        for one in recipes.settle(recipes.load(name, {} if name == "continue-smollm2" else changes)).derived
    }
    assert len(reasons) > 5
    for reason in reasons | {
        "stopped by the user; `ratoon pretrain x --resume` goes on",
        "not read, kind unknown: a.bin and 1,204 more of its kind",
        "text is taken from the field 'text' of a.jsonl",
        "one document only: its last part, from a.txt:9 on, is held out",
        "runs of 256 tokens",
    }:
        assert re.search(r"[\u4e00-\u9fff]", phrases.sentence(reason, "zh")), reason
        assert phrases.sentence(reason, "en") == reason
    assert phrases.sentence("something new", "zh") == "something new"


def test_the_chinese_page_speaks_chinese(tmp_path: Path) -> None:
    html = write_page(make_run(tmp_path, language="zh"), language="zh").read_text(encoding="utf-8")
    found = Page(html)
    assert found.of("html") == [{"lang": "zh-Hans"}]
    for english, _ in PHRASES.values():
        if not fields(english) and len(english) > 12:
            assert english not in found.text(), english
    assert "model.size small 在双核上 3 分钟内学得最多的规格" in found.text("derived")
    assert "文本取自 docstrings.jsonl 的字段 'text'" in found.text("ledger")
    assert "3 分 0 秒" in found.text("result")


def test_the_page_is_made_without_torch(tmp_path: Path) -> None:
    make_run(tmp_path)
    code = (
        "import sys; from ratoon.report.page import write_page; from ratoon.store.runs import Run; "
        f"write_page(Run({str(tmp_path / 'garden')!r})); assert 'torch' not in sys.modules, 'torch was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
