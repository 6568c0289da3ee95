"""Text <-> token ids.

Decides how a tokenizer is trained (byte-level BPE: every text round-trips), loaded and saved, and that the spelling of
a special token inside a user's text never becomes that token unless asked for. Messages are `chat.py`'s; SentencePiece
and GGUF vocabularies are translated in `pieces.py` and `gguf_vocab.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from ratoon.base.errors import ArtifactError, ConfigError, DataError
from ratoon.text.core import frame, ids_hash, read_core, whole_runs

END = "<|endoftext|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, TURN_START, TURN_END)
"""What every tokenizer of ours holds: the end of a document, and the borders of chat turns, so that a model that was
pretrained without dialogues can be taught them later without a new embedding."""

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""The chat template of every tokenizer of ours."""

# English endings ('s, 'll); runs of Chinese and Japanese characters apart from words with the space before them; digits
# in groups of three from the left; runs of signs with the line ends after them; line ends; other white space.
_RUNS = r"\p{Han}\p{Hiragana}\p{Katakana}"
WORDS = (
    r"['’](?i:s|t|d|m|ll|ve|re)(?!\p{L})"
    rf"|[{_RUNS}]+"
    rf"| ?[[\p{{L}}\p{{M}}]&&[^{_RUNS}]]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|[\r\n]+|[^\S\r\n]+(?!\S)|[^\S\r\n]+"
)
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A tokenizer of the `tokenizers` library with the ids of its special tokens and its chat template.

    `core` reads special spellings as plain text; a second one, made when first needed, reads them as special tokens.
    So no call changes what another call, in another thread, sees.
    """

    def __init__(self, core: Core, config: Mapping[str, Any] | None = None) -> None:
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
        split_han: bool = False,
    ) -> Tokenizer:
        """Byte-level BPE of at most `vocab_size` tokens, the 256 bytes and the special ones included.

        With `split_han` no token holds more than one Chinese (or Japanese) character, as in BERT's vocabularies.

        Equal texts in equal order give equal ids. Raises `ConfigError` when `vocab_size` has no room for those.
        """
        smallest = 256 + len(special_tokens)
        if vocab_size < smallest:
            raise ConfigError(
                f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(special_tokens)} special tokens",
                where="vocab_size",
                expected=f"at least {smallest}",
            )
        core = _byte_level(BPE(), split_han)
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=[AddedToken(token, special=True, normalized=False) for token in special_tokens],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        try:
            core.train_from_iterator(texts, trainer=trainer)
        except UnicodeEncodeError as error:
            raise _surrogate(error) from None
        if not special_tokens:
            return cls(core)
        begin = special_tokens[0]
        # A prompt begins as a document does in training; Transformers reads the same rule from the file.
        table = json.loads(core.to_str(pretty=False))
        table["post_processor"] = frame([begin], [], {begin: core.get_vocab()[begin]})
        core = Core.from_str(json.dumps(table, ensure_ascii=False))
        config: dict[str, Any] = {"bos_token": begin, "eos_token": begin, "pad_token": begin}
        if {TURN_START, TURN_END} <= set(special_tokens):
            config["chat_template"] = CHATML
        return cls(core, config)

    @classmethod
    def bytes_only(cls) -> Tokenizer:
        """The 256 bytes and the special tokens: nothing to train, nothing unknown."""
        return cls.train([], vocab_size=256 + len(SPECIAL_TOKENS))

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer in a folder with `tokenizer.json` or a SentencePiece model, and what stands beside it.

        Raises `ArtifactError` when there is none or it cannot be read.
        """
        folder = Path(folder)
        config = _config(folder)
        special = {_spelling(config.get(role)) for role in ROLES}
        special |= {_spelling(token) for token in config.get("additional_special_tokens") or []}
        special |= {
            token["content"] for token in (config.get("added_tokens_decoder") or {}).values() if token.get("special")
        }
        path = folder / "tokenizer.json"
        if not path.is_file():
            from ratoon.text.pieces import FILES, load_pieces

            model = next((folder / name for name in FILES if (folder / name).is_file()), None)
            if model is None:
                raise ArtifactError(
                    "the folder has no tokenizer" if folder.is_dir() else "there is no such folder",
                    where=folder,
                    expected=f"tokenizer.json or one of {', '.join(FILES)}",
                )
            core, found = load_pieces(model, config)
            return cls(core, {**found, **config})
        try:
            core = read_core(path.read_text(encoding="utf-8"), {token for token in special if token})
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(
                f"the tokenizer cannot be read: {error}", where=path, fix="fetch or make the folder again"
            ) from None
        return cls(core, config)

    @classmethod
    def from_gguf_metadata(cls, meta: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that a GGUF file's `tokenizer.*` keys describe. Raises `ArtifactError` for an unknown kind."""
        from ratoon.text.gguf_vocab import translate

        table, config = translate(meta)
        return cls(read_core(json.dumps(table, ensure_ascii=False), set()), config)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json` into `folder`; the caller makes the folder atomic."""
        folder = Path(folder)
        for name, text in self.files().items():
            (folder / name).write_bytes(text)

    def files(self) -> dict[str, bytes]:
        """The files of the tokenizer by name, as Transformers reads them."""
        config = {
            **{key: value for key, value in self.config.items() if value is not None and not key.startswith("_")},
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        return {
            "tokenizer.json": self.core.to_str(pretty=False).encode(),
            "tokenizer_config.json": (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode(),
        }

    # -- facts -----------------------------------------------------------------------------------------------------

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self.core.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of what decides the ids."""
        return ids_hash(self.core)

    @cached_property
    def special(self) -> dict[str, int]:
        """Spelling and id of each special token."""
        found = self.core.get_added_tokens_decoder().items()
        return {token.content: number for number, token in sorted(found) if token.special}

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens: plain text never holds one."""
        return frozenset(self.special.values())

    @cached_property
    def bos_id(self) -> int | None:
        """Id of the token a text begins with, if there is one."""
        return self._role("bos_token")

    @cached_property
    def eos_id(self) -> int | None:
        """Id of the token that ends a text, if there is one."""
        return self._role("eos_token")

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a text: `eos_id` first, then those of `generation_config.json`."""
        more = self.config.get("_eos_ids") or ()
        return tuple(dict.fromkeys(i for i in (self.eos_id, *more) if i is not None))

    @cached_property
    def pad_id(self) -> int | None:
        """Id of the padding token, if there is one."""
        return self._role("pad_token")

    @cached_property
    def separator_id(self) -> int | None:
        """Id of the token that stands before each document in training; None where the tokenizer has none."""
        for found in (self.token_id(END), self.bos_id, self.eos_id):
            if found is not None:
                return found
        return None

    @cached_property
    def adds_bos(self) -> bool:
        """Whether a text of its own (a prompt) begins with `bos_id`."""
        ids: list[int] = self.core.encode("", add_special_tokens=True).ids
        return bool(ids) and ids[0] == self.bos_id

    @property
    def chat_template(self) -> str | None:
        """The Jinja template that turns messages into text, if there is one."""
        found = self.config.get("chat_template")
        if isinstance(found, list):  # several named templates
            found = next((entry["template"] for entry in found if entry.get("name") == "default"), None)
        if found is None and {TURN_START, TURN_END} <= self.special.keys():
            return CHATML
        return found

    def role_token(self, role: str) -> str | None:
        """Spelling of `bos_token`, `eos_token`, `pad_token` or `unk_token`, if the tokenizer has one."""
        return _spelling(self.config.get(role))

    def token_id(self, token: str) -> int | None:
        """Id of a token by its spelling in the vocabulary."""
        found: int | None = self.core.token_to_id(token)
        return found

    def _role(self, role: str) -> int | None:
        spelling = self.role_token(role)
        return None if spelling is None else self.token_id(spelling)

    # -- use -------------------------------------------------------------------------------------------------------

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. With `special`, spellings of special tokens in it become those tokens; without, they are
        text like any other."""
        return self.encode_batch([text], special=special)[0]

    def encode_prompt(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text` as a text of its own: begun with `bos_id` where the tokenizer has the habit."""
        ids = self.encode(text, special=special)
        begun = not self.adds_bos or (ids[:1] == [self.bos_id])
        return ids if begun or self.bos_id is None else [self.bos_id, *ids]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Ids of many texts, on all cores. Raises `DataError` for a text that is not Unicode (a lone surrogate)."""
        core = self._specials_core if special else self.core
        try:
            encodings = core.encode_batch_fast(list(texts), add_special_tokens=False)
        except UnicodeEncodeError as error:
            raise _surrogate(error) from None
        except TypeError:
            for text in texts:  # the library's message does not name the place
                try:
                    text.encode()
                except UnicodeEncodeError as error:
                    raise _surrogate(error) from None
            raise
        return [encoding.ids for encoding in encodings]

    def encode_spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of `text`, special spellings as special tokens, with the first and last + 1 character of each token."""
        encoding = self._specials_core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_plain_spans(self, text: str, *, section: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode_spans` with every spelling as plain text, for a piece in the middle of a text: no space is put
        before it. A `section` begins right after a special token, and some tokenizers put a space there."""
        core = self._section_core if section else self._middle_core
        encoding = core.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of `ids`; bytes that form no character become U+FFFD."""
        text: str = self.core.decode(list(ids), skip_special_tokens=skip_special)
        if self._byte_fallback and "\ufffd" in text:
            skipped = self.special_ids if skip_special else ()
            tokens = [self.core.id_to_token(i) for i in ids if i not in skipped]
            text = self.core.decoder.decode(whole_runs([token for token in tokens if token is not None]))
        return text

    @cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Finds special spellings in a text, longest first."""
        spellings = sorted(self.special, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, spellings)) if spellings else r"(?!)")

    @cached_property
    def _byte_fallback(self) -> bool:
        # The decoder says it for every kind of model; a unigram model does not show its own setting.
        return self.core.decoder is not None and b'"ByteFallback"' in self.core.decoder.__getstate__()

    @cached_property
    def _specials_core(self) -> Core:
        # Without its post-processor: that of GPT-2 would move the offsets.
        table = json.loads(self.core.to_str(pretty=False))
        table["post_processor"] = None
        core = Core.from_str(json.dumps(table, ensure_ascii=False))
        core.encode_special_tokens = False
        return core

    @cached_property
    def _middle_core(self) -> Core:
        return self._inner_core(section=False)

    @cached_property
    def _section_core(self) -> Core:
        return self._inner_core(section=True)

    def _inner_core(self, section: bool) -> Core:
        table = json.loads(self.core.to_str(pretty=False))
        table["post_processor"] = None
        table["normalizer"] = _inner(table["normalizer"], "normalizers", section)
        table["pre_tokenizer"] = _inner(table["pre_tokenizer"], "pretokenizers", section)
        core = Core.from_str(json.dumps(table, ensure_ascii=False))
        core.encode_special_tokens = True
        return core


