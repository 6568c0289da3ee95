"""Adapters on disk: PEFT's `adapter_config.json` and `adapter_model.safetensors`, with our manifest beside them.

Decides what an adapter's folder holds whatever the method, that a task head goes along, and that an adapter refuses
another base than its own. Each method's names in PEFT are its own business (`peft_config`, `peft_weights`).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ratoon.adapt.contract import Method
from ratoon.adapt.methods import METHODS
from ratoon.base.errors import ArtifactError, ConfigError, storage_errors
from ratoon.base.settings import build
from ratoon.model.config import HeadConfig
from ratoon.model.heads import OWN_TYPE, to_folder, weights_of
from ratoon.model.init import add_head
from ratoon.model.transformer import Transformer
from ratoon.store.artifact import MANIFEST, Manifest, Parent, file_hash, read_manifest, seal
from ratoon.store.atomic import atomic_folder, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_PREFIX = "RATOON_"
"""In front of `peft_type` where the adapter belongs to a model that Transformers cannot compute (attention both ways,
pooled texts): PEFT then refuses the folder by name instead of computing something else."""
_KINDS = {"LORA": "lora", "ADALORA": "adalora", "IA3": "ia3", "PREFIX_TUNING": "prefix", "PROMPT_TUNING": "prompt"}
_TASKS = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", "span": "QUESTION_ANS"}
Talk = Callable[[str], None]


def _to_stderr(sentence: str) -> None:
    print(sentence, file=sys.stderr)


# -- which base --------------------------------------------------------------------------------------------------------


def base_hash(path: str | os.PathLike[str]) -> str:
    """What an adapter knows its base by: the hash of an artifact's manifest, of a GGUF file, or of a folder's weights.

    Raises `ArtifactError` where there is no such model.
    """
    path = Path(path)
    if path.is_file():
        return file_hash(path)
    if (path / MANIFEST).is_file():
        return read_manifest(path).hash
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ArtifactError("there are no weights", where=path, expected="a GGUF file, or a folder with *.safetensors")
    if len(files) == 1:
        return file_hash(files[0])
    return hashlib.sha256("\n".join(f"{file.name} {file_hash(file)}" for file in files).encode()).hexdigest()


def weights_hash(model: Transformer) -> str:
    """Hash of a base's own weights in memory: an adapter's parts and a task head are left out, so that it is the same
    before and after `install`."""
    bare = {name for name, _ in model.named_parameters()}
    digest = hashlib.sha256()
    for name, parameter in sorted((_own_name(n), p) for n, p in model.named_parameters() if _is_base(n, bare, model)):
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def _own_name(name: str) -> str:
    return name.replace(".base.", ".")


def _is_base(name: str, names: set[str], model: Transformer) -> bool:
    """Whether a parameter is the base's own: no method's, no head's."""
    if name.startswith(("task_head.", "head.", "virtual.")) or ".prefix." in name:
        return False  # a task head takes the place of `head`
    site = name.rpartition(".")[0]
    return f"{site}.base.weight" not in names


# -- saving ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def save_adapter(
    model: Transformer,
    method: Method,
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    parents: list[Parent] | None = None,
    facts: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    extra_files: Mapping[str, bytes | Path] | None = None,
    replace: bool = False,
) -> Manifest:
    """Write the installed method's parts, and the task head with them, as a folder of PEFT with a manifest.

    `base` is the name or path that `base_model_name_or_path` gets; the parent of kind model is the base's hash (see
    `base_hash`), and the hash of the weights in memory is kept beside it. Raises `ConfigError` where PEFT's layout
    cannot say the method on this model, `StorageError` when the disk refuses.
    """
    theirs = _settings_on_disk(model)
    config = {"base_model_name_or_path": base, "inference_mode": True, **method.peft_config(model)}
    weights = dict(method.peft_weights(model))
    config["task_type"] = "CAUSAL_LM"
    if model.task_head is not None:
        assert model.cfg.task_head is not None
        config["task_type"] = _TASKS[model.cfg.task_head.kind]
        head = _head_names(model, config["peft_type"])
        config["modules_to_save"] = sorted({name.split(".")[-2] for name in head.values()})
        weights |= {name: model.get_parameter(ours).detach() for ours, name in head.items()}
    if theirs.get("model_type") == OWN_TYPE:
        config["peft_type"] = OWN_PREFIX + config["peft_type"]
    told = {
        **(facts or {}),
        "method": method.settings.model_dump(mode="json"),
        "method_exact": method.exact,
        "causal": model.cfg.causal,
        "task_head": None if model.cfg.task_head is None else model.cfg.task_head.model_dump(mode="json"),
        "base_weights": weights_hash(model),
        "base_dtype": _dtype(model),
    }
    with atomic_folder(folder, replace=replace) as partial:
        write_json(partial / CONFIG, config)
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in weights.items()}
        with storage_errors(partial / WEIGHTS):
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        for name, content in (extra_files or {}).items():
            (partial / name).write_bytes(content if isinstance(content, bytes) else Path(content).read_bytes())
        return seal(partial, "adapter", parents=parents or [], facts=told, recipe=recipe)


