"""The page of a fine-tuned run: without measures it says so, why, and what to type; with them it is the evaluation's.

The runs are made by `ratoon finetune` as a user types it.
"""

from __future__ import annotations

import json
import os
import pkgutil
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from little_tasks import rows_of, table, write
from ratoon.base.errors import NumericError
from ratoon.cli.main import run as ratoon
from ratoon.report.records import Records
from ratoon.report.task_unmeasured import Unmeasured, write_unmeasured_page
from ratoon.store.runs import Run
from test_report_browser import CHROMIUM, CONTRAST, Browser

RUN = Run("runs/tuned")
RESUME, MEASURE = "ratoon finetune runs/tuned/recipe.yaml --resume", "ratoon evaluate tuned"


@pytest.fixture
def place(with_base: Path) -> Path:
    write(with_base / "rows.jsonl", rows_of("classification"))
    return with_base


def finetune(*arguments: str, test: float = 0.15, **changes: Any) -> int:
    recipe = table("classification", data__test_fraction=test, train__log_every_steps=1, **changes)
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return ratoon(["finetune", "recipe.yaml", *arguments])


def page() -> str:
    return RUN.report.read_text(encoding="utf-8")


def section(name: str) -> str:
    """What stands in a section, without the pictures."""
    found = page().split(f'<section id="{name}"')[1].split("</section>")[0]
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", found, flags=re.S).split())


def commands() -> list[str]:
    """What the page says to type."""
    found = page().split('<ol class="commands">')[1].split("</ol>")[0]
    return re.findall(r'<code id="command-\d+">(.*?)</code>', found)


