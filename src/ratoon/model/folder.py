"""Hugging Face folders: config.json, safetensors and what stands beside them <-> a Transformer.

Decides how weights reach the disk and come back, and that every tensor is accounted for. What the keys and names mean
is decided in `families.py`. An encoder-decoder lies in a folder of the same kind under a model type and names of our
own, which Transformers refuses.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ratoon.base.errors import ArtifactError, ConfigError
from ratoon.base.settings import build
from ratoon.model.config import OWN_FAMILY, ModelConfig
from ratoon.model.encoder_decoder import AnyModel, EncoderDecoder
from ratoon.model.family import Rule
from ratoon.model.heads import from_folder, to_folder, weights_of
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import MANIFEST, Manifest, Parent, read_manifest, seal
from ratoon.store.atomic import atomic_folder, write_json

SHARD_BYTES = 5 << 30
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# Buffers that old checkpoints carry and nobody reads.
_IGNORED_ENDS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def read_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """The settings in a folder's config.json. Raises `ArtifactError` for what is not known, an encoder-decoder too."""
    theirs = _read_table(folder)
    path = str(Path(folder) / "config.json")
    if theirs.get("model_type") == OWN_FAMILY:
        raise ArtifactError(
            "the folder holds an encoder-decoder, which reads a source and writes a target",
            where=path,
            expected="a model that goes on with a text",
            fix="it can be loaded, generated with, evaluated and trained on pairs; other verbs need the other kind",
        )
    return from_folder(theirs, path)


def is_encoder_decoder(folder: str | os.PathLike[str]) -> bool:
    """Whether a model folder holds an encoder-decoder."""
    return _read_table(folder).get("model_type") == OWN_FAMILY


