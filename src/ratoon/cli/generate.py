"""`ratoon generate`: a model goes on from prompts. How is `generate/decode.py`'s."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, Literal

import click

from ratoon.cli.sampling import ending, load_model, model_options, sampling_of, sampling_options

if TYPE_CHECKING:
    from ratoon.generate.rows import Generated


@click.command()
@click.argument("model")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT…")
@sampling_options(beams=True)
@click.option("--stream/--no-stream", default=None, help="Print text as it comes; on a terminal that is the default.")
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print answers, token ids, log probabilities and how they ended.")
def command(
    model: str,
    prompts: tuple[str, ...],
    shorten: Literal["left"] | None,
    stream: bool | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Let MODEL (a run, a folder, a GGUF file, a catalogue name) go on from each PROMPT; `-` reads one from stdin.

    The answer is what the model adds, without the prompt. By default the likeliest token is taken each time; give a
    --temperature to draw instead.
    """
    from ratoon.cli.output import answer, answer_json, talk

    sampling = sampling_of(given)
    streaming = _streaming(stream, len(prompts), sampling.num_beams, as_json)
    texts = [_stdin() if prompt == "-" else prompt for prompt in prompts]
    lm = load_model(model, dtype, device)
    began = time.perf_counter()
    answers = lm.generate(
        texts,
        sampling,
        shorten=shorten,
        logprobs=as_json,
        on_text=(lambda number, text: click.echo(text, nl=False)) if streaming else None,
    )
    seconds = time.perf_counter() - began
    if streaming:
        click.echo()
    for number, one in enumerate(answers, start=1):
        if one.dropped_prompt_tokens:
            talk(
                f"prompt {number}: {one.dropped_prompt_tokens:,} tokens were cut from its left, "
                f"{one.prompt_tokens:,} were kept"
            )
    if as_json:
        answer_json(_facts(model, dtype, texts, answers, sampling.model_dump(mode="json"), seconds))
        return
    for prompt, one in zip(texts, answers, strict=True):
        if len(texts) > 1:
            talk(f"> {prompt}")
        if not streaming:
            answer(str(one))
        talk(f"[{ending(one, seconds)}]")


def _streaming(asked: bool | None, prompts: int, beams: int, as_json: bool) -> bool:
    from ratoon.base.errors import ConfigError

    hindrance = (
        "there are several prompts"
        if prompts > 1
        else "beam search has no text before its end"
        if beams > 1
        else "--json prints one object at the end"
        if as_json
        else None
    )
    if asked and hindrance:
        raise ConfigError(f"--stream cannot be had: {hindrance}", where="command line", fix="leave out one of the two")
    return hindrance is None and (sys.stdout.isatty() if asked is None else asked)


def _stdin() -> str:
    """All of stdin as a prompt, without the line end that closes it."""
    from ratoon.base.errors import DataError

    raw = sys.stdin.buffer.read()
    try:
        return raw.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 at byte {error.start}", where="stdin", expected="text encoded as UTF-8") from None


def _facts(
    model: str, dtype: str, prompts: list[str], answers: list[Generated], sampling: dict[str, Any], seconds: float
) -> dict[str, Any]:
    return {
        "model": model,
        "dtype": dtype,
        "sampling": sampling,
        "seconds": seconds,
        "answers": [
            {
                "prompt": prompt,
                "text": one.text,
                "finish": one.finish,
                "ids": one.ids,
                "logprobs": one.logprobs,
                "score": one.score,
                "prompt_tokens": one.prompt_tokens,
                "dropped_prompt_tokens": one.dropped_prompt_tokens,
            }
            for prompt, one in zip(prompts, answers, strict=True)
        ],
    }
