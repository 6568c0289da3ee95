"""The page and the terminal's tables of a measured task: what they say is what was measured, in a real browser too.

The evaluations are those of `made_evaluations.py`.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_evaluations import FEW, HOSTILE, MAKERS, Lines, make_classification
from ratoon.base.errors import ArtifactError
from ratoon.base.seeds import stream
from ratoon.cli.measure import write_report
from ratoon.cli.task_table import show_task
from ratoon.evaluate.metrics import tagging as tagging_metrics
from ratoon.evaluate.metrics.answers import answers
from ratoon.evaluate.metrics.classification import classification
from ratoon.evaluate.metrics.likelihood import perplexity
from ratoon.evaluate.metrics.numbers import scores
from ratoon.evaluate.task import Prediction, TaskReport, measure
from ratoon.report import task_notes, task_phrases, task_rows
from ratoon.report.phrases import PHRASES as SHARED
from ratoon.report.task_page import render_task, write_task_page
from ratoon.report.task_records import Evaluation
from ratoon.tasks.registry import task_of
from test_report_browser import CHROMIUM, CONTRAST, Browser

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (RATOON_CHROMIUM names one)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An evaluation of each kind."""
    root = tmp_path_factory.mktemp("evaluations")
    return {name: maker(root / name) for name, (maker, _) in MAKERS.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "evaluation.json").read_text("utf-8"))
    return found


def lines_of(folder: Path) -> Lines:
    return [json.loads(one) for one in (folder / "predictions.jsonl").read_text("utf-8").splitlines()]


def choose(browser: Browser, field: str, value: str) -> None:
    """Set a filter as a person does."""
    browser.run(
        f"(f => {{ f.value = {json.dumps(value)}; f.dispatchEvent(new Event('input', {{bubbles: true}})); }})"
        f"(document.getElementById('{field}'))"
    )


def listed(browser: Browser) -> list[str]:
    """Where the records shown stand in their file."""
    found: list[str] = browser.run("[...document.querySelectorAll('#list .place code')].map(c => c.textContent)")
    return found


# -- the page in a browser ---------------------------------------------------------------------------------------------


@in_browser
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", MAKERS)
def test_it_renders_without_a_complaint_fits_a_telephone_and_asks_for_nothing(
    browser: Browser, folders: dict[str, Path], name: str, language: Any
) -> None:
    page = write_task_page(folders[name], language=language)
    browser.open(page, width=390)
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= 390
    assert browser.run("document.querySelectorAll('#list > .record').length") == MAKERS[name][1]
    assert browser.run("document.querySelector('.big').textContent") == task_phrases.shown(
        facts(folders[name])["values"][0]["value"]
    )
    places = browser.run("[...document.querySelectorAll('nav a')].map(a => !!document.querySelector(a.hash))")
    assert places and all(places)
    letters = browser.run(
        "Math.min(99, ...[...document.querySelectorAll('.plot svg text')].map(t => t.getBoundingClientRect().height)"
        ".filter(h => h))"
    )
    assert letters > 9, "pixels: the numbers at the axes can be read"
    words = re.sub(r"<script.*?</script>|<style.*?</style>|title=\"[^\"]*\"", "", page.read_text("utf-8"), flags=re.S)
    assert not re.search(r"\bNone\b|\bnan\b|Undefined", words)


@in_browser
def test_what_stands_in_records_and_facts_is_text(browser: Browser, folders: dict[str, Path]) -> None:
    page = write_task_page(folders["classification"])
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]
    assert browser.run("document.scripts.length") == 2 and browser.run("document.images.length") == 0
    choose(browser, "f-show", "all")
    choose(browser, "f-search", "</script><script>")
    found = browser.run("[...document.querySelectorAll('#list .text')].map(t => t.textContent)")
    assert f"{HOSTILE} number 0" in found and "test.csv:2" in listed(browser)
    for part in ("base", "floors", "compare", "robust", "accounts", "classes", "confusion"):
        seen = browser.run(f"document.getElementById('{part}').textContent")
        assert "</script><script>alert" in seen, part
    assert browser.complaints() == []