def _read_table(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """A folder's config.json as it stands."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ArtifactError(
            "the folder has no config.json" if Path(folder).is_dir() else "there is no such folder",
            where=folder,
            expected="a Hugging Face model folder",
        )
    try:
        theirs = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"not readable as JSON: {error}", where=path) from None
    if not isinstance(theirs, dict):
        raise ArtifactError(f"the file holds a {type(theirs).__name__}", where=path, expected="keys with values")
    return theirs


def read_encoder_decoder(
    folder: str | os.PathLike[str], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> EncoderDecoder:
    """The encoder-decoder in a folder that `write_model` made, in evaluation mode.

    Raises `ArtifactError` for another kind of folder, and for a missing, cut or mis-shaped weight, or one too many.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
    theirs, where = _read_table(folder), str(folder / "config.json")
    if theirs.get("model_type") != OWN_FAMILY:
        raise ArtifactError(
            f"the model type is {theirs.get('model_type')!r}", where=where, expected=f"{OWN_FAMILY}, written by Ratoon"
        )
    try:
        parts = [
            build(ModelConfig, theirs.get(name) or {}, where=f"{where}: {name}") for name in ("encoder", "decoder")
        ]
    except ConfigError as error:
        raise ArtifactError(error.found, where=error.where, expected=error.expected, fix=error.fix) from None
    if parts[0].causal or not parts[1].cross_attention or parts[0].width != parts[1].width:
        raise ArtifactError("the two parts do not fit each other", where=where, expected="as Ratoon wrote them")
    with torch.device("meta"):
        model = EncoderDecoder(*parts, shared_embeddings=bool(theirs.get("shared_embeddings"))).eval()
    files = _Files(folder)
    put_state(model, {name: files.take(name).to(dtype) for name in files.file_of}, folder, device)
    return model


def read_model(
    folder: str | os.PathLike[str],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Transformer:
    """The model in a Hugging Face folder, in evaluation mode.

    Raises `ArtifactError` for an unsupported family, a missing, cut or mis-shaped weight, or one too many.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
    cfg = read_config(folder)
    model = empty_model(cfg)
    put_state(model, _Reader(folder, cfg).state(model, dtype), folder, device)
    return model


def empty_model(cfg: ModelConfig) -> Transformer:
    """A model whose parameters have shapes and no memory."""
    with torch.device("meta"):
        model = Transformer(cfg)
    return model.eval()


def put_state(
    model: AnyModel, state: Mapping[str, Tensor], where: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> None:
    """Give an empty model its weights. Raises `ArtifactError` for names or shapes that do not fit."""
    wanted = dict(model.named_parameters())
    missing, extra = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or extra:
        parts = [f"{len(missing)} missing (first: {missing[0]})"] if missing else []
        parts += [f"{len(extra)} too many (first: {extra[0]})"] if extra else []
        raise ArtifactError(f"the weights do not fit the settings: {', '.join(parts)}", where=where)
    for name, parameter in wanted.items():
        if state[name].shape != parameter.shape:
            raise ArtifactError(
                f"'{name}' has the shape {tuple(state[name].shape)}", where=where, expected=str(tuple(parameter.shape))
            )
    # A table that stands in both parts of an encoder-decoder has one name among the parameters, and two here.
    first = {id(parameter): name for name, parameter in wanted.items()}
    everywhere = {name: first[id(value)] for name, value in model.named_parameters(remove_duplicate=False)}
    moved = {name: value.to(device) for name, value in state.items()}
    model.load_state_dict({name: moved[ours] for name, ours in everywhere.items()}, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


class _Files:
    """The safetensors of a folder as one table."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, Path] = {}
        index = folder / INDEX
        named: dict[str, str] = {}
        if index.is_file():
            named = _read_index(index)
            files = sorted({folder / name for name in named.values()})
        elif (folder / WEIGHTS).is_file():
            files = [folder / WEIGHTS]
        else:
            old = any(folder.glob("pytorch_model*.bin"))
            raise ArtifactError(
                "the weights are a pickle, which can run code when it is read" if old else "the folder has no weights",
                where=folder,
                expected=WEIGHTS,
                fix="save the model with Transformers' save_pretrained, which writes safetensors" if old else None,
            )
        self.files: dict[Path, Any] = {}
        for file in files:
            if not file.is_file():
                raise ArtifactError(
                    "a weights file that the index names is missing", where=file, fix="fetch or make the folder again"
                )
            try:
                self.files[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(
                    f"the weights cannot be read: {error}",
                    where=file,
                    expected="a whole safetensors file",
                    fix="it is cut or damaged: fetch or make it again",
                ) from None
            for name in self.files[file].keys():  # noqa: SIM118 - no mapping
                self.file_of[name] = file
        wrong = sorted(name for name, file in named.items() if self.file_of.get(name) != folder / file)
        if wrong:
            raise ArtifactError(
                f"the index says that {named[wrong[0]]} holds '{wrong[0]}', and it does not",
                where=index,
                expected="an index and shards that were written together",
            )

    def take(self, name: str) -> Tensor:
        """The tensor of that name, from its file."""
        found: Tensor = self.files[self.file_of[name]].get_tensor(name)
        return found


class _Reader(_Files):
    """The weights of a folder as a family names them."""

    def __init__(self, folder: Path, cfg: ModelConfig) -> None:
        super().__init__(folder)
        self.cfg = cfg
        self.rules = weights_of(cfg)

    def _find(self, name: str) -> str | None:
        """`name`, or as it stands in files without the model's prefix."""
        bare = name.removeprefix(name.split(".")[0] + ".")
        return next((n for n in (name, bare) if n in self.file_of), None)

    def state(self, model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
        """Our names -> weights, each read once."""
        wanted = dict(model.named_parameters())
        state: dict[str, Tensor] = {}
        used: set[str] = set()
        for rule in self.rules:
            for layer in range(self.cfg.layers) if "{i}" in rule.theirs else (0,):
                ours = [name.format(i=layer) for name in rule.ours]
                if ours[0] not in wanted:
                    continue
                if "{e}" in rule.theirs:
                    found = self._experts(rule, layer, used, wanted[ours[0]].shape)
                else:
                    name = self._find(rule.theirs.format(i=layer))
                    expected = rule.join([wanted[name].detach() for name in ours], self.cfg).shape
                    found = None if name is None else self._whole(name, used, expected)
                if found is None:
                    continue  # told, with its name, by put_state
                for mine, value in zip(ours, rule.split(found, self.cfg), strict=True):
                    state[mine] = value.to(dtype).contiguous()
        extra = sorted(n for n in self.file_of.keys() - used if not n.endswith(_IGNORED_ENDS))
        if self.cfg.tied_embeddings:
            extra = [name for name in extra if not self._is_embedding(name, state, dtype)]
        if extra:
            raise ArtifactError(f"{len(extra)} weights are not known (first: {extra[0]})", where=self.folder)
        return state

    def _whole(self, name: str, used: set[str], expected: torch.Size) -> Tensor:
        """The tensor `name`, after checking its shape."""
        used.add(name)
        found = self.take(name)
        if found.shape != expected:
            raise ArtifactError(
                f"'{name}' has the shape {tuple(found.shape)}", where=self.file_of[name], expected=str(tuple(expected))
            )
        return found

    def _is_embedding(self, name: str, state: dict[str, Tensor], dtype: torch.dtype) -> bool:
        """Whether `name` is a head that only repeats the embedding it is tied to."""
        if name not in ("lm_head.weight", "embed_out.weight") or "embed.weight" not in state:
            return False
        if not torch.equal(self.take(name).to(dtype), state["embed.weight"]):
            raise ArtifactError(
                f"'{name}' differs from the embedding, and config.json says that the two are tied",
                where=self.file_of[name],
                fix="set tie_word_embeddings to false in config.json, or remove the tensor",
            )
        return True

    def _experts(self, rule: Rule, layer: int, used: set[str], expected: torch.Size) -> Tensor | None:
        """The stacked weights (E, …) of a layer's experts, from one tensor each or from Transformers 5's stacks."""
        assert self.cfg.moe is not None
        names = [self._find(rule.theirs.format(i=layer, e=e)) for e in range(self.cfg.moe.experts)]
        if all(name is not None for name in names):
            return torch.stack([self._whole(name, used, expected[1:]) for name in names if name is not None])
        base = rule.theirs.format(i=layer, e=0).split("experts.")[0] + "experts."
        which = rule.ours[0].rsplit(".", 1)[-1]
        name = self._find(base + ("down_proj" if which == "down" else "gate_up_proj"))
        if name is None:
            return None
        if which == "down":
            return self._whole(name, used, expected)
        width = self.cfg.moe.expert_width
        stacked = self._whole(name, used, torch.Size((expected[0], 2 * width, expected[2])))
        return stacked[:, :width] if which == "gate" else stacked[:, width:]


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of an index of shards."""
    try:
        named = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        plain = all(file == Path(file).name and file.endswith(".safetensors") for file in named.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"the index of the weights cannot be read: {error}", where=path, expected="a JSON object with a weight_map"
        ) from None
    if not plain or not named:
        raise ArtifactError(
            "the index names files that are not beside it", where=path, expected="names ending in .safetensors"
        )
    found: dict[str, str] = named
    return found


def to_family(model: Transformer, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights under their Hugging Face names. Every parameter is named by exactly one rule."""
    cfg = model.cfg
    state = {name: value.detach() for name, value in model.named_parameters()}
    theirs: dict[str, Tensor] = {}
    for rule in weights_of(cfg):
        for layer in range(cfg.layers) if "{i}" in rule.theirs else (0,):
            ours = [name.format(i=layer) for name in rule.ours]
            if ours[0] not in state:
                continue
            values = [state.pop(name) for name in ours]
            if "{e}" in rule.theirs:
                for expert, value in enumerate(values[0]):
                    theirs[rule.theirs.format(i=layer, e=expert)] = value
            else:
                theirs[rule.theirs.format(i=layer)] = rule.join(values, cfg)
    assert not state, f"no rule of {cfg.family} names {sorted(state)[:3]}"
    return {name: value.to(dtype or value.dtype).contiguous().cpu() for name, value in theirs.items()}


def _on_disk(model: AnyModel, dtype: torch.dtype | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The table of config.json and the weights under the names they have on disk."""
    if not isinstance(model, EncoderDecoder):
        return to_folder(model.cfg, "float32"), to_family(model, dtype)
    settings = {
        "model_type": OWN_FAMILY,
        "is_encoder_decoder": True,
        "shared_embeddings": model.shared_embeddings,
        "decoder_start_token_id": model.cfg.bos_id,
        "encoder": model.encoder.cfg.model_dump(mode="json"),
        "decoder": model.decoder.cfg.model_dump(mode="json"),
    }
    named = {name: value.detach() for name, value in model.named_parameters()}
    return settings, {name: value.to(dtype or value.dtype).contiguous().cpu() for name, value in named.items()}


def write_model(
    model: AnyModel,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    parents: list[Parent] | None = None,
    facts: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
    replace: bool = False,
) -> Manifest:
    """Write the model as a Hugging Face folder with a manifest, whole or not at all.

    `dtype` rounds the weights on the way. `extra_files` (tokenizer, template …) are put beside them. Raises
    `ConfigError` when the model's family cannot say what it is, `StorageError` when the disk refuses.
    """
    settings, weights = _on_disk(model, dtype)
    kept = next(iter(weights.values())).dtype
    with atomic_folder(folder, replace=replace) as partial:
        write_json(partial / "config.json", settings | {"torch_dtype": str(kept).removeprefix("torch.")})
        generation = {"bos_token_id": model.cfg.bos_id, "eos_token_id": list(model.cfg.eos_ids) or None}
        if model.cfg.pad_id is not None:
            generation["pad_token_id"] = model.cfg.pad_id
        write_json(partial / "generation_config.json", {k: v for k, v in generation.items() if v is not None})
        _write_weights(partial, weights, shard_bytes)
        for name, content in (extra_files or {}).items():
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                shutil.copyfile(content, partial / name)
        return seal(partial, "model", parents=parents or [], facts=facts, recipe=recipe)


def _write_weights(folder: Path, weights: dict[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / WEIGHTS, metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for value in weights.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
