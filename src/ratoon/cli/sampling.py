"""The switches of `generate` and `chat` that say how the next token is chosen: `Sampling`'s settings on a command line.

What they mean, and which do not go together, is decided in `generate/sample.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from ratoon.generate.lm import LanguageModel
    from ratoon.generate.rows import Generated
    from ratoon.generate.sample import Sampling

F = TypeVar("F", bound=Callable[..., Any])
DTYPES = ("float32", "bfloat16", "float16")
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}

_SAMPLING = (
    click.option("--max-new-tokens", type=int, help="The most tokens of an answer; 128 if not given, in chat 512."),
    click.option("--min-new-tokens", type=int, help="The end is out of reach until so many are there."),
    click.option("--temperature", type=float, help="Scores are divided by it before drawing; 0: the likeliest token."),
    click.option("--top-k", type=int, help="Draw among the K likeliest tokens."),
    click.option("--top-p", type=float, help="Draw among the likeliest that together reach this probability."),
    click.option("--min-p", type=float, help="Draw among those at least this fraction as likely as the likeliest."),
    click.option("--repetition-penalty", type=float, help="Above 1: what occurred becomes less likely."),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help="A text that ends the answer (\\n, \\t and \\\\ are read as such).",
    ),
    click.option("--seed", type=int, help="The seed of what is drawn; 0 if not given."),
)
_BEAMS = (
    click.option("--beams", type=int, help="Beam search with so many sequences side by side."),
    click.option("--length-penalty", type=float, help="Beams: above 0 favours long answers."),
    click.option("--early-stopping", is_flag=True, help="Beams: end once as many answers as beams are complete."),
)
_MODEL = (
    click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        default="float32",
        show_default=True,
        help="Of the weights: float32 is exact, bfloat16 takes half the memory and time.",
    ),
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1 …; a GPU if there is one."),
)
_SHORTEN = click.option(
    "--shorten", type=click.Choice(["left"]), help="Cut what is longer than the context on its left, said aloud."
)


def model_options(command: F) -> F:
    """--dtype and --device."""
    return with_options(_MODEL)(command)


def sampling_options(*, beams: bool) -> Callable[[F], F]:
    """The switches of `Sampling`, with those of beam search or without, and --shorten."""
    return with_options((*_SAMPLING, *(_BEAMS if beams else ()), _SHORTEN))


def sampling_of(given: dict[str, Any], defaults: dict[str, Any] | None = None) -> Sampling:
    """The switches as `Sampling`; `defaults` for those not given. Raises `ConfigError` for what is impossible."""
    from ratoon.base.errors import ConfigError
    from ratoon.base.settings import build
    from ratoon.generate.sample import Sampling

    chosen = {key: value for key, value in given.items() if value is not None and value is not False and value != ()}
    table = {**(defaults or {}), **chosen}
    if "beams" in table:
        table["num_beams"] = table.pop("beams")
    if "stop" in table:
        table["stop"] = tuple(_unescaped(text) for text in table["stop"])
    try:
        return build(Sampling, table, where="command line")
    except ConfigError as error:
        raise ConfigError(error.found, where=error.where, fix="--help lists the switches with what they mean") from None


def load_model(name: str, dtype: str, device: str | None) -> LanguageModel:
    """The MODEL of a verb. Raises `ConfigError` for a device that this machine has not."""
    from ratoon.base.errors import ConfigError
    from ratoon.generate.lm import load

    if device is not None:
        import torch

        try:
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = str(error).strip().splitlines()[0][:160]
            raise ConfigError(f"the device '{device}' cannot be used: {reason}", where="--device") from None
    return load(name, dtype=dtype, device=device)


def ending(answer: Generated, seconds: float) -> str:
    """How an answer went, in one sentence."""
    why = {
        "eos": "the model ended it",
        "stop": "a stop text",
        "length": "as many tokens as asked for",
        "context": "the context is full",
    }[answer.finish]
    tokens = len(answer.ids)
    return f"{tokens:,} tokens after {answer.prompt_tokens:,}, {tokens / max(seconds, 1e-9):,.0f} tokens/s; end: {why}"


def _unescaped(text: str) -> str:
    out, at = "", 0
    while at < len(text):
        pair = text[at : at + 2]
        out += _ESCAPES.get(pair, text[at])
        at += 2 if pair in _ESCAPES else 1
    return out


def with_options(options: tuple[Callable[[F], F], ...]) -> Callable[[F], F]:
    """Options as one decorator, in the order of the help."""

    def put(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return put