@in_browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("name", ["classification", "tagging", "answers", "numbers", "preference"])
def test_every_text_can_be_read_in_light_and_dark(
    browser: Browser, folders: dict[str, Path], name: str, dark: bool
) -> None:
    browser.open(write_task_page(folders[name]), dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    mixed = "const parse = c => { if (c.startsWith('color(')) return c.match(/[\\d.]+/g).map(v => 255 * v).concat(1);"
    script = CONTRAST.replace("const parse = c => {", mixed, 1)
    assert script != CONTRAST
    # What is crossed out of the cells is their shade: the strongest of all must bear its number as well.
    browser.run("document.querySelectorAll('.matrix td[style]').forEach(c => c.style.setProperty('--s', 1))")
    assert browser.run(script) == [], "below the 4.5 to 1 of WCAG 2.2, 1.4.3"


@in_browser
def test_records_are_searched_filtered_and_sorted(browser: Browser, folders: dict[str, Path]) -> None:
    lines = lines_of(folders["classification"])
    browser.open(write_task_page(folders["classification"]))
    wrong = [one for one in lines if one["expected"] != one["answer"]]
    by_sure = sorted(wrong, key=lambda one: -max(one["probabilities"]))
    assert listed(browser) == [one["place"] for one in by_sure[:25]]
    assert browser.run("document.getElementById('found').textContent") == f"{len(wrong)} of 400 records"
    browser.run("document.getElementById('more').click()")
    assert len(listed(browser)) == min(50, len(wrong))
    choose(browser, "f-sort", "sort_unsure")
    assert listed(browser) == [one["place"] for one in by_sure[::-1][:25]]
    choose(browser, "f-expected", f"={wrong[0]['expected']}")
    same = [one["place"] for one in wrong if one["expected"] == wrong[0]["expected"]]
    assert sorted(listed(browser)) == sorted(same)
    choose(browser, "f-answer", f"={wrong[0]['answer']}")
    both = [
        one["place"] for one in wrong if (one["expected"], one["answer"]) == (wrong[0]["expected"], wrong[0]["answer"])
    ]
    assert sorted(listed(browser)) == sorted(both)
    browser.run("document.getElementById('filters').reset(); new Promise(done => setTimeout(done, 30))")
    choose(browser, "f-show", "right")
    choose(browser, "f-search", "NUMBER 39")
    right = [one["place"] for one in lines if one["expected"] == one["answer"] and "number 39" in one["input"]]
    assert right and sorted(listed(browser)) == sorted(right)
    choose(browser, "f-search", "nothing is like this")
    assert listed(browser) == [] and "No record" in browser.run("document.getElementById('found').textContent")


@in_browser
def test_a_confusion_leads_to_its_records(browser: Browser, folders: dict[str, Path]) -> None:
    lines = lines_of(folders["classification"])
    browser.open(write_task_page(folders["classification"]))
    wrong = Counter((one["expected"], one["answer"]) for one in lines if one["expected"] != one["answer"])
    kinds = Counter(expected for expected, _ in wrong)
    expected, answer = next(pair for pair in wrong if kinds[pair[0]] > 1 and "intent" in "".join(pair))
    button = f"document.querySelector('[data-expected={json.dumps(expected)}][data-answer={json.dumps(answer)}]')"
    pair = browser.run(
        f"[{button}.dataset.expected, {button}.dataset.answer, +{button}.closest('tr').cells[2].textContent]"
    )
    browser.run(f"{button}.click(); new Promise(done => setTimeout(done, 30))")
    places = [one["place"] for one in lines if [one["expected"], one["answer"]] == pair[:2]]
    assert len(places) == pair[2] and sorted(listed(browser)) == sorted(places)


@in_browser
def test_entities_are_marked_on_their_words_and_what_differs_is_framed(
    browser: Browser, folders: dict[str, Path]
) -> None:
    browser.open(write_task_page(folders["tagging"]))
    choose(browser, "f-show", "all")
    choose(browser, "f-sort", "sort_file")
    browser.run("while (!document.getElementById('more').hidden) document.getElementById('more').click()")
    found = browser.run(
        "[...document.querySelectorAll('#list .record')].map(r => [...r.querySelectorAll('.tagged')].map(t =>"
        " [...t.querySelectorAll('mark')].map(m => [m.firstChild.textContent, m.classList.contains('odd')])))"
    )
    sentences = browser.run(
        "[...document.querySelectorAll('#list .record')].map(r => {"
        " const t = r.querySelector('.tagged').cloneNode(true);"
        " t.querySelectorAll('small').forEach(s => s.remove()); return t.textContent; })"
    )
    lines = lines_of(folders["tagging"])
    assert sentences == [one["input"] for one in lines]
    for one, seen in zip(lines, found, strict=True):
        joined = " " if " " in one["input"] else ""
        words = one["input"].split(" ") if joined else list(one["input"])
        sides = [tagging_metrics.spans(one[key]) for key in ("expected", "answer")]
        marked = [
            [[joined.join(words[a:b]), span not in other] for span in side for _, a, b in [span]]
            for side, other in zip(sides, sides[::-1], strict=True)
        ]
        assert seen == (marked if sides[0] != sides[1] else marked[1:])


@in_browser
def test_sentences_of_most_wrong_entities_come_first(browser: Browser, folders: dict[str, Path]) -> None:
    browser.open(write_task_page(folders["tagging"]))
    off = {}
    for one in lines_of(folders["tagging"]):
        there, found = (set(tagging_metrics.spans(one[key])) for key in ("expected", "answer"))
        off[one["place"]] = len(there - found) + len(found - there)
    seen = [off[place] for place in listed(browser)]
    assert len(set(seen)) > 1 and seen == sorted((count for count in off.values() if count), reverse=True)[:25]


@in_browser
def test_long_texts_are_folded_and_open(browser: Browser, folders: dict[str, Path]) -> None:
    browser.open(write_task_page(folders["answers"]))
    high = "document.querySelector('#list .text').getBoundingClientRect().height"
    folded = browser.run(high)
    browser.run("document.querySelector('#list .fold').click()")
    assert browser.run(high) > 1.5 * folded
    browser.run("document.querySelector('#list .fold').click()")
    assert browser.run(high) == folded
    columns = browser.run(
        "[...document.querySelectorAll('#list .record:first-child .three > div')]"
        ".map(d => d.getBoundingClientRect().top)"
    )
    assert len(columns) == 3 and len(set(columns)) == 1, "input, references and answer side by side"
    assert (
        browser.run("document.querySelectorAll('#list .record:first-child .three > div:nth-child(2) .text').length")
        == 2
    )


@in_browser
def test_it_can_be_read_without_its_script(browser: Browser, folders: dict[str, Path]) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(write_task_page(folders["classification"]))
        text = json.dumps(browser.call("DOM.getDocument", depth=-1)["root"])
        assert "need JavaScript" in text and "intent_03" in text and browser.complaints() == []
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_no_tag_can_begin_in_the_data_of_the_script(folders: dict[str, Path]) -> None:
    page = write_task_page(folders["classification"]).read_text("utf-8")
    data = page.split('<script type="application/json" id="rows">')[1].split("</script>")[0]
    assert "<" not in data and json.loads(data)["rows"][0]["input"] == f"{HOSTILE} number 0"


# -- what is said ------------------------------------------------------------------------------------------------------


def test_every_figure_and_signature_stands_on_the_page(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        page = write_task_page(folder).read_text("utf-8")
        for one in facts(folder)["values"]:
            assert task_phrases.shown(one["value"]) in page
            assert one["signature"].replace("'", "&#39;") in page
            assert task_phrases.figure_name(one["name"], "en").replace("'", "&#39;") in page


def judged(ours: float, theirs: float, *, higher: bool = True, paired: Any = None) -> tuple[str, str]:
    name = "accuracy" if higher else "rmse"
    value = {"name": name, "value": ours, "n": 9, "higher_is_better": higher}
    floors = [
        {"name": "dumb", "values": [{**value, "value": theirs + (-0.2 if higher else 0.2)}], "seconds": 0.1},
        {"name": "svm", "values": [{**value, "value": theirs}], "seconds": 1.5, "paired": paired},
    ]
    found = Evaluation.of({"task": "t", "measure": "m", "n": 9, "values": [value], "floors": floors})
    assert [one.name for one in found.floors] == ["svm", "dumb"]
    said = task_phrases.verdict(found, "en")
    assert said is not None
    return said


def test_a_model_that_does_not_beat_its_best_floor_says_so() -> None:
    assert judged(0.9, 0.8) == (
        "good",
        "The model beats the best floor, svm, by 0.1000: Accuracy 0.9000 against 0.8000.",
    )
    assert judged(0.8, 0.9) == (
        "bad",
        "The model does NOT beat the best floor: svm reaches Accuracy 0.9000 in 1.5\u00a0s, the model 0.8000.",
    )
    assert judged(0.8, 0.8)[0] == "bad"
    assert judged(0.5, 0.7, higher=False)[0] == "good" and judged(0.7, 0.5, higher=False)[0] == "bad"
    kind, said = judged(0.9, 0.89, paired={"difference": 0.01, "interval": [-0.02, 0.03], "p_value": 0.4})
    assert kind == "warn" and "NOT surely" in said and "−0.0200 to +0.0300" in said
    kind, said = judged(0.89, 0.9, paired={"difference": -0.01, "interval": [-0.03, 0.02], "p_value": 0.4})
    assert kind == "warn" and "NOT surely" in said
    assert judged(0.9, 0.8, paired={"difference": 0.1, "interval": [0.05, 0.2], "p_value": 0.01})[0] == "good"
    assert judged(0.8, 0.9, paired={"difference": -0.1, "interval": [-0.2, -0.05], "p_value": 0.01})[0] == "bad"


def test_the_bad_verdict_stands_at_the_top_of_page_and_below_the_tables(tmp_path: Path) -> None:
    folder = make_classification(tmp_path / "c")
    found = facts(folder)
    found["floors"][0]["values"][0]["value"] = 0.999
    del found["floors"][0]["paired"]
    (folder / "evaluation.json").write_text(json.dumps(found), "utf-8")
    page = write_task_page(folder).read_text("utf-8")
    assert page.index("does NOT beat") < page.index("<nav")
    assert "does NOT beat" in show_task(found, width=300).splitlines()[-1]


def test_copies_of_training_are_told_with_and_without(folders: dict[str, Path]) -> None:
    found = facts(folders["classification"])
    page = render_task(Evaluation.of(found), "en")
    assert "3</b> of these records also stand in training" in page
    assert task_phrases.shown(found["without_copies"][0]["value"]) in page
    everything = render_task(Evaluation.of({**found, "without_copies": None}), "en")
    assert "All <b>3</b> records also stand in training" in everything


def test_curves_in_both_forms_are_the_same(folders: dict[str, Path]) -> None:
    found = facts(folders["classification"])
    points = found["robust"]["curves"][1]["points"]
    for robust in ({"curves": {"case": points}}, {"curves": [{"name": "case", "points": points}]}):
        (curve,) = Evaluation.of({**found, "robust": robust}).curves
        assert [(one.strength, one.value) for one in curve.points] == [
            (one["strength"], one["value"]) for one in points
        ]
        assert curve.drop == pytest.approx(0.4)
    assert [one.name for one in Evaluation.of(found).curves] == ["case", "typos"], "the one that falls most comes first"


def test_a_ledger_that_is_off_is_told(folders: dict[str, Path]) -> None:
    found = facts(folders["classification"])
    (account,) = Evaluation.of(found).accounts
    assert account.part == "train" and not account.adds_up, "its tokens are one too many"
    assert "differs from what was read" in render_task(Evaluation.of(found), "en") and "differs" in show_task(found)
    found["ledger"]["parts"]["train"]["tokens"]["trained"] = 4
    found["ledger"]["parts"]["train"]["rows"]["read"] = found["ledger"]["parts"]["train"]["tokens"]["read"] = 9
    assert Evaluation.of(found).accounts[0].adds_up and "differs" not in show_task(found)


def test_records_without_answers_are_shown_and_nothing_is_claimed(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"task": "classification", "measure": "classification", "n": 2, "values": []}), "utf-8"
    )
    line = {"id": "1", "place": "t:1", "input": "x", "expected": None, "answer": "a", "probabilities": [0.5, 0.5]}
    (tmp_path / "predictions.jsonl").write_text(json.dumps(line) + "\n{torn\n", "utf-8")
    page = write_task_page(tmp_path).read_text("utf-8")
    assert "Nothing was measured" in page and "could not be read and are left out: 1." in page
    assert "Nothing was measured" in show_task(facts(tmp_path))
    found = task_rows.browser(Evaluation.read(tmp_path))
    assert found is not None and not found.judged and "wrong" not in found.rows[0]


