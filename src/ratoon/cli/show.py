"""`ratoon finetune --show N`: records as the model will see them, with what is learned in colour.

Decides colours and layout; what stands in an example is the task's, shown through `tasks/show.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.recipe.tuning import TuneRecipe

PARTS = {"source": ", what the encoder reads", "text": "", "beside": ", the rejected answer"}
"""Parts of an example in the order in which they are printed, and how each is called."""


def show_records(recipe: TuneRecipe, count: int, *, as_json: bool) -> None:
    """Print the first `count` training records as tokens: plain what is read, green what is learned, with targets."""
    from ratoon.adapt.methods import method_of
    from ratoon.cli.finetune import read_material
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.cli.tokenizer import tokenizer_of
    from ratoon.tasks.show import show_parts

    method = method_of(dict(recipe.method))
    name = recipe.model.base or recipe.model.tokenizer
    if name is None:
        from ratoon.base.errors import ConfigError

        raise ConfigError(
            "the tokenizer is trained with the run: there are no tokens to show yet",
            where="model.tokenizer",
            fix="name a tokenizer to see the rows",
        )
    tokenizer = tokenizer_of(name)
    material = read_material(recipe, tokenizer, talk, leading=method.virtual_tokens)
    places: dict[str, list[str]] = {}
    for record in material.parts.train:
        places.setdefault(record.id, []).append(record.place)
    head = material.task.head()
    labels = () if head is None or head.problem == "number" else head.labels
    found: list[dict[str, Any]] = []
    for example in material.train[:count]:
        shown = {
            part: [token._asdict() for token in tokens]
            for part, tokens in show_parts(example, tokenizer, labels).items()
        }
        found.append({"id": example.name, "place": " or ".join(places.get(example.name, [])[:3]), **shown})
    if as_json:
        answer_json({"examples": found})
        return
    for one in found:
        for part, words in PARTS.items():
            if part in one:
                tokens = one[part]
                learned = sum(1 for token in tokens if token["weight"] > 0)
                answer(click.style(f"{one['place']}{words}  {len(tokens)} tokens, {learned} learned", bold=True))
                answer("".join(_coloured(token) for token in tokens))
                answer("")
    talk("plain: only read; green: learned; [label] behind a token: what is asked there")


def _coloured(token: dict[str, Any]) -> str:
    text = token["text"]
    if token["weight"] <= 0:
        return str(text)
    mark = "" if token["target"] is None else click.style(f"[{token['target']}]", fg="cyan")
    return click.style(text, fg="green", bold=True) + mark
