"""The frame of every page: the template engine with the filters that all share, phrases with values put in, the style
and the script in the page itself.

Decides how a page becomes one file without outside references. What it shows is that page's, wording the phrases'.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ratoon.report.phrases import Language, duration, figure, plain, sentence, size, whole

TEMPLATES = Path(__file__).parent / "templates"
PICTURES = {number: 0x2400 + number for number in range(32) if chr(number) not in "\t\n"} | {127: 0x2421}


def say_in(language: Language, phrase: Callable[[str, Language], str]) -> Callable[..., Markup]:
    """What gives the phrase of a key in that language as HTML, values put in; `phrase` is the page's table."""

    def say(key: str, **values: Any) -> Markup:
        strong = {name: value if isinstance(value, Markup) else Markup.escape(value) for name, value in values.items()}
        return Markup(Markup.escape(phrase(key, language)).format(**strong))

    return say


def render_page(
    template: str,
    language: Language,
    *,
    styles: tuple[str, ...],
    scripts: tuple[str, ...] = (),
    filters: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """The page as text: `template` with `values`; `filters` beside those of every page, `styles` and `scripts` by the
    names of their files."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "whole": whole,
        "figure": figure,
        "size": size,
        "plain": plain,
        "duration": lambda seconds: duration(seconds, language),
        "sentence": lambda text: _code(sentence(str(text), language)),
        "visible": _visible,
        "b": lambda text: Markup("<b>{}</b>").format(text),
        "code": lambda text: Markup("<code>{}</code>").format(text),
        **(filters or {}),
    }
    script = _joined(scripts)
    return environment.get_template(template).render(
        **values,
        style=Markup(_joined(styles)),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join((TEMPLATES / name).read_text(encoding="utf-8").strip() for name in names)


def _code(text: str) -> Markup:
    """What stands between a pair of backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return Markup.escape(text)
    return Markup("").join(
        Markup("<code>{}</code>" if odd % 2 else "{}").format(part) for odd, part in enumerate(parts)
    )


def _visible(text: str) -> str:
    """Control characters as their pictures (␀, ␛, …): an untrained model writes them, and a browser would drop them."""
    return text.translate(PICTURES)
