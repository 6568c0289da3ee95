"""Translation: a text in one language, and the same in another.

Decides the template and what the two sides are called in rows. How they become tokens is `answered.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from ratoon.tasks.answered import Answered, AnsweredSettings
from ratoon.tasks.contract import Named, pick

LANGUAGES = {
    "en": "English", "zh": "Chinese", "de": "German", "fr": "French", "es": "Spanish", "ja": "Japanese", "ko": "Korean",
    "ru": "Russian", "pt": "Portuguese", "it": "Italian", "ar": "Arabic", "hi": "Hindi",
}  # fmt: skip


class TranslationSettings(AnsweredSettings):
    """From which language into which."""

    source_language: str = Field("en", description="the language that is read")
    target_language: str = Field("zh", description="the language that is written")


class Translation(Answered):
    """A text is answered by its translation."""

    kind = "translation"
    measure = "translation"
    settings: TranslationSettings
    settings_type = TranslationSettings

    def template(self) -> str:
        """`English: … Chinese:`, or as told."""
        return self.settings.template or "{from}: {source}\n{to}:\n"

    def constants(self) -> dict[str, str]:
        """The languages' names."""
        codes = {"from": self.settings.source_language, "to": self.settings.target_language}
        return {name: LANGUAGES.get(code, code) for name, code in codes.items()}

    def named(self, name: str) -> Named:
        """The source stands under its language, too."""
        if name != self.source:
            return super().named(name)
        return Named(name, ("source", "src", self.settings.source_language, "text"))

    def answers_of(self, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
        """The translation, or several."""
        named = Named("target", ("target", "tgt", self.settings.target_language, "translation"))
        found = pick(row, named, self.settings.fields, place)
        return tuple(map(str, found)) if isinstance(found, list | tuple) else (str(found),)
