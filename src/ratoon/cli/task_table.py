"""A measured task on the terminal: figures, floors, classes, confusions, and what else was measured, as tables.

Decides what of an evaluation is said there and what is left to the page. Wording and the verdict on floors are
`report/task_phrases.py`'s, reading is `report/task_records.py`'s; who prints it, and where, is the verb's.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ratoon.report.phrases import Language, duration
from ratoon.report.task_notes import note_words
from ratoon.report.task_phrases import (
    count,
    figure_name,
    phrase,
    shown,
    signed,
    task_name,
    verdict,
)
from ratoon.report.task_records import FATES, Evaluation, Figure, confused_pairs

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WIDTH = 110
"""Columns where the terminal does not tell how many it has."""
CLASSES_SHOWN, PAIRS_SHOWN = 15, 5
"""Classes (the weakest) and confusions that are shown; the page has all."""


def show_task(
    report: dict[str, Any], *, language: Language = "en", width: int | None = None, colour: bool = False
) -> str:
    """The tables of an evaluation, `report` being what evaluation.json holds (its parts: `report/task_records.py`).

    Plain text, or with `colour` the signs that colour it on a terminal; `width` in columns. Raises `ArtifactError` for
    what is no evaluation.
    """
    from rich.text import Text

    found = Evaluation.of(report)
    lead = task_name(found.task, language)
    named = f"{found.model}: {lead}" if found.model else lead
    head = f"{named}, {phrase('n_of', language).format(n=count(found.n), unit=_unit('record', language))}\n"
    said: list[str | Text] = [] if found.values else [phrase("nothing_measured", language)]
    said += _sentences(found, language)
    judged = verdict(found, language)
    if judged is not None:
        style = {"good": "bold green", "warn": "bold yellow", "bad": "bold red"}[judged[0]]
        said.append(Text(judged[1], style=style))
    return printed([head, *_parts(found, language), *said], width=width, colour=colour)


def printed(parts: Sequence[str | Text | Table], *, width: int | None = None, colour: bool = False) -> str:
    """Texts and tables as they stand on a terminal of `width` columns; a table that needs more gets them. Plain text,
    or with `colour` the signs that colour it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(
        file=io.StringIO(), width=width or WIDTH, force_terminal=colour, no_color=not colour, highlight=False
    )
    for part in parts:
        if isinstance(part, Table):
            console.width = max(width or WIDTH, columns_of(part))
        else:
            console.width = width or WIDTH
        console.print(Text(part) if isinstance(part, str) else part)
    file = console.file
    assert isinstance(file, io.StringIO)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def _parts(found: Evaluation, language: Language) -> list[Table]:
    parts = [_figures(found, language), _base(found, language), _floors(found, language), _against(found, language)]
    parts += [*_counts(found, language), _confusions(found, language)]
    parts += [_robust(found, language), _ledger(found, language)]
    return [one for one in parts if one is not None]


def columns_of(view: Table) -> int:
    """How many columns of a terminal a table needs at least."""
    from rich.console import Console

    return Console(file=io.StringIO(), width=10_000).measure(view).minimum


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Table:
    """A table whose first `left` columns are texts and whose others are numbers. What stands in it is no markup."""
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table
    from rich.text import Text

    view = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(head):
        text = number < left
        # Long names fold at 24 letters at the least; of numbers, and of what stands above them, nothing is cut.
        longest = max(cell_len(one) for one in (name, *(row[number] for row in rows)))
        view.add_column(
            Text(name),
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text,
            min_width=min(longest, 24) if text else longest,
        )
    for row in rows:
        view.add_row(*(Text(cell) for cell in row))
    return view


def _between(one: Figure) -> str:
    return "–" if one.interval is None else "[" + ", ".join(shown(end, one.value) for end in one.interval) + "]"


def _unit(unit: str, language: Language) -> str:
    return phrase(f"unit_{unit}", language) if unit in ("record", "token") else unit