def test_what_is_no_evaluation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no evaluation here"):
        write_task_page(tmp_path)
    for text, said in (("{", "cannot be read"), ("[]", "no evaluation of a task"), ('{"values": 3}', "no evaluation")):
        (tmp_path / "evaluation.json").write_text(text, "utf-8")
        with pytest.raises(ArtifactError, match=said):
            write_task_page(tmp_path)


def test_without_predictions_the_figures_stand(folders: dict[str, Path]) -> None:
    page = render_task(Evaluation.of(facts(folders["numbers"])), "en")
    assert "No predictions are on record" in page and 'id="rows"' not in page


# -- rows --------------------------------------------------------------------------------------------------------------


def test_entities_are_read_as_the_metric_reads_them() -> None:
    random = stream(6, "spans")
    for _ in range(300):
        tags = random.choice(["O", "B-A", "I-A", "B-B", "I-B"], size=9).tolist()
        expected = [(began, ended, kind) for kind, began, ended in tagging_metrics.spans(tags)]
        assert task_rows.spans(tags) == expected


@pytest.mark.parametrize(
    ("line", "words", "joined"),
    [
        ({"input": "a b c"}, ["a", "b", "c"], " "),
        ({"input": "北京好"}, ["北", "京", "好"], ""),
        ({"input": "New York|is|big", "words": ["New York", "is", "big"]}, ["New York", "is", "big"], ""),
        ({"input": "two words"}, [], ""),
    ],
)
def test_the_words_that_tags_stand_on(line: dict[str, Any], words: list[str], joined: str) -> None:
    assert task_rows._words(line, 3) == (words, joined)


