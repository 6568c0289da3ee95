"""`ratoon compare`: fine-tuned runs side by side in one table, and on a page with one picture.

Decides which runs are read, what of them is counted together (seeds), and against which each is tested: the best. What
is on record is `report/compare_records.py`'s, how figures are counted anew `evaluate/kept.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ratoon.evaluate.metrics.value import Measured
    from ratoon.report.compare_records import Comparison, Lane, Note, TunedRun
    from ratoon.report.phrases import Language

SCORE = ("col_method", "col_score", "col_95", "col_to_best")
COST = ("col_trained_short", "col_speed", "col_memory", "col_disk", "col_took")
RECIPE = ("col_settings", "col_passes", "col_steps", "col_seed")
"""What a line says behind the name of its run, by the keys of phrases: its score, what it took, how it was made."""


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN…")
@click.option("--by-seed", is_flag=True, help="Runs that differ only in their seed are one line: mean and deviation.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Where comparison.json and the page go.")
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
def command(runs: tuple[str, ...], by_seed: bool, out: Path | None, as_json: bool) -> None:
    """Lay fine-tuned runs side by side: score with interval, trained parameters, speed, memory, size, time.

    All must be of one task and measured on the same test rows. Runs that kept their predictions are tested against the
    best of them by a paired bootstrap.
    """
    from ratoon.cli.output import answer, answer_json, talk, terminal_columns

    found, language = compared(runs, by_seed=by_seed)
    if as_json:
        answer_json(found.as_dict())
    else:
        answer(show_comparison(found, language=language, width=terminal_columns()))
    if out is not None:
        from ratoon.report.compare_page import write_compare_page
        from ratoon.store.atomic import write_json

        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "comparison.json", found.as_dict())
        talk(f"page: {write_compare_page(out, found, language=language)}")


def compared(names: Sequence[str], *, by_seed: bool = False) -> tuple[Comparison, Language]:
    """The runs of these names as a comparison, and the language of its page: the first run's.

    Raises `ConfigError` and `DataError` for runs that cannot be compared, `ArtifactError` for a name that is none.
    """
    from ratoon.base.errors import ConfigError
    from ratoon.report import compare_records as records
    from ratoon.store.runs import Run

    if len(names) < 2:
        raise ConfigError("one run alone", where="command line", expected="two or more runs", fix="`ratoon runs` lists")
    runs = [records.TunedRun.read(Run.find(name)) for name in names]
    if len({run.name for run in runs}) < len(runs):
        raise ConfigError("a run is named twice", where="command line", expected="each run once")
    notes = records.expect_comparable(runs)
    groups = records.by_seed(runs) if by_seed else [[run] for run in runs]
    counted, reasons = _counted(runs)
    firsts = [group[0] for group in groups]
    lanes = [
        records.lane(group, records.mean_figure(group), method, settings)
        for group, method, settings in zip(groups, _methods(firsts), records.other_words(firsts), strict=True)
    ]
    lanes = sorted(_tested(lanes, counted, firsts[0].main.name), key=lambda one: one.score.rank)
    language: Language = "zh" if runs[0].language == "zh" else "en"
    main, first = runs[0].main, runs[0]
    found = records.Comparison(
        first.task, first.evaluation.measure, main, first.evaluation.n, lanes, [*notes, *reasons]
    )  # fmt: skip
    return found, language


def _methods(runs: Sequence[TunedRun]) -> list[str]:
    """Each run's method in words."""
    from ratoon.adapt.methods import settings_of
    from ratoon.base.settings import build
    from ratoon.report.compare_records import method_words

    kinds = [settings_of(str(run.method.get("kind", "full"))) for run in runs]
    settings = [
        build(kind, run.method, where=f"runs/{run.name}/recipe.yaml", within="method").model_dump(mode="json")
        for kind, run in zip(kinds, runs, strict=True)
    ]
    return method_words(settings, [kind.model_validate({}).model_dump(mode="json") for kind in kinds])


def _counted(runs: Sequence[TunedRun]) -> tuple[dict[str, Measured], list[Note]]:
    """The figures of each run counted anew from its predictions, and why those are missing that could not be."""
    from ratoon.base.errors import RatoonError
    from ratoon.evaluate.kept import counted_again
    from ratoon.report.compare_records import Note
    from ratoon.tasks.registry import restored

    found: dict[str, Measured] = {}
    notes: list[Note] = []
    for run in runs:
        reason = "its predictions are not kept"
        if run.kept:
            try:
                task = restored(run.facts["task"], where=run.name)
                measured = counted_again(task, run.evaluation.predictions, run.language)
            except RatoonError as error:
                reason = error.found
            else:
                value, main = measured.value(run.main.name).value, run.main.value
                if value is not None and main is not None and abs(value - main) <= 1e-6 * max(1.0, abs(main)):
                    found[run.name] = measured
                    continue
                reason = f"its predictions come to {value}, evaluation.json says {main}"
        notes.append(Note("note_not_paired", {"run": run.name, "reason": reason}))
    return found, notes


