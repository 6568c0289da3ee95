"""`ratoon finetune --show N`: records as the model will see them, with what is learned in colour.

Decides colours and layout; what stands in an example is the task's, shown through `tasks/show.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.recipe.tuning import TuneRecipe


def show_records(recipe: TuneRecipe, count: int, *, as_json: bool) -> None:
    """Print the first `count` training records as tokens: plain what is read, green what is learned, with targets."""
    from ratoon.adapt.methods import method_of
    from ratoon.cli.finetune import read_material
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.cli.tokenizer import tokenizer_of
    from ratoon.tasks.show import show

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
    places = {record.id: record.place for record in material.parts.train}
    head = material.task.head()
    labels = () if head is None or head.kind == "span" else head.labels
    found: list[dict[str, Any]] = []
    for example in material.train[:count]:
        shown = [
            {"token": text, "weight": weight, "target": _named(target, labels)}
            for text, weight, target in show(example, tokenizer)
        ]
        found.append({"id": example.name, "place": places.get(example.name, ""), "tokens": shown})
    if as_json:
        answer_json({"examples": found})
        return
    for one in found:
        learned = sum(1 for token in one["tokens"] if token["weight"] > 0)
        answer(click.style(f"{one['place']}  {len(one['tokens'])} tokens, {learned} learned", bold=True))
        answer("".join(_coloured(token) for token in one["tokens"]))
        answer("")
    talk("plain: only read; green: learned; [label] behind a token: what is asked there")


def _named(target: Any, labels: tuple[str, ...]) -> Any:
    """A label's name in place of its number."""
    number = int(target) if str(target).isdigit() else -1
    return labels[number] if 0 <= number < len(labels) else target


def _coloured(token: dict[str, Any]) -> str:
    text = token["token"]
    if token["weight"] <= 0:
        return str(text)
    mark = "" if token["target"] is None else click.style(f"[{token['target']}]", fg="cyan")
    return click.style(text, fg="green", bold=True) + mark
