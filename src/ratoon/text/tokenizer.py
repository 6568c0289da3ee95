"""Text <-> token ids.

Decides how a tokenizer is trained (byte-level BPE: every text round-trips), loaded and saved, and that the spelling of
a special token inside a user's text never becomes that token unless asked for. Messages are `chat.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from ratoon.base.errors import ArtifactError, ConfigError, DataError

END = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, TURN_START, TURN_END)
"""What every tokenizer of ours holds: the end of a document, and the borders of chat turns, so that a model that was
pretrained without dialogues can be taught them later without a new embedding."""

# Words with the space before them; digits in groups of three from the left; runs of signs; line ends apart from
# spaces. Scripts without spaces (Chinese) form runs between signs, inside which BPE finds the words.
WORDS = r" ?[\p{L}\p{M}]+|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|[\r\n]+|[^\S\r\n]+(?!\S)|[^\S\r\n]+"


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids of its special tokens and its chat template."""

    def __init__(self, core: Core, config: dict[str, Any] | None = None) -> None:
        self.core = core
        self.config = dict(config or {})
        self.core.no_padding()
        self.core.no_truncation()
        self.core.encode_special_tokens = True

    # -- making ----------------------------------------------------------------------------------------------------

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        *,
        vocab_size: int,
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
        min_frequency: int = 2,
    ) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` tokens, the 256 bytes and the special ones included.

        Raises `ConfigError` when `vocab_size` has no room for those.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ConfigError(
                f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(special_tokens)} special tokens",
                where="vocab_size",
                expected=f"at least {smallest}",
            )
        core = _byte_level(BPE())
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        core.train_from_iterator(texts, trainer=trainer)
        if not special_tokens:
            return cls(core)
        begin = special_tokens[0]
        # A prompt begins as a document does in training; Transformers reads the same rule from the file.
        core.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A $B", special_tokens=[(begin, core.token_to_id(begin))]
        )
        return cls(core, {"bos_token": begin, "eos_token": begin, "pad_token": begin})

    @classmethod
    def bytes_only(cls) -> Tokenizer:
        """The 256 bytes and the special tokens: nothing to train, nothing unknown."""
        return cls.train([], vocab_size=256 + len(SPECIAL_TOKENS))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a folder with `tokenizer.json` (and what stands beside it).

        Raises `ArtifactError` when there is none or it cannot be read.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(
                "the folder has no tokenizer.json", where=folder, expected="tokenizer.json or tokenizer.model"
            )
        try:
            core = Core.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"the tokenizer cannot be read: {error}", where=path) from None
        config = _read_json(folder / "tokenizer_config.json")
        for name, value in _read_json(folder / "special_tokens_map.json").items():
            config.setdefault(name, value)
        template = folder / "chat_template.jinja"
        if template.is_file():
            config["chat_template"] = template.read_text(encoding="utf-8")
        return cls(core, config)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`; the caller makes the folder atomic."""
        folder = Path(folder)
        for name, text in self.files().items():
            (folder / name).write_bytes(text)

    def files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name, as Transformers reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "add_bos_token": False,
            "add_prefix_space": False,
            **{key: value for key, value in self.config.items() if value is not None},
        }
        return {
            "tokenizer.json": self.core.to_str(pretty=False).encode(),
            "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
        }

    # -- facts -----------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def hash(self) -> str:
        """SHA-256 of what decides the ids."""
        return hashlib.sha256(self.core.to_str(pretty=False).encode()).hexdigest()

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token a text begins with, if there is one."""
        return self._special_id("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self._special_id("eos_token")

    @cached_property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._special_id("pad_token")

    @cached_property
    def separator_id(self) -> int | None:
        """Id of the token that stands before each document in training; None where the tokenizer has none."""
        for found in (self.token_id(END), self.bos_id, self.eos_id):
            if found is not None:
                return found
        return None

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text, if there is one."""
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several named templates
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        return found

    def token_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary."""
        found: int | None = self.core.token_to_id(token)
        return found

    def _special_id(self, name: str) -> int | None:
        value = self.config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return None if value is None else self.token_id(value)

    # -- use -------------------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, spellings of special tokens in it become those tokens; without, they are
        text like any other."""
        return self.encode_batch([text], special=special)[0]

    def encode_prompt(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text` with what the tokenizer puts around a text of its own (a begin token, for most)."""
        self.core.encode_special_tokens = not special
        try:
            ids: list[int] = self.core.encode(text, add_special_tokens=True).ids
        finally:
            self.core.encode_special_tokens = True
        return ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores."""
        self.core.encode_special_tokens = not special
        try:
            encodings = self.core.encode_batch_fast(list(texts), add_special_tokens=False)
        except UnicodeEncodeError as error:
            raise DataError(
                f"the text holds a lone surrogate at character {error.start}: it is no Unicode text",
                expected="text that can be written as UTF-8",
            ) from None
        finally:
            self.core.encode_special_tokens = True
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD."""
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special)
        return text


def _byte_level(model: BPE) -> Core:
    core = Core(model)
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"not readable as JSON: {error}", where=path) from None
    return found if isinstance(found, dict) else {}