def test_lines_say_what_each_record_came_to_and_the_words_of_tags(tmp_path: Path) -> None:
    """Words of several characters with nothing between them cannot be found in the text again."""
    task = task_of({"kind": "tagging", "join": ""})
    rows = [{"words": ["北京", "很", "大"], "tags": ["B-LOC", "O", "O"]}, {"words": ["好"], "tags": ["O"]}]
    records = [task.record(row, f"f:{number}") for number, row in enumerate(rows)]
    task.settle(records)
    predictions = [Prediction(one, ("O",) * len(one.words)) for one in records]
    write_report(tmp_path, TaskReport(task, predictions, measure(task, predictions, "zh", **FEW)))
    first, second = lines_of(tmp_path)
    assert first["words"] == rows[0]["words"] and first["scores"] == {"entity_f1": 0.0, "token_accuracy": 0.666667}
    assert second["scores"] == {"entity_f1": 1.0, "token_accuracy": 1.0}
    found = task_rows.browser(Evaluation.read(tmp_path))
    assert (
        found is not None and found.rows[0]["words"] == rows[0]["words"] and found.rows[0]["there"] == [(0, 1, "LOC")]
    )


def test_of_many_records_errors_are_held_first(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = Evaluation.read(folders["classification"])
    whole = task_rows.browser(evaluation)
    assert whole is not None and whole.errors and len(whole.rows) == whole.total == 400
    monkeypatch.setattr(task_rows, "MOST_ROWS", whole.errors + 5)
    held = task_rows.browser(evaluation)
    assert held is not None and held.errors == whole.errors and len(held.rows) == whole.errors + 5
    assert "holds <b>" + str(whole.errors + 5) in render_task(evaluation, "en")
    monkeypatch.setattr(task_rows, "MOST_CHARACTERS", 3000)
    fewer = task_rows.browser(evaluation)
    assert fewer is not None and 5 < len(fewer.rows) < 15 and all(row["wrong"] for row in fewer.rows)
    surest = sorted((row["sure"] for row in whole.rows if row["wrong"]), reverse=True)
    assert sorted((row["sure"] for row in fewer.rows), reverse=True) == surest[: len(fewer.rows)]


# -- the terminal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_number_of_a_table_is_cut(folders: dict[str, Path], width: int) -> None:
    for name, folder in folders.items():
        found = facts(folder)
        text = show_task(found, width=width)
        for one in found["values"]:
            if "precision" not in one["name"] and "recall" not in one["name"]:
                assert task_phrases.shown(one["value"]) in text, (name, one["name"])
        for one in found["tables"].get("per_entity", []):
            assert re.search(rf"{re.escape(one['label'])} +{one['precision']:.4f} +{one['recall']:.4f} ", text)
    found = facts(folders["classification"])
    text = show_task(found, width=width)
    low, high = (task_phrases.shown(end) for end in found["values"][0]["interval"])
    value = task_phrases.shown(found["values"][0]["value"])
    assert re.search(rf"^ Accuracy +{value} +\[{low}, {high}\] ", text, re.M)
    difference, ends = found["base"]["paired"]["difference"], found["base"]["paired"]["interval"]
    low, high = (re.escape(task_phrases.signed(end, found["values"][0]["value"])) for end in ends)
    apart = re.escape(task_phrases.signed(difference, found["values"][0]["value"]))
    base = task_phrases.shown(found["base"]["values"][0]["value"])
    assert re.search(rf" {base} .* {apart} +\[{low}, {high}\] +[\d.]+ ", text), "the base, with how far it is"
    assert re.search(r"^ \[red\]majority ", text, re.M)


@in_browser
@pytest.mark.parametrize(("language", "words"), [("en", "Training moved the margin"), ("zh", "训练使差距")])
def test_how_far_training_moved_a_pair_is_on_the_page(
    browser: Browser, folders: dict[str, Path], language: Any, words: str
) -> None:
    moved = facts(folders["preference"])["base"]["moved"]
    browser.open(write_task_page(folders["preference"], language=language))
    text = browser.run("document.querySelector('#base > p:last-child').textContent")
    assert words in text and task_phrases.signed(moved["difference"], moved["difference"]) in text


def test_the_tables_are_plain_text_unless_colour_is_wanted(folders: dict[str, Path]) -> None:
    found = facts(folders["classification"])
    plain, coloured = show_task(found), show_task(found, colour=True)
    assert "\x1b" not in plain and "\x1b[1" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).replace(" ", "") == plain.replace(" ", "")
    assert "混淆" in show_task(found, language="zh") and "Confus" not in show_task(found, language="zh")
    with pytest.raises(ArtifactError, match="no evaluation"):
        show_task({"loss": 1.0})


