"""The page of runs side by side: what it says is what was compared, in a real browser too; no name hides another."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from made_evaluations import HOSTILE
from ratoon.report import compare_phrases, task_phrases
from ratoon.report.compare_page import render_comparison, write_compare_page
from ratoon.report.compare_plot import APART, _apart, _Box, _names, by_parameters
from ratoon.report.compare_records import Comparison, Lane, Note
from ratoon.report.phrases import PHRASES as SHARED
from ratoon.report.task_records import Difference, Figure
from test_report_browser import CHROMIUM, CONTRAST, Browser

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (RATOON_CHROMIUM names one)")

METHODS = {
    "banking77-full": (134_560_000, 0.921),
    "banking77-dora": (2_530_000, 0.9205),
    "banking77-lora": (2_440_000, 0.920),
    "banking77-adalora": (3_660_000, 0.916),
    "banking77-houlsby": (2_210_000, 0.9185),
    "banking77-pfeiffer": (1_110_000, 0.917),
    "banking77-prefix-reparametrized": (460_000, 0.874),
    "banking77-ia3": (105_000, 0.871),
    "banking77-prompt": (56_000, 0.803),
}
"""Nine runs whose scores and sizes are as close together as those of real ones."""


def lane(name: str, parameters: int | None, value: float, best: float | None = None, **more: Any) -> Lane:
    score = Figure("accuracy", value, (value - 0.0101, value + 0.0097), 3080)
    apart = (
        None if best is None else Difference(value - best, (value - best - 0.008, value - best + 0.009), 0.021, 3080)
    )
    facts: dict[str, Any] = {
        "runs": [name], "seeds": [1], "method": "lora rank=8", "settings": "", "spread": None,
        "tokens_per_second": 512.4, "peak_memory_bytes": 1_300_000_000, "disk_bytes": 9_800_000, "seconds": 754.0,
        "passes": 3.0, "steps": 940,
    } | more  # fmt: skip
    return Lane(name=name, score=score, trainable_parameters=parameters, to_best=apart, **facts)


def compared(**more: Any) -> Comparison:
    best = max(value for _, value in METHODS.values())
    lanes = [lane(name, size, value, None if value == best else best) for name, (size, value) in METHODS.items()]
    return Comparison(
        "classification", "classification", lanes[0].score, 3080, sorted(lanes, key=lambda one: one.score.rank), **more
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("profile"))
    yield made
    made.close()


@in_browser
@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("width", [1200, 700, 390])
def test_it_fits_asks_for_nothing_and_no_name_lies_on_another(
    browser: Browser, tmp_path: Path, width: int, language: Any
) -> None:
    page = write_compare_page(tmp_path, compared(), language=language)
    browser.open(page, width=width)
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width
    boxes = browser.run(
        "[...document.querySelectorAll('.plot svg text')].map(t => [t.textContent, t.getBoundingClientRect()])"
        ".filter(([_, r]) => r.height).map(([t, r]) => [t, r.left, r.right, r.top, r.bottom])"
    )
    names = {name for name, *_ in boxes}
    assert {"full", "lora", "dora", "adalora", "houlsby", "pfeiffer", "ia3", "prompt"} < names
    for at, (one, left, right, top, bottom) in enumerate(boxes):
        assert bottom - top > 9, "pixels: it can be read"
        assert left >= 0 and right <= width, one
        for other, *box in boxes[at + 1 :]:
            across, down = min(right, box[1]) - max(left, box[0]), min(bottom, box[3]) - max(top, box[2])
            assert across <= 0.5 or down <= 2, (one, other)  # a line's box is higher than its letters
    dots = browser.run(
        "[...document.querySelectorAll('.plot svg use')].map(u => u.getBoundingClientRect()).filter(r => r.height)"
        ".map(r => [r.left, r.right, r.top, r.bottom])"
    )
    assert len(dots) == len(METHODS)
    for name, left, right, top, bottom in boxes:
        for dot in dots:
            across, down = min(right, dot[1]) - max(left, dot[0]), min(bottom, dot[3]) - max(top, dot[2])
            assert across <= 1 or down <= 2, f"{name} lies on a point"


@in_browser
@pytest.mark.parametrize("dark", [False, True])
def test_every_text_can_be_read_in_light_and_dark(browser: Browser, tmp_path: Path, dark: bool) -> None:
    notes = [Note("note_types", {"types": "bfloat16, float32"})]
    browser.open(write_compare_page(tmp_path, compared(notes=notes)), dark=dark)
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run(CONTRAST) == [], "below the 4.5 to 1 of WCAG 2.2, 1.4.3"


@in_browser
def test_names_and_settings_are_text(browser: Browser, tmp_path: Path) -> None:
    told = {"method": HOSTILE, "settings": HOSTILE}
    lanes = [lane(HOSTILE, 10, 0.9, **told), lane("$x$ [red]b", 1000, 0.8, 0.9, **told)]
    note = Note("note_not_paired", {"run": HOSTILE, "reason": HOSTILE})
    found = Comparison("classification", "classification", lanes[0].score, 9, lanes, [note])
    page = write_compare_page(tmp_path, found)
    browser.open(page)
    assert browser.complaints() == [] and browser.requests() == [page.resolve().as_uri()]
    assert browser.run("document.scripts.length") == 0 and browser.run("document.images.length") == 0
    assert browser.run("document.getElementById('runs').textContent").count(HOSTILE) == 6
    assert browser.run("document.querySelector('.picture.wide').textContent").count("$x$") == 1


def test_every_figure_stands_on_the_page_and_the_best_is_marked() -> None:
    found = compared()
    page = render_comparison(found, "en")
    rows = re.findall(r"<tr[^>]*><th scope=\"row\" class=\"name\">.*?</tr>", page, re.S)
    assert len(rows) == 9 and 'class="first"' in rows[0] and ">best<" in rows[0]
    for one, row in zip(found.lanes, rows, strict=True):
        assert f"<b>{one.score.value:.4f}</b>" in row and f"{one.trainable_parameters:,}" in row and one.name in row
        for part in ("512", "1.3\u00a0GB", "9.8\u00a0MB", "12\u00a0min", "940 steps"):
            assert part in row, part
        if one.to_best is not None:
            assert "p 0.021" in row and f"−{abs(one.to_best.difference or 0):.4f}" in row


def test_a_score_of_several_seeds_has_its_deviation() -> None:
    plain = render_comparison(compared(), "en")
    assert "±" not in plain
    lanes = [lane("lora", 10, 0.9, runs=["lora-1", "lora-2"], seeds=[1, 2], spread=0.0123), lane("full", 100, 0.8, 0.9)]
    page = render_comparison(Comparison("classification", "classification", lanes[0].score, 9, lanes), "en")
    assert "</b> ± 0.0123" in page and "1, 2" in page and "3 runs side by side" in page and "are means" in page


def test_lower_is_better_is_said_and_what_is_missing_is_a_dash() -> None:
    none = dict.fromkeys(("tokens_per_second", "peak_memory_bytes", "disk_bytes", "seconds", "passes", "steps"))
    lanes = [lane("a", None, 2.5, **none), lane("b", 10, 3.5, **none)]
    figure = Figure("perplexity", 2.5, None, 9, higher_is_better=False)
    for language, words in (("en", "lower is better"), ("zh", "越低越好")):
        page = render_comparison(Comparison("generation", "perplexity", figure, 9, lanes), language)  # type: ignore[arg-type]
        assert words in page and page.count("<td>–</td>") >= 9 and not re.search(r"\bNone\b|\bnan\b", page)


def test_a_run_whose_size_is_not_known_is_not_drawn() -> None:
    assert by_parameters([lane("a", None, 0.5)], wide=True) == ""
    drawn = by_parameters([lane("a-x", None, 0.5), lane("a-y", 10, 0.5), lane("a-z", 10, 0.4)], wide=True)
    assert ">y<" in drawn and ">z<" in drawn and ">x<" not in drawn
    assert "<svg" in by_parameters([lane("alone", 10, 0.5)], wide=False), "one point has axes, too"


def test_runs_of_one_size_stand_side_by_side() -> None:
    inside = _Box(0, 1000, 0, 1)
    assert _apart([100.0, 500.0], inside) == [100, 500]
    assert _apart([500.0, 500.0, 500.0], inside) == [500 - APART, 500, 500 + APART]
    found = _apart([500.0, 100.0, 501.0, 500 + 1.2 * APART, 500.0], inside)
    assert found[1] == 100 and sorted(found)[1:] == [found[0], found[4], found[2], found[3]]
    assert min(b - a for a, b in zip(sorted(found), sorted(found)[1:], strict=False)) >= APART - 1e-9


def test_no_tick_stands_where_no_score_can_be() -> None:
    drawn = by_parameters([lane("a", 10, 0.985), lane("b", 100, 0.95)], wide=True)
    ticks = [float(one) for one in re.findall(r">([01]\.\d+)<", drawn)]
    assert ticks and max(ticks) <= 1 and min(ticks) < 0.96
    drawn = by_parameters([lane("a", 10, 17.4)], wide=True)
    assert any(float(one) > 17 for one in re.findall(r">(\d+\.\d+)<", drawn)), "a score of another kind has its ticks"


def test_names_leave_out_what_they_share_and_keep_their_ends() -> None:
    assert _names(["b77-lora-1", "b77-lora-2"], 20) == ["1", "2"]
    assert _names(["b77-lora", "b77-lora-2"], 20) == ["lora", "lora-2"]
    assert _names(["b77-full", "other"], 20) == ["b77-full", "other"]
    assert _names(["only-one"], 20) == ["only-one"]
    long = _names(["x-" + "a" * 20 + "1", "x-" + "a" * 20 + "2"], 9)
    assert long == ["aaaa…aaa1", "aaaa…aaa2"]


def test_both_languages_take_the_same_values_and_no_phrase_is_idle() -> None:
    source = Path(compare_phrases.__file__).parent
    files = [*source.glob("compare_*.py"), source / "templates/compare.html", source.parent / "cli/compare.py"]
    code = "".join(path.read_text("utf-8") for path in files if path.name != "compare_phrases.py")
    for key, (english, chinese) in compare_phrases.PHRASES.items():
        fields = [sorted(name for _, name, _, _ in string.Formatter().parse(one) if name) for one in (english, chinese)]
        assert fields[0] == fields[1], key
        assert f'"{key}"' in code, f"nothing says '{key}'"
    assert not set(compare_phrases.PHRASES) & (set(SHARED) | set(task_phrases.PHRASES)), "one would be hidden"


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = json.loads(json.dumps(compared().as_dict()))
    assert len(found["runs"]) == 9 and found["runs"][0]["to_best"] is None
    assert found["runs"][1]["to_best"]["p_value"] == 0.021 and found["runs"][1]["interval"][0] < 0.92
