"""Foreign Jinja templates, run where they can do no harm.

A chat template comes with a model from anywhere. It sees messages and tools, nothing else; it can neither reach
Python's insides nor run or grow without end. What it may call is what Transformers offers to templates, so that the
same template gives the same text in both. What messages are and what is learned of them is `chat.py`'s.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ratoon.base.errors import ArtifactError, DataError

MAX_STEPS = 1_000_000
"""Passes through loops and calls; a conversation of a thousand messages needs some ten thousand."""
MAX_CHARACTERS = 20_000_000
"""Characters or entries of any one value, and characters written in all."""
MAX_SECONDS = 10.0

BEGIN_ANSWER, END_ANSWER = "\ufdd0", "\ufdd1"
"""Noncharacters that mark what stands inside `{% generation %}`; the renderer takes them out again."""

_WIDE_FORMAT = re.compile(r"\d{6,}|%[^a-zA-Z%]*\*")


class _Refused(Exception):
    """The template went over a limit."""


class _Raised(TemplateError):
    """The template itself said no, with `raise_exception`."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self) -> None:
        self.steps = self.characters = 0
        self.until = time.monotonic() + MAX_SECONDS

    def step(self, steps: int = 1, characters: int = 0) -> None:
        self.steps += steps
        self.characters += characters
        if self.steps > MAX_STEPS:
            raise _Refused(f"it takes more than {MAX_STEPS:,} steps")
        if self.characters > MAX_CHARACTERS:
            raise _Refused(f"it writes more than {MAX_CHARACTERS:,} characters")
        if self.steps % 256 == 0 and time.monotonic() > self.until:
            raise _Refused(f"it runs for more than {MAX_SECONDS:.0f} seconds")

    def value(self, value: Any) -> Any:
        if isinstance(value, (str, bytes, list, tuple, dict, set)) and len(value) > MAX_CHARACTERS:
            raise _Refused(f"it makes a value of more than {MAX_CHARACTERS:,} characters")
        if isinstance(value, int) and value.bit_length() > 4096:
            raise _Refused("it makes a number of more than 4,096 bits")
        return value

    def arguments(self, given: Iterable[Any]) -> None:
        for argument in given:
            if isinstance(argument, int) and abs(argument) > MAX_CHARACTERS:
                raise _Refused(f"it asks for {argument:,} of something")


_budget: ContextVar[_Budget] = ContextVar("_budget")


class _Generation(Extension):
    """`{% generation %} … {% endgeneration %}`: what the assistant says, between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        return f"{BEGIN_ANSWER}{caller()}{END_ANSWER}"


class _Counting(NodeTransformer):
    """Puts a counter into every loop and every `~`, which the sandbox itself does not see."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = _filter(cast(nodes.Expr, node.iter), "_counted", nodes.Const(written))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")


def _filter(value: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    node = nodes.Filter(value, name, list(arguments), [], None, None)
    node.set_environment(value.environment)  # type: ignore[arg-type]
    for inner in (node, *arguments):
        inner.set_lineno(value.lineno)
    return node


class _Names(Namespace):
    """Jinja's namespace without names that lead into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        given = dict(*args[1:], **kwargs)
        for name in given:
            _Names._check(name)
        Namespace.__init__(args[0], given)

    def __setitem__(self, name: str, value: Any) -> None:
        _Names._check(name)  # an attribute of a namespace is what a template stored in it
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"it stores the name '{name}', which leads into Python's insides")


class _Dict:
    """`dict(…)` for templates: the call and nothing else."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox that counts every loop pass and call, and refuses rather than ignores."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=_written,
        )
        self.filters = {name: _guarded(function) for name, function in self.filters.items()}
        self.filters.update(tojson=_to_json, _counted=_counted, _joined=_joined)
        self.globals.update(raise_exception=_raise, strftime_now=_now, namespace=_Names, dict=_Dict())
        self.macro_characters = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for other in tree.find_all((nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport)):
            raise SecurityError(f"it loads another template (line {other.lineno})")
        macros = [*tree.find_all(nodes.Macro), *tree.find_all(nodes.CallBlock)]
        self.macro_characters = sum(len(data.data) for macro in macros for data in macro.find_all(nodes.TemplateData))
        _Counting().visit(tree)
        return tree

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step(characters=__self.macro_characters if isinstance(__obj, Macro) else 0)
        budget.arguments([*args, *kwargs.values()])
        return budget.value(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _budget.get()
        budget.step()
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.arguments([len(value) * times])
        if operator == "**" and not (isinstance(right, (int, float)) and abs(right) <= 1000):
            raise _Refused("it raises to a power above 1,000")
        if operator == "%" and isinstance(left, str):
            _check_format(left)
        return budget.value(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_format(value.__self__)
        return wrapped

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise SecurityError(f"it reaches for '{attribute}' of a {type(obj).__name__}")


def _check_format(text: str) -> None:
    if _WIDE_FORMAT.search(text):
        raise _Refused("it formats to a width of a million characters or more")


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        budget.arguments([*args, *kwargs.values()])
        if function.__name__ == "do_format":
            _check_format(str(args[0]))
        return budget.value(function(*args, **kwargs))

    return guarded


def _written(value: Any) -> Any:
    if isinstance(value, str) and (budget := _budget.get(None)) is not None:
        budget.step(0, len(value))
    return value


def _counted(values: Any, characters: int) -> Any:
    budget = _budget.get()
    if isinstance(values, (str, list, tuple, dict, range)):  # loops ask these for their length
        budget.step(len(values) + 1, len(values) * characters)
        return values
    return _each(values, characters, budget)


def _each(values: Iterable[Any], characters: int, budget: _Budget) -> Iterator[Any]:
    for value in values:
        budget.step(1, characters)
        yield value


def _joined(parts: list[Any]) -> str:
    budget = _budget.get()
    budget.step()
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > MAX_CHARACTERS:
        raise _Refused(f"it makes a value of more than {MAX_CHARACTERS:,} characters")
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    _budget.get().step()
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise _Raised(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> Template:
    token = _budget.set(_Budget())  # constants are worked out while compiling
    try:
        return _Sandbox().from_string(source)
    finally:
        _budget.reset(token)


def run(source: str, values: Mapping[str, Any]) -> str:
    """The text that the template `source` makes of `values`.

    Raises `DataError` when the template itself refuses the values or cannot be applied to them, `ArtifactError` when
    it is no template, reaches where it must not, or goes over a limit.
    """
    token = None
    try:
        template = _compiled(source)
        token = _budget.set(_Budget())
        return template.render(**values)
    except TemplateSyntaxError as error:
        raise _broken(f"it is not readable: {error.message} (line {error.lineno})") from None
    except (_Refused, SecurityError) as error:
        raise _broken(str(error)) from None
    except (RecursionError, MemoryError, OverflowError) as error:
        raise _broken(f"it grows without end ({type(error).__name__})") from None
    except _Raised as error:
        raise DataError(
            f"the chat template refuses these messages: {error.message}",
            where="chat template",
            expected="messages in the order and with the roles that the model was made for",
        ) from None
    except Exception as error:
        raise DataError(
            f"the chat template cannot render these messages: {error}",
            where="chat template",
            expected="messages with 'role' and 'content', as the template reads them",
        ) from None
    finally:
        if token is not None:
            _budget.reset(token)


def _broken(reason: str) -> ArtifactError:
    return ArtifactError(
        f"the chat template is refused: {reason}",
        where="chat template",
        expected="a template that renders messages and nothing else",
        fix="do not use this model's template; give another one in tokenizer_config.json",
    )