def _settings_on_disk(model: Transformer) -> dict[str, Any]:
    if not isinstance(model, Transformer) or model.cfg.cross_attention:
        raise ConfigError(
            "an encoder-decoder's adapter has no place in PEFT's layout: Transformers has no family like it",
            where="save",
            fix="merge the adapter and save the whole model, or train all of its parameters",
        )
    return to_folder(model.cfg, "float32")


def _head_names(model: Transformer, peft_type: str) -> dict[str, str]:
    """Our names of a task head's parameters -> PEFT's. Methods of virtual tokens wrap the model once less."""
    prefix = "base_model." if peft_type in ("PREFIX_TUNING", "PROMPT_TUNING") else "base_model.model."
    here = {name for name, _ in model.named_parameters()}
    return {
        rule.ours[0]: prefix + rule.theirs
        for rule in weights_of(model.cfg)
        if rule.ours[0].startswith("task_head.") and rule.ours[0] in here
    }


# -- loading -----------------------------------------------------------------------------------------------------------


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / CONFIG).is_file()


def adapter_base(folder: str | os.PathLike[str]) -> str | None:
    """The name or path of the base that an adapter's folder gives, if any."""
    named = _read_config(Path(folder)).get("base_model_name_or_path")
    return str(named) if named else None


def load_adapter(
    model: Transformer,
    folder: str | os.PathLike[str],
    *,
    base_hash: str | None = None,
    talk: Talk = _to_stderr,
) -> Method:
    """Put a saved adapter into its base: the method, installed, with the folder's values; its task head, too.

    `base_hash`: what `base_hash(path)` gives for the model's own path; absent, the weights in memory are compared.
    Raises `ArtifactError` for an adapter of another base (naming both), a torn or unknown folder, and values that do
    not fit; a folder without our manifest cannot say its base, which `talk` is told.
    """
    folder = Path(folder)
    config = _read_config(folder)
    manifest = read_manifest(folder, "adapter") if (folder / MANIFEST).is_file() else None
    if manifest is None:
        named = config.get("base_model_name_or_path") or "none"
        talk(
            f"{folder}: the adapter has no {MANIFEST}, so whether this is its base could not be verified; it names "
            f"'{named}', and only the shapes are checked"
        )
    else:
        _expect_base(manifest, model, base_hash, folder, talk)
    weights = _read_weights(folder / WEIGHTS)
    facts = manifest.facts if manifest is not None else {}
    peft_type = str(config["peft_type"]).removeprefix(OWN_PREFIX)
    if facts.get("method_exact"):
        config["ratoon"] = facts["method"]
    method = METHODS[_kind(peft_type, config, folder)].from_peft(config)
    head, own = _split_head(weights, config, peft_type)
    wanted = _head_config(head, config, facts, model, folder)
    before = (model.cfg, model.head, model.task_head)
    if wanted is not None and (model.cfg.task_head != wanted or model.task_head is None):
        add_head(model, wanted, seed=0)  # first: a family may name its layers otherwise under some heads
    try:
        method.install(model, seed=0)
        with torch.no_grad():
            method.load_peft(model, own)
            if wanted is not None:
                _load_head(model, wanted, head, peft_type, folder)
    except BaseException:
        method.remove(model)
        model.cfg, model.head, model.task_head = before
        raise
    if "causal" in facts and facts["causal"] != model.cfg.causal:
        model.set_causal(bool(facts["causal"]))
    return method


def _dtype(model: Transformer) -> str:
    return str(model.embed.weight.dtype).removeprefix("torch.")