def _figures(found: Evaluation, language: Language) -> Table | None:
    """Every figure; precision and recall of an average stand in the line of its F1."""
    if not found.values:
        return None
    beside = {one.name: one for one in found.values}
    clean = found.without_copies
    head = ["col_figure", "col_figure_value", "col_95", "col_precision", "col_recall"]
    rows = []
    for one in found.values:
        start, core, end = one.name.rpartition("f1_")
        sides = [beside.get(f"{start}{what}_{end}") if core else None for what in ("precision", "recall")]
        if _in_line(one.name, beside):
            continue
        name = figure_name(one.name, language) + ("" if one.higher_is_better else " ↓")
        row = [name, shown(one.value), _between(one), *("" if side is None else shown(side.value) for side in sides)]
        if clean:
            row.append(shown(clean[one.name].value) if one.name in clean else "–")
        rows.append(row)
    if all(not row[3] and not row[4] for row in rows):
        head = head[:3]
        rows = [[*row[:3], *row[5:]] for row in rows]
    if clean:
        head.append("col_without")
    return table(phrase("h_figures", language), [phrase(key, language) for key in head], rows)


def _in_line(name: str, beside: dict[str, Figure]) -> bool:
    """Whether a figure is the precision or recall of an F1 that has a line."""
    for what in ("precision_", "recall_"):
        start, core, end = name.rpartition(what)
        if core and f"{start}f1_{end}" in beside:
            return True
    return False


def _floors(found: Evaluation, language: Language) -> Table | None:
    main = found.main
    if main is None or not found.floors:
        return None
    rows = [[phrase("this_model", language), "", shown(main.value), _between(main), "", ""]]
    for one in found.floors:
        ahead = "–"
        if main.value is not None and one.main.value is not None:
            ahead = signed((main.value - one.main.value) * (1 if main.higher_is_better else -1), main.value)
        time = "–" if one.seconds is None else duration(one.seconds, language)
        rows.append([one.name, note_words(one.what, language), shown(one.main.value), _between(one.main), ahead, time])
    keys = ("col_95", "col_ahead", "col_seconds")
    head = [phrase("col_predictor", language), "", figure_name(main.name, language)]
    return table(phrase("h_floors", language), [*head, *(phrase(key, language) for key in keys)], rows, left=2)


def _base(found: Evaluation, language: Language) -> Table | None:
    main, base = found.main, found.base
    if main is None or base is None:
        return None
    apart, ends, p, sure = "–", "–", "–", ""
    if (paired := base.paired) is not None:
        apart = "–" if paired.difference is None else signed(paired.difference, main.value)
        ends = "–" if paired.interval is None else _signs(paired.interval, main.value)
        p = "–" if paired.p_value is None else f"{paired.p_value:.3f}"
        sure = "" if paired.certain is None else phrase("certain_yes" if paired.certain else "certain_no", language)
    rows = [
        [phrase("this_model", language), "", shown(main.value), _between(main), "", "", "", ""],
        [base.name, note_words(base.what, language), shown(base.main.value), _between(base.main), apart, ends, p, sure],
    ]
    head = [phrase("col_predictor", language), "", figure_name(main.name, language)]
    head += [phrase(key, language) for key in ("col_95", "col_difference", "col_95", "col_p")]
    return table(phrase("h_base", language), [*head, ""], rows, left=2)


def _against(found: Evaluation, language: Language) -> Table | None:
    rows = []
    for one in found.against:
        between = "–" if one.interval is None else _signs(one.interval, one.value)
        p = "–" if one.p_value is None else f"{one.p_value:.3f}"
        sure = "" if one.certain is None else phrase("certain_yes" if one.certain else "certain_no", language)
        apart = "–" if one.difference is None else signed(one.difference, one.value)
        rows.append(
            [one.model, figure_name(one.name, language), shown(one.value), shown(one.other), apart, between, p, sure]
        )
    keys = ("col_model", "col_figure", "col_ours", "col_theirs", "col_difference", "col_95", "col_p")
    head = [*(phrase(key, language) for key in keys), ""]
    return table(phrase("h_compare", language), head, rows, left=2) if rows else None


def _signs(ends: tuple[float, float], like: float | None) -> str:
    return "[" + ", ".join(signed(end, like) for end in ends) + "]"


