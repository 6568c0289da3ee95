"""`ratoon export`: any model that Ratoon reads, as a Hugging Face folder with tokenizer, template and manifest.

Decides what goes along with the weights and what the manifest says the folder was made from. How weights are written
is `model/folder.py`'s.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ratoon.generate.lm import LanguageModel
    from ratoon.store.artifact import Manifest, Parent

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _bytes(ctx: click.Context, param: click.Parameter, value: str) -> int:
    """A number of bytes, with a unit or without: 500MB, 5GB, 2GiB."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", value.strip())
    unit = _UNITS.get(found.group(2).upper()) if found else None
    if found is None or unit is None or float(found.group(1)) * unit < 1:
        raise click.BadParameter(f"'{value}' is no size; for example 500MB, 5GB or 2GiB", ctx, param)
    return int(float(found.group(1)) * unit)


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Round the weights to it; absent: as the model's files hold them (a quantized file: float32, which is exact).",
)
@click.option("--max-shard-size", callback=_bytes, default="5GB", show_default=True, help="Largest file of weights.")
@click.option("--replace", is_flag=True, help="Put the new folder in the place of one that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the folder, its hash and its files as JSON.")
def command(model: str, folder: Path, dtype: str | None, max_shard_size: int, replace: bool, as_json: bool) -> None:
    """Write MODEL (a run, a folder, a GGUF file, a name of the catalogue) as a Hugging Face folder into DIR.

    Transformers loads it and gives the same logits. The answer is the folder.
    """
    from ratoon.cli.output import answer, answer_json, expect_new, size_words, talk

    expect_new(folder, replace=replace)
    manifest = export(model, folder, dtype=dtype, shard_bytes=max_shard_size, replace=replace)
    facts = manifest.facts
    size = sum(file.bytes for file in manifest.files.values())
    talk(f"{facts['parameters']:,} parameters as {facts['dtype']}, {len(manifest.files)} files, {size_words(size)}")
    for sentence in facts["notes"]:
        talk(sentence)
    if as_json:
        answer_json(
            {
                "folder": str(folder),
                "hash": manifest.hash,
                "dtype": facts["dtype"],
                "parameters": facts["parameters"],
                "files": {name: file.bytes for name, file in manifest.files.items()},
                "parents": [parent.model_dump() for parent in manifest.parents],
                "notes": facts["notes"],
            }
        )
    else:
        answer(str(folder))


def export(
    name: str, folder: Path, *, dtype: str | None = None, shard_bytes: int = 5 * 10**9, replace: bool = False
) -> Manifest:
    """Write the model called `name` into `folder`; an adapter is folded into its base.

    Raises as `generate.lm.load` and `model.folder.write_model` do, and `ConfigError` for an adapter that is no change
    of weights, or that weights of few bits would lose a part of.
    """
    from ratoon.adapt.folder import is_adapter
    from ratoon.generate.lm import load, locate
    from ratoon.model.folder import write_model
    from ratoon.store.artifact import MANIFEST, Parent, read_manifest

    path = locate(name)
    notes = []
    if is_adapter(path):
        kept = dtype or "float32"
        lm = _merged(name, path, kept)
        notes.append(f"the adapter is folded into its base, as {kept}")
    else:
        kept = dtype or _stored_dtype(path)
        lm = load(name, dtype=kept, device="cpu")
    parents = [model_parent(name, path)]
    extra = _beside(lm, path)
    if lm.tokenizer is None:
        notes.append("the model has no tokenizer: the folder holds none either")
    else:
        parents.append(Parent(kind="tokenizer", hash=lm.tokenizer.hash))
    if path.is_file() and dtype is None:
        notes.append("the file's weights are written as float32, each at its exact value; --dtype bfloat16 halves them")
    before = read_manifest(path) if path.is_dir() and (path / MANIFEST).is_file() else None
    facts = dict(before.facts) if before is not None else {}
    facts |= {
        "parameters": sum(parameter.numel() for parameter in lm.model.parameters()),
        "dtype": kept,
        "notes": notes,
    }
    return write_model(
        lm.model,
        folder,
        extra_files=extra,
        parents=parents,
        facts=facts,
        recipe=before.recipe if before is not None else None,
        shard_bytes=shard_bytes,
        replace=replace,
    )


def _merged(name: str, path: Path, dtype: str) -> LanguageModel:
    """An adapter's base with the adapter folded in."""
    from ratoon.adapt.folder import adapter_base, base_hash, load_adapter
    from ratoon.generate.lm import KEPT_FACTS, load, locate
    from ratoon.store.artifact import MANIFEST, read_manifest

    base = str(adapter_base(path))
    lm = load(base, dtype=dtype, device="cpu")
    method = load_adapter(lm.model, path, base_hash=base_hash(locate(base)))
    method.merge(lm.model)
    told = read_manifest(path).facts if (path / MANIFEST).is_file() else {}
    lm.name, lm.facts = name, {**lm.facts, **{key: told[key] for key in KEPT_FACTS & told.keys()}}
    return lm


def model_parent(name: str, path: Path) -> Parent:
    """A model as a parent: by the hash that an adapter knows its base by."""
    from ratoon.adapt.folder import base_hash
    from ratoon.store.artifact import Parent

    return Parent(kind="model", hash=base_hash(path), name=name)


def _stored_dtype(path: Path) -> str:
    """The dtype that a folder's config.json names; float32 for a GGUF file, whose numbers it holds exactly."""
    from ratoon.generate.lm import DTYPES

    if path.is_file():
        return "float32"
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    named = config.get("dtype") or config.get("torch_dtype")
    return named if named in DTYPES else "float32"


def _beside(lm: LanguageModel, path: Path) -> dict[str, bytes | Path]:
    """What stands beside the weights: the tokenizer with the template that is used, and how to generate."""
    extra: dict[str, bytes | Path] = {}
    if lm.tokenizer is not None:
        extra |= lm.tokenizer.files()
        config = json.loads(lm.tokenizer.files()["tokenizer_config.json"])
        if config.get("chat_template") is None and lm.tokenizer.chat_template is not None:
            config["chat_template"] = lm.tokenizer.chat_template
            extra["tokenizer_config.json"] = (json.dumps(config, ensure_ascii=False, indent=2) + "\n").encode()
    given = path / "generation_config.json"
    theirs = json.loads(given.read_text(encoding="utf-8")) if path.is_dir() and given.is_file() else {}
    ours = {"bos_token_id": lm.model.cfg.bos_id, "eos_token_id": list(lm.eos_ids) or None}
    ours["pad_token_id"] = lm.model.cfg.pad_id
    table = {**theirs, **{key: value for key, value in ours.items() if value is not None}}
    extra["generation_config.json"] = (json.dumps(table, indent=2) + "\n").encode()
    return extra