def interrupt(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Ctrl-C where a function of that name is called."""
    called = pkgutil.resolve_name(where)

    def stop(*arguments: Any, **told: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return called(*arguments, **told)

    monkeypatch.setattr(where, stop)


# -- without measures --------------------------------------------------------------------------------------------------


def test_a_run_without_test_rows_has_a_page_that_says_so(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert finetune(test=0.0) == 0
    assert "page: runs/tuned/report.html" in capsys.readouterr().err
    assert "no rows aside for a test" in section("unmeasured") and 'class="banner' not in page()
    assert commands() == [f"{MEASURE} FILE", "ratoon export tuned tuned-hf"]
    last = [one for one in RUN.read_metrics() if one["kind"] == "eval"][-1]
    assert f"{last['loss']:.4f}"[:5] in section("learned") and "The weights that were kept" in section("learned")
    ledger = json.loads((RUN.folder / "ledger.json").read_text("utf-8"))["parts"]["train"]["rows"]
    assert f"Read {ledger['read']}" in section("accounts")
    assert "train.steps" in section("derived") and "validation_fraction" in section("recipe")
    # What it says to type can be typed, and is about that file alone: the run's own page stays.
    before = page()
    assert ratoon(commands()[0].replace("FILE", "rows.jsonl").split()[1:]) == 0
    assert page() == before


def test_a_run_that_was_stopped_says_how_to_go_on_and_is_measured_in_the_end(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ratoon.evaluate.validate import Validation

    with monkeypatch.context() as patch:
        at: list[int] = []
        measure = Validation.callback

        def stopping(self: Validation, *arguments: Any) -> Any:
            callback = measure(self, *arguments)

            def call(step: int, model: Any) -> Any:
                at.append(step)
                if len(at) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
                return callback(step, model)

            return call

        patch.setattr(Validation, "callback", stopping)
        assert finetune() == 130
    assert RUN.read_state()["status"] == "interrupted" and at[1] > 0
    assert "ended before its model was written" in section("unmeasured") and commands() == [RESUME]
    assert "stopped by the user" in page() and f"step {at[1]}" in page()
    assert 'id="learned"' in page() and 'id="accounts"' in page()
    assert ratoon(RESUME.split()[1:]) == 0
    assert 'id="unmeasured"' not in page() and page() == (RUN.folder / "evaluation/report.html").read_text("utf-8")


def test_a_run_that_failed_says_why(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise NumericError("the loss became nan at step 0")

    with monkeypatch.context() as patch:
        patch.setattr("ratoon.train.loop.train", fail)
        assert finetune() == 1
    assert "Reason: the loss became nan" in page() and 'id="learned"' not in page()
    assert commands() == [RESUME] and 'id="accounts"' in page()
    assert finetune(task__fields={"text": "nowhere"}) == 2
    assert "ended before its model was written" in section("unmeasured")


def test_a_run_that_failed_before_its_recipe_was_settled_names_no_command(place: Path) -> None:
    write(place / "rows.jsonl", [{"text": "a", "other": "b"}])
    assert finetune() == 2
    assert "type the same command again" in section("unmeasured") and "<ol" not in page()
    assert "The run ended before a model was made." in page() and 'id="accounts"' not in page()


def test_a_model_that_was_written_and_not_measured_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, "ratoon.evaluate.task.predict")
        assert finetune() == 130
    step = RUN.read_state()["step"]
    assert f"A model was written (that of step {step})" in section("unmeasured") and commands() == [RESUME, MEASURE]
    assert ratoon(MEASURE.split()[1:]) == 0
    assert 'id="unmeasured"' not in page() and 'id="figures"' in page()


def test_what_was_measured_before_a_run_went_on_is_not_said_of_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: dict[str, Any] = {"epochs": None, "train__warmup_steps": 0}
    assert finetune(**told, train__steps=4) == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "ratoon.train.loop._Session.update")
        assert finetune("--resume", train__steps=8, **told) == 130
    assert "had been measured before it went on" in section("unmeasured") and commands() == [RESUME]
    assert f"that of step {RUN.read_state()['step']}" in section("unmeasured")
    with monkeypatch.context() as patch:
        interrupt(patch, "ratoon.evaluate.task.predict")
        assert finetune("--resume", train__steps=8, **told) == 130
    assert "is not measured yet" in section("unmeasured"), "the earlier measures are of another model"
    assert commands() == [RESUME, MEASURE]


def test_a_run_that_has_not_ended_is_shown_as_it_stands(tmp_path: Path) -> None:
    run = Run.create("early", tmp_path)
    run.write_state(name="early", status="running", task={"kind": "tagging"})
    run.recipe_path.write_text("task: {kind: tagging}\n", "utf-8")
    (run.folder / "ledger.json").write_text("{", "utf-8")
    told = Unmeasured.of(Records.read(run))
    assert told.reasons == ("why_not_yet",) and told.commands == (f"ratoon finetune {run.recipe_path} --resume",)
    assert "尚未到达终点" in write_unmeasured_page(run, language="zh").read_text("utf-8")
    run.recipe_path.write_text("model: {size: tiny}\n", "utf-8")
    assert Records.read(run).commands == [f"ratoon pretrain {run.recipe_path} --resume"]


# -- with measures -----------------------------------------------------------------------------------------------------


def test_the_page_of_a_run_is_that_of_its_own_evaluation(place: Path) -> None:
    assert finetune() == 0
    own = RUN.folder / "evaluation/report.html"
    first = page()
    assert first == own.read_text("utf-8") and 'id="floors"' not in first
    assert ratoon(["evaluate", "tuned", "--floor"]) == 0
    assert 'id="floors"' in page() and page() == own.read_text("utf-8")
    whole = page()
    for others in (["rows.jsonl"], ["--limit-rows", "2"], ["--out", "elsewhere"]):
        assert ratoon(["evaluate", "tuned", *others]) == 0
        assert page() == whole, others


def test_ranks_are_a_curve_beside_those_of_every_run(place: Path) -> None:
    assert finetune(method={"kind": "adalora", "initial_rank": 3, "rank": 2, "every_steps": 1}, epochs=4) == 0
    ranks = [one["mean_rank"] for one in RUN.read_metrics() if one["kind"] == "train"]
    assert ranks[0] == 3.0 and ranks[-1] == 2.0
    figure = page().split('<figure class="plot rank">')[1].split("</figure>")[0]
    assert "Rank by step: from 3.000 at step 1 to 2.000" in figure and "asked for at the end: 2<" in figure
    RUN.write_state(method_facts=None)
    assert ratoon(["evaluate", "tuned"]) == 0
    assert "asked for at the end: 2<" in page(), "the recipe says it as well"


# -- in a browser ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (RATOON_CHROMIUM names one)")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_fits_a_telephone_and_can_be_read_in_light_and_dark(place: Path, browser: Browser, language: str) -> None:
    assert finetune(test=0.0, language=language) == 0
    for width, dark in ((390, False), (1200, True)):
        browser.open(place / RUN.report, width=width, dark=dark)
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.complaints() == [] and browser.requests() == [(place / RUN.report).resolve().as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.querySelectorAll('.copy:not([hidden])').length") == 3, "two commands, the recipe"
        mixed = (
            "const parse = c => { if (c.startsWith('color(')) return c.match(/[\\d.]+/g).map(v => 255 * v).concat(1);"
        )
        assert browser.run(CONTRAST.replace("const parse = c => {", mixed, 1)) == []
