"""`ratoon chat`: a conversation with a model in the terminal, or through a pipe.

Decides what a line means, what is remembered, and what happens when that outgrows the context. How messages become
tokens is `text/chat.py`'s, how an answer is made `generate/`'s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ratoon.cli.sampling import ending, load_model, model_options, sampling_of, sampling_options

if TYPE_CHECKING:
    from ratoon.generate.lm import LanguageModel
    from ratoon.generate.rows import Generated
    from ratoon.generate.sample import Sampling

Message = dict[str, str]
TEMPERATURE, TOP_P, MOST_NEW_TOKENS = 0.7, 0.95, 512

HELP = """/reset          forget the conversation
/system [TEXT]  set what the model is told before the conversation, and begin anew; without TEXT: nothing
/retry          answer the last message again, with another seed
/save FILE      write the conversation as JSON
/help           this list
/quit           leave (so does the end of the input)
//…             a message that begins with a slash"""


@click.command()
@click.argument("model")
@click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")
@click.option("--plain", is_flag=True, help="No chat: the model goes on from the text so far. For models never taught.")
@sampling_options(beams=False)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print the whole conversation as one JSON object at the end.")
def command(
    model: str,
    system: str | None,
    plain: bool,
    shorten: Literal["left"] | None,
    dtype: str,
    device: str | None,
    as_json: bool,
    **given: Any,
) -> None:
    """Talk with MODEL, a line a message; answers come on stdout, everything else on stderr. `/help` lists commands.

    By default temperature is 0.7 and top-p 0.95; `--temperature 0` takes the likeliest token each time. A conversation
    longer than the context is refused, or with `--shorten left` its oldest messages are left out, said each time.
    """
    from ratoon.base.errors import ConfigError, RatoonError
    from ratoon.cli.output import answer_json, talk

    if plain and system is not None:
        raise ConfigError("--system has no effect with --plain", where="command line", fix="leave out one of the two")
    defaults: dict[str, Any] = {"max_new_tokens": MOST_NEW_TOKENS, "temperature": TEMPERATURE}
    if given["temperature"] != 0 and not any(given[name] is not None for name in ("top_k", "top_p", "min_p")):
        defaults["top_p"] = TOP_P
    sampling = sampling_of(given, defaults)
    lm = load_model(model, dtype, device)
    if not plain:
        _can_chat(lm)
    talker = Conversation(lm, sampling, shorten, plain=plain, system=system, quiet=as_json)
    at_terminal = sys.stdin.isatty()
    talk(f"{model}: {'text to go on from' if plain else 'a message'}, or /help")
    for line in _lines(at_terminal):
        try:
            if not talker.hear(line):
                break
        except RatoonError as error:
            if not at_terminal:
                raise
            talk(str(error))
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            talk("[stopped]")
    if as_json:
        answer_json({"model": model, "plain": plain, "sampling": sampling.model_dump(mode="json"), **talker.as_dict()})