def _counts(found: Evaluation, language: Language) -> list[Table]:
    """Tables by entity, tag or class; of many classes the weakest."""
    keys = ("col_precision", "col_recall", "col_f1", "col_support", "col_predicted")
    head = [phrase(key, language) for key in keys]
    tables = []
    for name, first, title in (
        ("per_entity", "col_entity", "per_entity"),
        ("per_tag", "col_tag", "per_tag"),
        ("per_class", "col_class", "h_classes"),
    ):
        rows = [one for one in found.tables.get(name) or [] if one["support"] or one["predicted"]]
        said = phrase(title, language)
        if len(rows) > CLASSES_SHOWN and name == "per_class":
            left = len(rows) - CLASSES_SHOWN
            rows = sorted(rows, key=lambda one: (one["f1"], -one["support"]))[:CLASSES_SHOWN]
            said += phrase("weakest_of", language).format(n=CLASSES_SHOWN, all=CLASSES_SHOWN + left)
        cells = [
            [one["label"], *(f"{one[key]:.4f}" for key in ("precision", "recall", "f1")), count(one["support"]),
             count(one["predicted"])]
            for one in rows
        ]  # fmt: skip
        if cells:
            tables.append(table(said, [phrase(first, language), *head], cells))
    return tables


def _confusions(found: Evaluation, language: Language) -> Table | None:
    confusion = found.tables.get("confusion")
    pairs = confused_pairs(confusion)[:PAIRS_SHOWN] if confusion else []
    rows = [[one, other, count(times), f"{share:.1%}"] for one, other, times, share in pairs]
    keys = ("col_expected", "col_answered", "col_times", "col_share_of")
    head = [phrase(key, language) for key in keys]
    return table(phrase("pairs_note", language), head, rows, left=2) if rows else None


def _robust(found: Evaluation, language: Language) -> Table | None:
    """A line for each perturbation, a column for each strength; the last: answers turned at the greatest."""
    strengths = sorted({one.strength for curve in found.curves for one in curve.points})
    rows = []
    for curve in found.curves:
        at = {one.strength: one for one in curve.points}
        scores = [shown(at[strength].value) if strength in at else "–" for strength in strengths]
        turned = curve.points[-1].flipped
        rows.append([curve.name, *scores, "–" if turned is None else f"{turned:.1%}", count(curve.points[0].n)])
    head = [phrase("col_perturbation", language), *(f"{strength:g}" for strength in strengths)]
    head += [phrase("col_flipped", language), phrase("col_n_short", language)]
    return table(phrase("h_robust", language), head, rows) if rows else None


def _ledger(found: Evaluation, language: Language) -> Table | None:
    accounts = found.accounts
    rows = [
        [phrase(f"fate_{fate}", language)] + [count(side[fate]) for one in accounts for side in (one.rows, one.tokens)]
        for fate in ("read", *FATES)
        if fate == "read" or any(one.rows[fate] or one.tokens[fate] for one in accounts)
    ]
    head = [phrase("col_fate", language)]
    for one in accounts:
        part = phrase(f"part_{one.part}", language) if one.part in ("train", "validation", "test") else one.part
        head += [f"{part}: {phrase('col_rows', language)}", phrase("col_token_count", language)]
    return table(phrase("h_accounts", language), head, rows) if accounts else None


def _sentences(found: Evaluation, language: Language) -> list[str]:
    """Notes of the main figure, copies of training rows, what an attack came to, a ledger that is off."""
    said = []
    main = found.main
    if main is not None and main.note:
        said.append(f"{figure_name(main.name, language)}: {note_words(main.note, language)}")
    if main is not None and found.copies:
        clean = found.without_copies.get(main.name)
        if clean is None:
            said.append(phrase("copies_all", language).format(n=count(found.copies)))
        else:
            said.append(
                phrase("copies", language).format(
                    n=count(found.copies),
                    name=figure_name(main.name, language),
                    value=shown(clean.value),
                    interval=f" {_between(clean)}" if clean.interval else "",
                    before=shown(main.value),
                )
            )
    attack = found.attack
    if attack is not None:
        shares = {
            name: "–" if attack[key] is None else f"{attack[key]:.1%}"
            for name, key in (("before", "accuracy_before"), ("after", "accuracy_under_attack"), ("success", "success"))
        }
        queries = "–" if attack["mean_queries"] is None else f"{attack['mean_queries']:.0f}"
        budget, attacked = count(attack["budget_queries"]), count(attack["n_attacked"])
        told = phrase("attack_note", language).format(budget=budget, attacked=attacked, queries=queries, **shares)
        said.append(f"{phrase('attack', language)}: {told}")
    said += [f"{one.part}: {phrase('does_not_add_up', language)}" for one in found.accounts if not one.adds_up]
    return said
