"""How a fine-tuned run learned, on its page: curves and marks are those on record, and the finding is what they say.

The records are made here; a run as `ratoon finetune` leaves it is in the last test.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from little_tasks import rows_of, table, write
from made_evaluations import make_classification
from ratoon.base.errors import ArtifactError
from ratoon.cli.main import run as ratoon
from ratoon.report import plots
from ratoon.report.records import Records
from ratoon.report.task_learned import Learned, learned
from ratoon.report.task_page import write_task_page
from ratoon.report.task_phrases import phrase
from ratoon.store.runs import Run
from test_report_browser import CHROMIUM, CONTRAST, Browser

ROWS, ROWS_A_STEP = 100, 8  # an epoch is 12.5 steps
FALLING = (4.0, 2.0, 1.5, 1.2, 1.0)
OVERFIT = (4.0, 2.0, 1.0, 1.1, 1.25)
LEVEL = (4.0, 2.0, 1.01, 1.0, 1.02)


def make_run(
    root: Path, losses: tuple[float, ...] = OVERFIT, *, every: int = 10, measures: bool = True, **state: Any
) -> Run:
    """A finished run whose validation loss was measured each `every` steps; the best is the third, by accuracy."""
    run = Run.create("tuned", root)
    last = every * (len(losses) - 1 if len(losses) > 1 else 4)
    for step in range(1, last + 1):
        run.append_metrics(
            {"step": step, "kind": "train", "time_seconds": step / 2, "tokens": 30 * step, "loss": 4 / step,
             "learning_rate": 1e-3 * (1 - step / last), "grad_norm": 1.0, "tokens_per_second": 700.0 + step,
             "memory_bytes": 1_500_000_000 + step, "progress": step / last}
        )  # fmt: skip
    for number, loss in enumerate(losses):
        step = number * every
        record = {"step": step, "kind": "eval", "time_seconds": step / 2, "tokens": 30 * step, "loss": loss,
                  "n_tokens": 20, "n_records": 20}  # fmt: skip
        accuracy = 0.9 if number == 3 else 0.1 + number / 10
        run.append_metrics(record | ({"measure": {"name": "accuracy", "value": accuracy}} if measures else {}))
    run.recipe_path.write_text(yaml.safe_dump({"train": {"rows": ROWS_A_STEP, "optimizer": "adamw"}}), "utf-8")
    facts: dict[str, Any] = {
        "name": "tuned",
        "status": "done",
        "step": 3 * every,
        "steps": last,
        "best": {"step": 3 * every, "by": -0.9},
        "data": {"rows": ROWS, "filled": 0.876},
    }
    run.write_state(**facts | state)
    return run


def of(run: Run, language: Any = "en") -> Learned:
    def say(key: str, **values: Any) -> Any:
        return phrase(key, language).format(**values)

    found = learned(Records.read(run), say, language)
    assert found is not None
    return found


def words(page: str) -> str:
    """What stands in the section, without the pictures."""
    section = page.split('<section id="learned"')[1].split("</section>")[0]
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]*>", " ", section, flags=re.S).split())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[list[plots.Curve], plots.Frame]]:
    """Layers and frame of each picture, by its key, as they are handed over for drawing."""
    found: dict[str, tuple[list[plots.Curve], plots.Frame]] = {}
    draw: Callable[..., str] = plots.draw

    def note(layers: Any, frame: plots.Frame, *, key: str) -> str:
        found[key] = (list(layers), frame)
        return draw(layers, frame, key=key)

    monkeypatch.setattr(plots, "draw", note)
    return found


# -- the curves --------------------------------------------------------------------------------------------------------


def test_curves_marks_and_borders_are_those_on_record(
    tmp_path: Path, drawn: dict[str, tuple[list[plots.Curve], plots.Frame]]
) -> None:
    found = of(make_run(tmp_path))
    names = ["loss", "measure", "learning_rate", "throughput", "memory", "gradient_norm"]
    assert [one["name"] for one in found.curves] == names
    layers, frame = drawn["loss-wide"]
    held = next(one for one in layers if one.ink == "held-out")
    assert list(zip(held.x, held.y, strict=True)) == [(10.0 * n, loss) for n, loss in enumerate(OVERFIT)]
    assert frame.mark == (30.0, 1.1), "the step whose weights were kept, not that of the lowest loss"
    assert frame.borders == (12.5, 25.0, 37.5)
    layers, frame = drawn["measure-narrow"]
    assert frame.mark == (30.0, 0.9) and [*layers[0].y] == pytest.approx([0.1, 0.2, 0.3, 0.9, 0.5])
    assert drawn["memory-wide"][1].borders == (12.5, 25.0, 37.5) and drawn["memory-wide"][1].mark is None
    assert drawn["memory-wide"][0][0].y[0] == pytest.approx(1500.000001), "MB"
    legend = dict(found.curves[0]["legend"])
    assert legend["border"] == "end of an epoch, 12.5 steps" and legend["ring"] == "kept: step 30, 1.100"
    assert found.curves[1]["title"] == "Accuracy"


def test_of_many_epochs_every_so_many_are_drawn(
    tmp_path: Path, drawn: dict[str, tuple[list[plots.Curve], plots.Frame]]
) -> None:
    found = of(make_run(tmp_path, every=100, data={"rows": 2 * ROWS_A_STEP, "filled": 1.0}))
    assert drawn["loss-wide"][1].borders == tuple(range(34, 400, 34)), "200 epochs of 2 steps; the end is none"
    assert dict(found.curves[0]["legend"])["border"] == "end of every 17 epochs, 34 steps"
    assert not any("padding" in note for note in found.notes)
    of(make_run(tmp_path / "two", data={"rows": 20 * ROWS_A_STEP}))
    assert drawn["loss-wide"][1].borders == (20.0,), "the end of the run is no border"


def test_a_picture_has_a_dotted_line_for_each_border() -> None:
    curve, frame = plots.Curve(*plots.finite([(0, 1.0), (10, 2.0)])), plots.Frame(510, 230, borders=(2.0, 4.0, 8.0))
    plain = plots.draw([curve], plots.Frame(510, 230), key="a")
    assert plots.draw([curve], frame, key="a").count("stroke-dasharray") == plain.count("stroke-dasharray") + 3


def test_numbers_of_a_long_logarithmic_axis_are_whole_decades() -> None:
    def numbers(low: float) -> int:
        curve = plots.Curve(*plots.finite([(0, 1.0), (10, low)]))
        return len(re.findall(r'id="a-ytick_\d+"', plots.draw([curve], plots.Frame(345, 190, log=True), key="a")))

    assert 3 <= numbers(0.1) <= 6 and 3 <= numbers(1e-4) <= 6


# -- the finding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "kind", "said"),
    [
        (OVERFIT, "warn", "Overfitting: the validation loss was lowest, 1.0000, at step 20 (1.6 epochs); at the end, "
                          "1.2500, it was 25\u00a0% higher."),
        (FALLING, "warn", "still falling at the end: 1.200 at step 30 (2.4 epochs), 1.0000 at step 40 (3.2 epochs)"),
        (LEVEL, "good", "came to rest: lowest, 1.0000, at step 30 (2.4 epochs); 1.0200 at the end"),
        ((1.0, 1.04, 1.02, 1.03, 1.02), "bad", "never fell below what it was before training, 1.0000"),
        ((4.0, 2.0, 1.0, 1.0, 1.04), "good", "came to rest"),  # a rise of 4 %
        ((1.5, 1.4, 1.2, 1.013, 1.0), "good", "came to rest"),  # a last fall of 1 %
        ((4.0, 0.05, 0.040, 0.044, 0.043), "good", "came to rest"),  # of all that was gained next to nothing
        ((1.0, 1.2, 1.4, 1.5, 2.0), "bad", "was lowest, 1.0000, before training; at the end, 2.0000, it was 100"),
        ((4.0, 2.0, 3.0), "warn", "Overfitting"),
        ((4.0, 3.0, 2.0), None, ""),  # two measurements say nothing of an end
        ((4.0,), None, ""),
    ],
)  # fmt: skip
def test_what_the_validation_loss_says_of_the_length_of_the_run(
    tmp_path: Path, losses: tuple[float, ...], kind: str | None, said: str
) -> None:
    found = of(make_run(tmp_path, losses)).finding
    if kind is None:
        assert found is None
    else:
        assert found is not None and found[0] == kind and said in found[1]


def test_which_weights_were_kept_is_told(tmp_path: Path) -> None:
    def notes(name: str, losses: tuple[float, ...] = OVERFIT, **more: Any) -> str:
        return " ".join(of(make_run(tmp_path / name, losses, **more)).notes)

    assert "those of step 30 (2.4 epochs), the best on the validation rows by Accuracy; the last step" in notes("a")
    assert "by validation loss; the last step was 40" in notes("b", measures=False)
    last = notes("c", step=40, best={"step": 40, "by": -0.9})
    assert "those of the last step, step 40 (3.2 epochs), the best on the validation rows by Accuracy" in last
    other = notes("d", step=40, best={"step": 20, "by": -0.9})
    assert "those of step 40 (3.2 epochs)." in other and "best" not in other
    assert "No rows were set aside for validation" in notes("e", (), step=40, best={"step": None, "by": None})
    assert "87.6\u00a0%" in notes("f") and "kept" not in notes("g", status="failed")


def test_a_run_that_tells_little_is_shown_with_what_it_tells(tmp_path: Path) -> None:
    run = make_run(tmp_path, measures=False, data="none", best=None)
    run.recipe_path.unlink()
    found = of(run)
    assert found.measure is None and [one["name"] for one in found.curves][:2] == ["loss", "learning_rate"]
    assert found.finding is not None and "lowest, 1.0000, at step 20; at the end" in found.finding[1]
    assert all("border" not in dict(one["legend"]) for one in found.curves)
    run.metrics_path.write_text("", "utf-8")
    assert learned(Records.read(run), lambda key, **_: key, "en") is None  # type: ignore[arg-type, return-value]


# -- the page ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_shows_it_only_with_a_run(tmp_path: Path, language: Any) -> None:
    folder, run = make_classification(tmp_path / "evaluation"), make_run(tmp_path)
    page = write_task_page(folder, language=language, run=run).read_text("utf-8")
    seen = words(page)
    assert ("25\u00a0% higher" if language == "en" else "高出 25\u00a0%") in page and "2.40" in seen and "1.100" in seen
    assert page.count('<a href="#learned">') == 1 and page.count('class="best"') == 1
    assert 'id="learned"' not in write_task_page(folder, language=language).read_text("utf-8")
    gone = Run(tmp_path / "gone")
    assert 'id="learned"' not in write_task_page(folder, language=language, run=gone).read_text("utf-8")
    run.state_path.write_text("{", "utf-8")
    with pytest.raises(ArtifactError, match="not readable"):
        write_task_page(folder, language=language, run=run)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (RATOON_CHROMIUM names one)")
@pytest.mark.parametrize("language", ["en", "zh"])
def test_it_fits_a_telephone_and_can_be_read_in_light_and_dark(browser: Browser, tmp_path: Path, language: Any) -> None:
    run = make_run(tmp_path)
    page = write_task_page(make_classification(tmp_path / "evaluation"), language=language, run=run)
    for width, dark in ((390, False), (1200, True)):
        browser.open(page, width=width, dark=dark)
        browser.run("document.querySelectorAll('#learned details').forEach(d => d.open = true)")
        assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]
        assert browser.run("document.documentElement.scrollWidth") <= width
        letters = "[...document.querySelectorAll('#learned svg text')].map(t => t.getBoundingClientRect().height)"
        assert browser.run(f"Math.min(...{letters}.filter(h => h))") > 9
        mixed = (
            "const parse = c => { if (c.startsWith('color(')) return c.match(/[\\d.]+/g).map(v => 255 * v).concat(1);"
        )
        assert browser.run(CONTRAST.replace("const parse = c => {", mixed, 1)) == []


def test_a_run_that_was_made_shows_how_it_learned_wherever_its_page_is_written(with_base: Path) -> None:
    write(with_base / "rows.jsonl", rows_of("classification", 24))
    Path("recipe.yaml").write_text(yaml.safe_dump(table("classification")), encoding="utf-8")
    assert ratoon(["finetune", "recipe.yaml"]) == 0
    run = Run(Path("runs/tuned"))
    last = [one for one in run.read_metrics() if one["kind"] == "eval"][-1]
    page = run.report.read_text("utf-8")
    assert f"{last['loss']:.4g}"[:4] in words(page) and "epochs)" in words(page)
    assert ratoon(["evaluate", "tuned", "--out", "again"]) == 0
    again = Path("again/report.html").read_text("utf-8")
    assert words(again) == words(page) and json.loads(Path("again/evaluation.json").read_text("utf-8"))["n"]