# -- wording -----------------------------------------------------------------------------------------------------------


def test_what_stands_beside_a_model_has_its_chinese() -> None:
    from ratoon.evaluate.floor.run import FLOORS
    from ratoon.text.perturb import PERTURBATIONS

    told = {way.what for shapes in FLOORS.values() for ways in shapes.values() for way in ways}
    told |= {one.what for one in PERTURBATIONS.values()}
    told |= {"untrained, the same tokens", "untrained, the same prompts and decoding"}
    told |= {"untrained, the label of the highest mean log-likelihood per token after “{text}\\nLabel:”"}
    for one in told:
        chinese = task_notes.note_words(one, "zh")
        assert re.search("[\u4e00-\u9fff]", chinese) and not re.search(r"\bthe\b|\bof\b", chinese), one
        assert task_notes.note_words(one, "en") == one


def test_both_languages_take_the_same_values_and_no_phrase_is_idle() -> None:
    source = Path(task_phrases.__file__).parent
    code = "".join(
        path.read_text("utf-8")
        for path in (*source.glob("task_*.py"), *source.glob("templates/task.*"), source.parent / "cli/task_table.py")
        if path.name != "task_phrases.py"
    ) + Path(task_phrases.__file__).read_text("utf-8").split("def phrase")[1]  # fmt: skip
    stems = ("part_", "fate_", "unit_", "h_", "f_", "r_", "sort_", "per_")
    for key, (english, chinese) in task_phrases.PHRASES.items():
        fields = [sorted(name for _, name, _, _ in string.Formatter().parse(one) if name) for one in (english, chinese)]
        assert fields[0] == fields[1], key
        used = f'"{key}"' in code or f"words.{key}" in code or any(
            key.startswith(stem) and (f'"{key[len(stem):]}"' in code or f"_{key[len(stem):]}" in code) for stem in stems
        )  # fmt: skip
        assert used, f"nothing says '{key}'"
    assert not set(task_phrases.PHRASES) & set(SHARED), "a phrase of the shared table would be hidden"


