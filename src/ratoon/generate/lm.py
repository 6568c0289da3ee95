"""A language model as a user meets it: the Transformer, its tokenizer, and what is known about them.

Decides what a MODEL argument may be (`load`) and the verbs in Python. The loop is `decode.py`'s, the files
`model/folder.py`'s and `model/gguf.py`'s, the templates `text/chat.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError, RatoonError
from ratoon.base.settings import build
from ratoon.generate.decode import generate
from ratoon.generate.rows import Generated
from ratoon.generate.sample import Sampling
from ratoon.generate.stopping import Decoder
from ratoon.model.transformer import Transformer

if TYPE_CHECKING:
    from ratoon.tasks.contract import Question
    from ratoon.text.tokenizer import Tokenizer

_LEFT_BORDER_TOKENS = 4
"""Tokens of the prompt that the text's decoder has seen: some tokenizers spell a word differently at the start."""
KEPT_FACTS = frozenset({"chat", "task", "data"})
"""What a manifest says of a model that a model loaded from it still says: `chat`, whether it was taught to converse;
`task`, what it was fine-tuned for, and `data`, how its rows were read."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class LanguageModel:
    """A model with its tokenizer. Without one logits work, and verbs on text say what is missing."""

    model: Transformer
    tokenizer: Tokenizer | None = None
    name: str = "model"
    facts: dict[str, Any] = field(default_factory=dict)
    virtual_tokens: int = 0
    """Slots before each text that belong to an adapter (prompt and prefix tuning)."""

    @property
    def context_tokens(self) -> int:
        """The most tokens the model can have before it at once."""
        return self.model.cfg.context_tokens

    @torch.no_grad()
    def logits(self, ids_BT: Tensor | Sequence[Sequence[int]]) -> Tensor:
        """Scores of the next token after each position: ids (B, T) int64 -> (B, T, V) float32."""
        device = self.model.head_weight().device
        ids_BT = torch.as_tensor(ids_BT, dtype=torch.int64, device=device)
        if ids_BT.dim() != 2 or ids_BT.shape[1] == 0:
            raise ConfigError(f"ids have the shape {tuple(ids_BT.shape)}", expected="(rows, tokens), tokens at least 1")
        if ids_BT.shape[1] > self.context_tokens:
            raise ConfigError(f"{ids_BT.shape[1]:,} tokens", expected=f"at most {self.context_tokens:,}, the context")
        if ids_BT.numel() and not 0 <= int(ids_BT.min()) <= int(ids_BT.max()) < self.model.cfg.vocab_size:
            raise ConfigError("an id is outside the vocabulary", expected=f"0 to {self.model.cfg.vocab_size - 1}")
        return self.model.logits(self.model(ids_BT)).float()

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        shorten: Literal["left"] | None = None,
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> list[Generated]:
        """Go on from each prompt (texts, or token ids); one answer for each, in their order.

        Settings are `Sampling`'s: `generate(["Once"], max_new_tokens=40, temperature=0.8, top_p=0.9)`. With
        `on_text(number, text)` texts stream while they are made. Raises `ConfigError` for settings that are unknown
        or impossible, `DataError` for an empty prompt or one longer than the context (see `shorten`).
        """
        sampling = self._sampling(sampling, settings)
        if isinstance(prompts, str):
            prompts = [prompts]
        ids = [self.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        return self._answers(ids, sampling, self.eos_ids, shorten=shorten, logprobs=logprobs, on_text=on_text)

    def chat(
        self,
        messages: Sequence[dict[str, str]],
        sampling: Sampling | None = None,
        *,
        shorten: Literal["left"] | None = None,
        on_text: Callable[[int, str], None] | None = None,
        **settings: Any,
    ) -> Generated:
        """The assistant's answer to a conversation (`[{"role": "user", "content": "…"}, …]`), rendered by the model's
        own template; the token that ends a turn there ends the answer. Raises `ArtifactError` where there is no
        template; otherwise as `generate`."""
        from ratoon.text.chat import render

        rendered = render(self._need_tokenizer("chat"), list(messages), add_generation_prompt=True)
        sampling = self._sampling(sampling, settings)
        return self._answers([rendered.ids], sampling, self.turn_end_ids, shorten=shorten, on_text=on_text)[0]

    def answer(self, questions: Sequence[Question], sampling: Sampling) -> list[str]:
        """The text that the model gives to each question of a task: ended by the text's or the turn's end, by a stop
        of the question, or by its own number of new tokens."""
        ends = self.turn_end_ids if self.can_chat else self.eos_ids
        ids = [question.ids for question in questions]
        return self._texts(questions, self._answers(ids, sampling, ends, shorten=None, on_text=None))

    def _texts(self, questions: Sequence[Question], made: Sequence[Generated]) -> list[str]:
        """What was made of each question, up to its own limits."""
        tokenizer = self._need_tokenizer("answering")
        texts = []
        for question, one in zip(questions, made, strict=True):
            text = tokenizer.decode(list(one.ids)[: question.max_new_tokens])
            for stop in question.stop:
                text = text.split(stop, 1)[0]
            texts.append(text)
        return texts

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, begun as the model's tokenizer begins a text (a begin token, where it has the habit).

        Nothing at all means the beginning of a document, where the tokenizer has a token for that.
        """
        tokenizer = self._need_tokenizer("reading text")
        ids = tokenizer.encode_prompt(text)
        if not ids and tokenizer.separator_id is not None:
            return [tokenizer.separator_id]
        return ids

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the model's, and the tokenizer's own end token."""
        own = self.tokenizer.eos_id if self.tokenizer is not None else None
        ids = dict.fromkeys(self.model.cfg.eos_ids)
        if own is not None:
            ids[own] = None
        return tuple(ids)

    @property
    def can_chat(self) -> bool:
        """Whether the model has a chat template and was, as far as its manifest tells, taught to answer with it."""
        return self.tokenizer is not None and self.tokenizer.chat_template is not None and self.facts.get("chat", True)

    @cached_property
    def turn_end_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer in a conversation: those of `eos_ids`, and the one that ends an assistant's turn in
        the chat template, which not every folder names as an end."""
        from ratoon.text.chat import render

        asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            rendered = render(self._need_tokenizer("chat"), asked)
        except RatoonError:  # a template that serves to ask, but does not let the answers be told apart
            return self.eos_ids
        learned = [id for id, mask in zip(rendered.ids, rendered.mask, strict=True) if mask]
        return tuple(dict.fromkeys([*self.eos_ids, *learned[-1:]]))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write a Hugging Face folder with its manifest, the tokenizer too where there is one."""
        from ratoon.model.folder import write_model

        files = self.tokenizer.files() if self.tokenizer is not None else None
        write_model(
            self.model, folder, extra_files=files, facts={k: self.facts[k] for k in KEPT_FACTS & self.facts.keys()}
        )
        return Path(folder)

    def _answers(
        self,
        ids: list[list[int]],
        sampling: Sampling,
        eos_ids: Sequence[int],
        *,
        shorten: Literal["left"] | None,
        on_text: Callable[[int, str], None] | None,
        logprobs: bool = False,
    ) -> list[Generated]:
        return generate(
            self.model,
            ids,
            sampling,
            decoder=self._decoder if self.tokenizer is not None else None,
            eos_ids=eos_ids,
            shorten=shorten,
            logprobs=logprobs,
            on_text=on_text,
            virtual_tokens=self.virtual_tokens,
        )

    def _decoder(self, prompt: Sequence[int]) -> Decoder:
        from ratoon.text.stream import StreamDecoder

        decoder = StreamDecoder(self._need_tokenizer("text"))
        for id in prompt[-_LEFT_BORDER_TOKENS:]:
            decoder.push(id)
        return decoder

    def _need_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ArtifactError(
                f"{what} needs a tokenizer, and '{self.name}' has none",
                where=self.facts.get("path"),
                expected="tokenizer.json beside config.json",
                fix="put the tokenizer's files into the folder; logits(ids) and prompts of ids work without",
            )
        return self.tokenizer

    def _sampling(self, sampling: Sampling | None, settings: dict[str, Any]) -> Sampling:
        if sampling is None:
            return build(Sampling, settings, where="generate(…)")
        if settings:
            raise ConfigError(
                f"both sampling= and {', '.join(sorted(settings))}", where="generate(…)", expected="one of the two"
            )
        return sampling


def load(
    name: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> LanguageModel:
    """The model called `name`: a folder, a GGUF file, a run of this place, or a name of the catalogue.

    `dtype` absent: float32, which is exact; "bfloat16" halves the memory and, in decoding, the time. `device` absent:
    a GPU if there is one. Raises `ArtifactError` naming every place that was looked at.
    """
    kind = _dtype(dtype)
    place = torch.device(device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu"))
    path = locate(name)
    lm = _load_gguf(path, kind) if path.is_file() else _load_folder(path, kind)
    lm.name = os.fspath(name)
    lm.facts["path"] = str(path)
    lm.model.to(place)
    lm.model.requires_grad_(False)
    return lm


def locate(name: str | os.PathLike[str]) -> Path:
    """The model folder or GGUF file that `name` means. Raises `ArtifactError` naming every place looked at."""
    text = os.fspath(name)
    path = Path(text)
    tried = []
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return path
        raise ArtifactError("the file is no GGUF file", where=path, expected="a model folder, or a file named *.gguf")
    if path.is_dir():
        for folder in (path, path / "model"):
            if _holds_model(folder):
                return folder
        tried.append(f"the folder {path} holds neither config.json nor adapter_config.json, nor does {path / 'model'}")
    else:
        tried.append(f"no folder or file {path}")
    for look in (_run_model, _catalogue_model):
        found, said = look(text)
        if found is not None:
            return found
        tried.append(said)
    if _is_recipe(text):
        tried.append(f"the recipe of that name has not been run: `ratoon pretrain {text}` makes the model")
    near = _nearest(text)
    raise ArtifactError(
        f"there is no model '{text}': " + "; ".join(tried) + (f"; did you mean '{near}'?" if near else ""),
        where=text,
        expected="a run's name, a model folder, a GGUF file, or a name of the catalogue",
        fix="`ratoon runs` lists the runs, `ratoon pull --list` what can be fetched",
    )


def _is_recipe(name: str) -> bool:
    """Whether a recipe that ships makes a model of that name."""
    from ratoon.base.catalog import shipped
    from ratoon.base.settings import read_yaml

    path = shipped().get(name)
    return path is not None and "task" not in read_yaml(path)


def _holds_model(folder: Path) -> bool:
    """Whether a folder holds a model, or an adapter, which names its base."""
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _nearest(name: str) -> str | None:
    """The run or catalogue model whose name is nearest, unless it is that name."""
    import difflib

    from ratoon.base.catalog import ENTRIES
    from ratoon.store.runs import Run

    names = [run.name for run in Run.all()] + [entry.name for entry in ENTRIES.values() if entry.kind == "model"]
    return next(iter(difflib.get_close_matches(name, [one for one in names if one != name], n=1, cutoff=0.5)), None)


def _run_model(name: str) -> tuple[Path | None, str]:
    from ratoon.store.runs import Run

    try:
        run = Run.find(name)
    except RatoonError as error:
        return None, f"no run of that name (there are: {(error.expected or '').removeprefix('one of: ')})"
    if _holds_model(run.model):
        return run.model, ""
    return None, f"the run '{run.name}' has not written its model yet"


def _catalogue_model(name: str) -> tuple[Path | None, str]:
    from ratoon.base.catalog import ENTRIES, home

    entry = ENTRIES.get(name)
    if entry is None or entry.kind != "model":
        return None, "no model of that name in the catalogue"
    folder = home() / name
    if (folder / "config.json").is_file():
        return folder, ""
    for file in sorted(folder.glob("*.gguf")):
        return file, ""
    return None, f"the catalogue knows it, but it is not on this machine: `ratoon pull {name}` fetches it"


def _load_adapted(folder: Path, dtype: torch.dtype) -> LanguageModel:
    """An adapter with its base. Raises `ArtifactError` where the base is not here, or is another one."""
    from ratoon.adapt.folder import adapter_base, base_hash, load_adapter
    from ratoon.store.artifact import MANIFEST, read_manifest

    named = adapter_base(folder)
    if named is None:
        raise ArtifactError("the adapter does not name its base", where=folder, expected="base_model_name_or_path")
    path = locate(named)
    lm = _load_gguf(path, dtype) if path.is_file() else _load_folder(path, dtype)
    method = load_adapter(lm.model, folder, base_hash=base_hash(path))
    lm.model.eval()
    lm.virtual_tokens = method.virtual_tokens
    if (folder / MANIFEST).is_file():
        told = read_manifest(folder).facts
        lm.facts |= {key: told[key] for key in KEPT_FACTS & told.keys()}
    return lm


def _load_folder(folder: Path, dtype: torch.dtype) -> LanguageModel:
    from ratoon.generate.translate import Translator

    if not (folder / "config.json").is_file() and (folder / "adapter_config.json").is_file():
        return _load_adapted(folder, dtype)
    from ratoon.model.folder import is_encoder_decoder, read_encoder_decoder, read_model
    from ratoon.store.artifact import MANIFEST, read_manifest
    from ratoon.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(folder) if any((folder / file).is_file() for file in TOKENIZER_FILES) else None
    told = read_manifest(folder).facts if (folder / MANIFEST).is_file() else {}
    facts = {key: told[key] for key in KEPT_FACTS & told.keys()}
    if is_encoder_decoder(folder):
        return Translator(read_encoder_decoder(folder, dtype=dtype), tokenizer, facts=facts)
    return LanguageModel(read_model(folder, dtype=dtype), tokenizer, facts=facts)


def _load_gguf(path: Path, dtype: torch.dtype) -> LanguageModel:
    from ratoon.model.gguf import read_gguf_model
    from ratoon.text.tokenizer import Tokenizer

    model, metadata = read_gguf_model(path, dtype)
    return LanguageModel(model, Tokenizer.from_gguf_metadata(metadata))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(f"'{dtype}' is no dtype for weights", expected=", ".join(DTYPES))
    return found