@dataclass
class Conversation:
    """What was said, and what a new line does to it. In plain mode the conversation is one text."""

    lm: LanguageModel
    sampling: Sampling
    shorten: Literal["left"] | None
    plain: bool = False
    system: str | None = None
    quiet: bool = False
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    undo: str = ""
    answers: list[dict[str, Any]] = field(default_factory=list)

    def hear(self, line: str) -> bool:
        """Answer a line, or do what its command says; False means the end. Raises `RatoonError` for what cannot be
        answered; the conversation is then as it was before the line."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            return self._command(name.strip(), rest.strip())
        line = line[1:] if line.startswith("//") else line
        if not line.strip():
            return True
        if self.plain:
            self._go_on(line)
        else:
            self._reply([*self.messages, {"role": "user", "content": line}], self.sampling)
        return True

    def as_dict(self) -> dict[str, Any]:
        """The conversation as plain values."""
        said: dict[str, Any] = {"text": self.text} if self.plain else {"messages": self._all(self.messages)}
        return {**said, "answers": self.answers}

    # -- commands --------------------------------------------------------------------------------------------------

    def _command(self, name: str, rest: str) -> bool:
        from ratoon.cli.output import talk

        if name in ("quit", "exit", "bye"):
            return False
        if name == "help":
            talk(HELP)
        elif name == "reset":
            self._forget()
            talk("[forgotten]")
        elif name == "system" and not self.plain:
            self.system = rest or None
            self._forget()
            talk("[the model is told this first, and the conversation begins anew]" if rest else "[told nothing]")
        elif name == "retry":
            self._retry()
        elif name == "save":
            self._save(rest)
        else:
            talk(f"there is no command /{name}; /help lists them (a message may begin with //)")
        return True

    def _forget(self) -> None:
        self.messages, self.text, self.undo, self.answers = [], "", "", []

    def _retry(self) -> None:
        from ratoon.cli.output import talk

        if not self.answers:
            talk("[there is no answer yet]")
            return
        seed = self.answers[-1]["seed"] + 1
        sampling = self.sampling.model_copy(update={"seed": seed})
        if self.plain:
            before, self.text = self.text, self.undo
            try:
                self._continue(sampling)
            except BaseException:
                self.text = before
                raise
        else:
            self._reply(self.messages[:-1], sampling)

    def _save(self, name: str) -> None:
        from ratoon.cli.output import talk
        from ratoon.store.atomic import write_json

        if not name:
            talk("[say where: /save FILE]")
            return
        path = Path(name).expanduser()
        if path.is_dir() or not path.parent.is_dir():
            talk(f"[not saved: {path} is {'a folder' if path.is_dir() else 'in a folder that does not exist'}]")
            return
        write_json(path, {"model": self.lm.name, **self.as_dict()})
        talk(f"[saved: {path}]")

    # -- answers ---------------------------------------------------------------------------------------------------

    def _reply(self, messages: list[Message], sampling: Sampling) -> None:
        """Answer the last of `messages`; they and the answer are the conversation from then on."""
        shown = self._fitting(messages, sampling)
        pieces: list[str] = []
        began = time.perf_counter()
        try:
            answer = self.lm.chat(
                self._all(shown), sampling, shorten=self.shorten, on_text=lambda _, text: self._show(text, pieces)
            )
        except KeyboardInterrupt:
            self._end(None, sampling, 0.0)
            if pieces:  # what was said before the interruption was said
                self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
            raise
        self.messages = [*messages, {"role": "assistant", "content": answer.text or ""}]
        self._end(answer, sampling, time.perf_counter() - began)

    def _fitting(self, messages: list[Message], sampling: Sampling) -> list[Message]:
        """The latest messages that leave room for an answer, the system's apart. Raises `DataError` when they do not
        all fit the context and nothing was said about shortening."""
        from ratoon.base.errors import DataError
        from ratoon.cli.output import talk

        tokens, context = self._tokens(messages), self.lm.context_tokens
        if tokens <= context and (self.shorten is None or tokens <= self._room(sampling)):
            return messages
        if self.shorten is None:
            raise DataError(
                f"the conversation has {tokens:,} tokens",
                where=f"message {len(messages)}",
                expected=f"at most {context:,}, the model's context",
                fix="/reset begins anew; `ratoon chat --shorten left` leaves the oldest messages out instead",
            )
        kept = messages
        while len(kept) > 2 and self._tokens(kept) > self._room(sampling):
            kept = kept[2:]  # a question and its answer
        if len(kept) < len(messages):
            talk(
                f"[the oldest {len(messages) - len(kept)} messages are left out: the conversation outgrew the context]"
            )
        return kept

    def _room(self, sampling: Sampling) -> int:
        context = self.lm.context_tokens
        return max(context - sampling.max_new_tokens + 1, (context + 1) // 2)

    def _tokens(self, messages: list[Message]) -> int:
        from ratoon.text.chat import render

        assert self.lm.tokenizer is not None
        return len(render(self.lm.tokenizer, self._all(messages), add_generation_prompt=True).ids)

    def _all(self, messages: list[Message]) -> list[Message]:
        return [*([{"role": "system", "content": self.system}] if self.system is not None else []), *messages]

    def _go_on(self, line: str) -> None:
        before = self.text, self.undo
        self.text += line
        self.undo = self.text
        try:
            self._continue(self.sampling)
        except BaseException:
            if self.text == self.undo:  # nothing was added
                self.text, self.undo = before
            raise

    def _continue(self, sampling: Sampling) -> None:
        """Plain mode: go on from the text so far."""
        from ratoon.cli.output import talk

        pieces: list[str] = []
        began = time.perf_counter()
        try:
            answer = self.lm.generate(
                self.text, sampling, shorten=self.shorten, on_text=lambda _, text: self._show(text, pieces)
            )[0]
        except KeyboardInterrupt:
            self._end(None, sampling, 0.0)
            self.text += "".join(pieces)
            raise
        self.text += answer.text or ""
        self._end(answer, sampling, time.perf_counter() - began)
        if answer.finish == "eos":
            talk("[the model ended the text; /reset begins a new one]")

    def _show(self, text: str, pieces: list[str]) -> None:
        pieces.append(text)
        if not self.quiet:
            click.echo(text, nl=False)

    def _end(self, answer: Generated | None, sampling: Sampling, seconds: float) -> None:
        from ratoon.cli.output import talk

        if not self.quiet:
            click.echo()
        if answer is None:
            return
        if answer.dropped_prompt_tokens:
            talk(f"[{answer.dropped_prompt_tokens:,} tokens were cut from the left of what the model saw]")
        talk(f"[{ending(answer, seconds)}]")
        self.answers.append(
            {
                "text": answer.text,
                "finish": answer.finish,
                "seed": sampling.seed,
                "tokens": len(answer.ids),
                "prompt_tokens": answer.prompt_tokens,
                "dropped_prompt_tokens": answer.dropped_prompt_tokens,
            }
        )


def _can_chat(lm: LanguageModel) -> None:
    """Raises `ArtifactError` for a model without a chat template, or one that was never taught to answer with it."""
    from ratoon.base.errors import ArtifactError

    fix = f"`ratoon chat {lm.name} --plain` goes on from your text instead; or use a model that was made for chat"
    if lm.tokenizer is None or lm.tokenizer.chat_template is None:
        raise ArtifactError(
            f"'{lm.name}' has no {'tokenizer' if lm.tokenizer is None else 'chat template'}: it is no chat model",
            where=lm.facts.get("path"),
            expected="a chat template in tokenizer_config.json or chat_template.jinja",
            fix=fix,
        )
    if not lm.can_chat:
        raise ArtifactError(
            f"'{lm.name}' was pretrained on text only: it has a chat template, but was never taught to answer with it",
            where=lm.facts.get("path"),
            expected="a model fine-tuned on conversations",
            fix=fix,
        )


def _lines(at_terminal: bool) -> Iterator[str]:
    """Lines from the terminal, with editing and history, or from a pipe."""
    from ratoon.base.errors import DataError

    if at_terminal:
        try:
            import readline  # noqa: F401 - editing and history of `input`
        except ImportError:
            pass
        while True:
            try:
                if sys.stdout.isatty():
                    yield input("\n> ")
                else:
                    click.echo("\n> ", err=True, nl=False)
                    yield input()
            except EOFError:
                return
    number = 0
    while True:
        number += 1
        raw = sys.stdin.buffer.readline()
        if not raw:
            return
        try:
            yield raw.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise DataError("the line is not UTF-8", where=f"stdin:{number}", expected="text as UTF-8") from None
