"""`ratoon recipes`: the recipes that ship, and what each of them is made of."""

from __future__ import annotations

import re
from typing import Any

import click

from ratoon.cli.noun import Noun


@click.group(cls=Noun)
def command() -> None:
    """List the recipes that ship, or show one: `ratoon recipes`, `ratoon recipes NAME`."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_(as_json: bool) -> None:
    """List the recipes."""
    from ratoon.cli.output import aligned, answer, answer_json, size_words, talk
    from ratoon.recipe import shipped

    found = [facts(name) for name in shipped()]
    if as_json:
        answer_json({"recipes": found})
        return
    rows: list[tuple[str, ...]] = [("name", "verb", "language", "learns", "starts from", "what")]
    for one in found:
        text = f"{one['corpus']['name']}, {size_words(one['corpus']['bytes'])}" if one["corpus"] else "your own"
        text = one["task"] or text
        start = (
            f"{one['init']['name']}, {size_words(one['init']['bytes'])}" if one["init"] else one["base"] or "nothing"
        )
        rows.append((one["name"], one["verb"], one["language"], text, start, one["what"]))
    answer("\n".join(aligned(rows, left=5)))
    talk("`ratoon recipes NAME` shows one, `ratoon pretrain NAME` or `ratoon finetune NAME` runs it")


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the recipe and what is known of it as JSON.")
def show(name: str, as_json: bool) -> None:
    """Show the recipe NAME: the file on stdout; what it needs, and what it derives, beside it."""
    from ratoon.cli.output import answer, answer_json, size_words, talk
    from ratoon.recipe import shipped

    path = shipped().get(name)
    found = facts(name)
    resolved, found["derived"] = _resolved(name)
    if as_json:
        answer_json({**found, "recipe": resolved})
        return
    answer(_file(name, path).rstrip())
    for one in (found["corpus"], found["init"]):
        if one is not None:
            talk(f"{one['name']}: {one['what']}; {size_words(one['bytes'])}, licence: {one['licence']}")
    if found["base"] in shipped():
        talk(f"{found['base']}: what `ratoon pretrain {found['base']}` makes, to be run first")
    for derived in found["derived"]:
        talk(f"derived {derived['key']} = {derived['value']} ({derived['reason']})")
    talk(f"next: ratoon {found['verb']} {name}")


def _file(name: str, path: Any) -> str:
    from pathlib import Path

    return (path if path is not None else Path(name)).read_text(encoding="utf-8")  # type: ignore[no-any-return]


def facts(name: str) -> dict[str, Any]:
    """A recipe as plain values: what it is, its language, and what of the catalogue it needs."""
    from ratoon.recipe import load, read_table, shipped
    from ratoon.recipe.tuning import load_tuning

    table, _ = read_table(name)
    what = _first_comment(_file(name, shipped().get(name)))
    if "task" in table:
        tuned = load_tuning(name)
        return {
            "name": name,
            "verb": "finetune",
            "what": what,
            "language": tuned.language,
            "task": str(tuned.task.get("kind")),
            "corpus": None,
            "init": _catalogued(tuned.model.base),
            "base": tuned.model.base,
        }
    recipe = load(name)
    return {
        "name": name,
        "verb": "pretrain",
        "what": what,
        "language": recipe.language,
        "task": None,
        "corpus": _catalogued(recipe.data.corpus),
        "init": _catalogued(recipe.model.init),
        "base": recipe.model.init,
    }


def _resolved(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The recipe as a run would write it, and what was derived for that."""
    from ratoon.recipe import load, read_table, settle
    from ratoon.recipe.tuning import load_tuning, settle_tuning

    if "task" in read_table(name)[0]:
        return settle_tuning(load_tuning(name)).as_dict(), []  # the rest follows from the rows
    plan = settle(load(name))
    return plan.as_dict(), [{"key": one.key, "value": one.value, "reason": one.reason} for one in plan.derived]


def _first_comment(text: str) -> str:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# ").strip())
    # The first sentence: the list is one line each.
    return re.split(r"(?<=[.])\s", " ".join(lines), maxsplit=1)[0]


def _catalogued(name: str | None) -> dict[str, Any] | None:
    from ratoon.base.catalog import ENTRIES
    from ratoon.cli.pull import facts as entry_facts

    one = ENTRIES.get(name) if name is not None else None
    return None if one is None else entry_facts(one)
