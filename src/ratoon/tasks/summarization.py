"""Summarization: a document, and a short text that says what is in it.

Decides the template and what the two are called in rows. How they become tokens is `answered.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ratoon.tasks.answered import Answered, SpokenSettings
from ratoon.tasks.contract import Named, pick

DOCUMENT = ("document", "article", "dialogue", "source", "text", "content")
SUMMARY = Named("target", ("summary", "summaries", "target", "highlights", "abstract", "tldr", "title"))
TEMPLATES = {"en": "{source}\n\nSummary:\n", "zh": "{source}\n\n摘要：\n"}


class Summarization(Answered):
    """A document is answered by its summary; where a row has several, the first is learned and all are references."""

    kind = "summarization"
    measure = "summaries"
    settings: SpokenSettings
    settings_type = SpokenSettings

    def template(self) -> str:
        """The document, and a line that asks for its summary."""
        return self.settings.template or TEMPLATES.get(self.settings.language, TEMPLATES["en"])

    def named(self, name: str) -> Named:
        """What documents are called."""
        return Named(name, DOCUMENT) if name == self.source else super().named(name)

    def answers_of(self, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
        """The summary, or several (a list, or summary1, summary2, …)."""
        numbered = [row[key] for key in sorted(row) if re.fullmatch(r"summary\d+", key)]
        if numbered and not any(name in row for name in SUMMARY.names) and "target" not in self.settings.fields:
            return tuple(map(str, numbered))
        found = pick(row, SUMMARY, self.settings.fields, place)
        return tuple(map(str, found)) if isinstance(found, list | tuple) else (str(found),)