def _tested(lanes: Sequence[Lane], counted: dict[str, Measured], name: str) -> list[Lane]:
    """The lines with the paired bootstrap against the best, and means with their interval."""
    from ratoon.evaluate.kept import averaged
    from ratoon.evaluate.metrics.value import compare
    from ratoon.report.task_records import Difference

    several = any(len(lane.runs) > 1 for lane in lanes)
    figures: dict[str, Measured] = {}
    for lane in lanes:
        if all(run in counted for run in lane.runs):
            parts = [counted[run] for run in lane.runs]
            figures[lane.runs[0]] = averaged(parts, name) if several else parts[0]
    best = min(lanes, key=lambda lane: lane.score.rank)
    found = []
    for lane in lanes:
        if len(lane.runs) > 1 and lane.runs[0] in figures:
            lane = replace(lane, score=replace(lane.score, interval=figures[lane.runs[0]].value(name).interval))
        if lane is not best and lane.runs[0] in figures and best.runs[0] in figures:
            apart = compare(figures[lane.runs[0]], figures[best.runs[0]], name)
            lane = replace(lane, to_best=Difference.of(apart.as_dict()))
        found.append(lane)
    return found


# -- the terminal ------------------------------------------------------------------------------------------------------


def show_comparison(found: Comparison, *, language: Language = "en", width: int | None = None) -> str:
    """The table, in plain text; where it needs more than `width` columns, it is three: scores, what they took, and how
    the runs were made."""
    from ratoon.cli.task_table import columns_of, printed, table
    from ratoon.report.compare_phrases import phrase, told
    from ratoon.report.phrases import duration, size
    from ratoon.report.task_phrases import count, figure_name, shown, task_name

    rows = []
    for number, lane in enumerate(found.lanes):
        score, value = lane.score, lane.score.value
        ends = "" if score.interval is None else "[" + ", ".join(shown(end, value) for end in score.interval) + "]"
        spread = "" if lane.spread is None else f" ± {shown(lane.spread, value)}"
        rows.append(
            [
                lane.name,
                lane.method,
                f"{shown(value)}{spread}",
                ends,
                phrase("best", language) if not number else _apart(lane),
                count(lane.trainable_parameters),
                count(lane.tokens_per_second),
                "–" if lane.peak_memory_bytes is None else size(lane.peak_memory_bytes),
                "–" if not lane.disk_bytes else size(lane.disk_bytes),
                "–" if lane.seconds is None else duration(lane.seconds, language),
                "–" if lane.passes is None else f"{lane.passes:.1f}",
                count(lane.steps),
                ", ".join(map(str, lane.seeds)),
                lane.settings,
            ]
        )
    keys: tuple[str, ...] = ("col_run", *SCORE, *COST, *RECIPE[1:], RECIPE[0])
    if not any(row[-1] for row in rows):
        keys, rows = keys[:-1], [row[:-1] for row in rows]
    lower = "" if found.figure.higher_is_better else phrase("lower", language)
    lead = phrase("lead_compare", language).format(
        task=task_name(found.task, language), n=count(found.n_rows), name=figure_name(found.figure.name, language),
        lower=lower,
    )  # fmt: skip
    head = [phrase(key, language) for key in keys]
    views = [table(lead, head, rows, left=2)]
    if width is not None and columns_of(views[0]) > width:
        views = []
        for title, group, texts in ((lead, SCORE, 2), ("", COST, 1), ("", RECIPE, 2 if "col_settings" in keys else 1)):
            places = [keys.index(key) for key in ("col_run", *group) if key in keys]
            views.append(
                table(title, [head[at] for at in places], [[row[at] for at in places] for row in rows], left=texts)
            )
    notes = ["best_note", "memory_note", *(["seeds_note"] if found.seeded else [])]
    sentences = [told(note, language) for note in found.notes] + [phrase(key, language) for key in notes]
    return printed([*views, *sentences], width=width)


def _apart(lane: Lane) -> str:
    """How far the line is from the best one: difference, interval, p."""
    from ratoon.report.task_phrases import signed

    apart, value = lane.to_best, lane.score.value
    if apart is None or apart.difference is None:
        return "–"
    ends = "" if apart.interval is None else " [" + ", ".join(signed(end, value) for end in apart.interval) + "]"
    p = "" if apart.p_value is None else f" p {apart.p_value:.3f}"
    return f"{signed(apart.difference, value)}{ends}{p}"
