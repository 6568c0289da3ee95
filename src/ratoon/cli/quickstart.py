"""`ratoon quickstart`: the whole way from a text to a GPT that writes, as a recipe made of a few switches.

It goes the way of `ratoon pretrain`; nothing here is done otherwise.
"""

from __future__ import annotations

from typing import Any

import click

CORPORA = {"en": "python-docs", "zh": "reviews-zh"}
MINUTES = 3.0


@click.command()
@click.option("--lang", type=click.Choice(["en", "zh"]), default="en", help="English or Chinese: corpus and page.")
@click.option("--corpus", metavar="FILE", multiple=True, help="Your own text: a file or folder, or a catalogue name.")
@click.option("--minutes", type=float, default=None, help=f"Minutes of training; {MINUTES:g} if nothing is given.")
@click.option(
    "--size",
    type=click.Choice(["tiny", "small", "medium", "large", "gpt2"]),
    default=None,
    help="Size of the model; derived from the minutes if not given.",
)
@click.option("--name", default=None, help="The run's name; `quickstart`, or `quickstart-2` … if that is taken.")
@click.option("--resume", is_flag=True, help="Go on with the run of that name.")
@click.option("--json", "as_json", is_flag=True, help="Print the run's final facts as JSON.")
def command(
    lang: str,
    corpus: tuple[str, ...],
    minutes: float | None,
    size: str | None,
    name: str | None,
    resume: bool,
    as_json: bool,
) -> None:
    """Prepare, train a tokenizer, pretrain, evaluate, generate: a GPT that writes, and a page about it.

    Downloads nothing: the default text is the documentation of Python itself. The answer is the page's path.
    """
    from ratoon.cli.output import answer, answer_json
    from ratoon.cli.pretrain import run_recipe
    from ratoon.recipe import load

    run = run_recipe(load(recipe(lang, corpus, minutes, size, _name(name, resume))), resume=resume)
    if as_json:
        answer_json(run.read_state())
    else:
        answer(str(run.report))


def recipe(lang: str, corpus: tuple[str, ...], minutes: float | None, size: str | None, name: str) -> dict[str, Any]:
    """The recipe that the switches mean."""
    import yaml

    from ratoon.cli.prepare import named
    from ratoon.recipe import shipped

    table: dict[str, Any] = yaml.safe_load(shipped()[CORPORA[lang]].read_text(encoding="utf-8"))
    table |= {"name": name, "minutes": minutes if minutes is not None else MINUTES}
    if corpus:
        table["data"] = named(corpus)
        table.pop("samples", None)
    if size is not None:
        table["model"] = {"size": size}
    return table


def _name(name: str | None, resume: bool) -> str:
    from ratoon.store.runs import Run

    if name is not None or resume:
        return name or "quickstart"
    taken = {run.name for run in Run.all()}
    return next(
        free
        for number in range(1, len(taken) + 2)
        if (free := "quickstart" + (f"-{number}" if number > 1 else "")) not in taken
    )