def _expect_base(manifest: Manifest, model: Transformer, given: str | None, folder: Path, talk: Talk) -> None:
    parent = manifest.parent("model")
    name = f"{parent.name}, " if parent is not None and parent.name else ""
    if given is not None and parent is not None:
        here, wanted = given, parent.hash
    elif manifest.facts.get("base_dtype") != _dtype(model):
        talk(
            f"{folder}: the adapter's base ({name}{manifest.facts.get('base_dtype')}) is here in {_dtype(model)}, so "
            "whether it is the same one could not be verified from its weights; give its path's hash (base_hash)"
        )
        return
    else:
        here, wanted = weights_hash(model), str(manifest.facts.get("base_weights"))
    if here != wanted:
        raise ArtifactError(
            f"the adapter was made for another base ({name}{wanted[:12]}) than this one ({here[:12]})",
            where=folder,
            expected="the base that the adapter was trained on, unchanged",
            fix="load that base, or train the adapter anew on this one",
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ArtifactError(
            f"the folder has no {CONFIG}" if folder.is_dir() else "there is no such folder",
            where=folder,
            expected="an adapter's folder",
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"not readable as JSON: {error}", where=path) from None
    if not isinstance(found, dict) or "peft_type" not in found:
        raise ArtifactError("the file does not say a 'peft_type'", where=path, expected=", ".join(_KINDS))
    return found


def _kind(peft_type: str, config: Mapping[str, Any], folder: Path) -> str:
    kind = _KINDS.get(peft_type) or (str(config.get("kind")) if peft_type == "BOTTLENECK" else "")
    if kind not in METHODS:
        raise ArtifactError(
            f"adapters of the type '{peft_type}' are not known",
            where=folder / CONFIG,
            expected=", ".join([*_KINDS, "BOTTLENECK"]),
        )
    return kind


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        beside = sorted(found.name for found in path.parent.glob("adapter_model.*"))
        raise ArtifactError(
            f"the folder has no {WEIGHTS}" + (f", but {beside[0]}" if beside else ""),
            where=path.parent,
            expected="safetensors; other files may run code when they are read",
        )
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(
            f"the weights cannot be read: {error}", where=path, fix="the file is cut or damaged: fetch it again"
        ) from None


def _split_head(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], peft_type: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the modules that were saved whole, and the others."""
    saved = set(config.get("modules_to_save") or ())
    head = {name: value for name, value in weights.items() if len(saved & set(name.split(".")[:-1])) > 0}
    return head, {name: value for name, value in weights.items() if name not in head}


def _head_config(
    head: Mapping[str, Tensor], config: Mapping[str, Any], facts: Mapping[str, Any], model: Transformer, folder: Path
) -> HeadConfig | None:
    """The task head that the folder holds, with its labels where they are told."""
    if facts.get("task_head") is not None:
        return build(HeadConfig, dict(facts["task_head"]), where=folder / MANIFEST)
    kind = next((ours for ours, theirs in _TASKS.items() if theirs == config.get("task_type")), None)
    if kind is None and not head:
        return None
    if kind is None or not head:
        raise ArtifactError(
            f"the adapter's task_type is {config.get('task_type')!r}, and it holds "
            + (f"the head {', '.join(sorted(head))}" if head else "no head"),
            where=folder,
            expected=f"a head (modules_to_save) with one of {', '.join(_TASKS.values())}",
        )
    here = model.cfg.task_head
    if here is not None and here.kind == kind:
        return here
    rows = next(iter(head.values())).shape[0]
    labels = ("begin", "end") if kind == "span" else tuple(f"LABEL_{number}" for number in range(rows))
    return build(HeadConfig, {"kind": kind, "labels": labels}, where=folder / CONFIG)


def _load_head(
    model: Transformer, wanted: HeadConfig, head: Mapping[str, Tensor], peft_type: str, folder: Path
) -> None:
    """Give the model's head its values. Raises `ArtifactError` for one too few, too many, or of another shape."""
    names = _head_names(model, peft_type)
    odd = sorted(set(names.values()) ^ head.keys())
    if odd:
        raise ArtifactError(
            f"the adapter {'lacks' if odd[0] in names.values() else 'has'} the tensor {odd[0]}",
            where=folder / WEIGHTS,
            expected=f"a head of the kind '{wanted.kind}': {', '.join(names.values())}",
        )
    for ours, theirs in names.items():
        parameter = model.get_parameter(ours)
        if head[theirs].shape != parameter.shape:
            raise ArtifactError(
                f"{theirs} has the shape {tuple(head[theirs].shape)}",
                where=folder / WEIGHTS,
                expected=f"{tuple(parameter.shape)}: labels by width",
            )
    for ours, theirs in names.items():
        model.get_parameter(ours).copy_(head[theirs])