def _inner(part: dict[str, Any] | None, inner: str, section: bool) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer as it works on a piece that is not the first: on a section, which begins after a
    special token, or on a piece inside one, before which nothing is put."""
    if part is None:
        return None
    if part["type"] == "Sequence":
        kept = [found for found in (_inner(entry, inner, section) for entry in part[inner]) if found is not None]
        return {**part, inner: kept}
    if part["type"] == "Metaspace":
        return {**part, "prepend_scheme": "always" if section and part.get("prepend_scheme") == "always" else "never"}
    if section:
        return part
    if part["type"] == "Prepend":
        return None
    return {**part, "add_prefix_space": False} if "add_prefix_space" in part else part


def _surrogate(error: UnicodeEncodeError) -> DataError:
    return DataError(
        f"the text holds a lone surrogate (U+{ord(error.object[error.start]):04X}) at character {error.start}: "
        "it is no Unicode text",
        expected="text that can be written as UTF-8",
    )


def _byte_level(model: BPE, split_han: bool) -> Core:
    core = Core(model)
    words = WORDS.replace(f"[{_RUNS}]+", f"[{_RUNS}]") if split_han else WORDS
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return core


def _spelling(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _config(folder: Path) -> dict[str, Any]:
    """What stands beside a tokenizer: `tokenizer_config.json` first, then what only the older files say."""
    config = _read_json(folder / "tokenizer_config.json")
    for name, value in _read_json(folder / "special_tokens_map.json").items():
        config.setdefault(name, value)
    template = folder / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text(encoding="utf-8")
    ends = _read_json(folder / "generation_config.json").get("eos_token_id")
    if ends is not None:
        config["_eos_ids"] = ends if isinstance(ends, list) else [ends]
    return config


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"not readable as JSON: {error}", where=path) from None
    return found if isinstance(found, dict) else {}