def test_every_figure_that_is_measured_has_a_name(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        for one in facts(folder)["values"]:
            english, chinese = (task_phrases.figure_name(one["name"], language) for language in ("en", "zh"))
            assert "_" not in english + chinese and (english[0].isupper() or english.startswith("chrF"))
    assert task_phrases.figure_name("entity_f1_micro", "zh") == "实体 F1（微平均）"
    assert task_phrases.figure_name("entity_precision_micro", "en") == "Entity precision, micro"
    assert task_phrases.figure_name("kappa_quadratic[set 1]", "en") == "Quadratic weighted kappa, set 1"
    assert task_phrases.figure_name("kappa_quadratic[1]", "zh") == "二次加权 Kappa（1）"


def test_notes_that_are_written_beside_figures_are_known_in_chinese() -> None:
    labels = ["a", "b", "c"]
    measured = [
        classification(["a", "b"], ["a", "x"], labels, **FEW),
        classification(["a"], ["a"], labels, **FEW),
        classification(["a", "a"], ["a", "a"], ["a"], **FEW),
        scores([1.0, 1.0], [2.0, 3.0], **FEW),
        tagging_metrics.tagging([["B-A"], ["O"]], [["B-A"], ["O"]], **FEW),
        answers([["北京"], []], ["北京", ""], "zh", **FEW),
        perplexity([1.0], [2]),
    ]
    notes = {one.note for part in measured for one in part.values if one.note}
    assert len(notes) >= 7
    for note in notes:
        chinese = task_notes.note_words(note, "zh")
        assert not re.search("[a-z]{4}", chinese), (note, chinese)
