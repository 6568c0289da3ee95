"""The small verbs as a user types them: pull, recipes, schema, runs, export, prepare, tokenizer."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from tokenizers import normalizers

from little import model as little_model
from ratoon.adapt.methods import settings_of
from ratoon.base import catalog
from ratoon.base.catalog import Address, Entry, EntryFile
from ratoon.cli.main import VERBS, run
from ratoon.data.prepare import Prepared
from ratoon.generate.lm import LanguageModel, load
from ratoon.model.folder import read_model, write_model
from ratoon.recipe import Recipe, read_table, shipped
from ratoon.recipe import load as load_recipe
from ratoon.store.artifact import read_manifest
from ratoon.store.runs import Run
from ratoon.tasks.registry import class_of
from ratoon.text.tokenizer import Tokenizer

TEXT = "first line of it\nsecond line of it\nfirst line of it\n"


@dataclass
class Said:
    """What a verb gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.out)
        return found


@pytest.fixture
def verb(own_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Type a command in an empty folder, with a cache folder of one's own."""
    monkeypatch.setenv("RATOON_HOME", str(own_folder / "cache"))

    def typed(*arguments: str) -> Said:
        capsys.readouterr()
        code = run(list(arguments))
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return typed


@pytest.fixture
def toy_corpus(monkeypatch: pytest.MonkeyPatch) -> Entry:
    """A corpus of the catalogue behind an address where nobody answers."""
    data = TEXT.encode()
    entry = Entry(
        name="toy-corpus",
        kind="corpus",
        what="a toy",
        language="en",
        licence="of its own",
        source=Address(url="http://127.0.0.1:9/input.txt"),
        files=(EntryFile(name="input.txt", bytes=len(data), sha256=hashlib.sha256(data).hexdigest()),),
        split_documents="lines",
    )
    monkeypatch.setitem(catalog.ENTRIES, entry.name, entry)
    return entry


def put(entry: Entry) -> Path:
    """Put the corpus's file where it belongs, by hand."""
    folder = catalog.folder_of(entry.name)
    folder.mkdir(parents=True)
    (folder / "input.txt").write_bytes(TEXT.encode())
    return folder


# -- every verb ----------------------------------------------------------------------------------------------------

MINE = ("pull", "recipes", "schema", "runs", "export", "prepare", "tokenizer")


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Each command of these verbs, with what one types to reach it."""
    for name in MINE:
        found = importlib.import_module(f"ratoon.cli.{name}").command
        yield [name], found
        if isinstance(found, click.Group):
            yield from (([name, inner], command) for inner, command in found.commands.items())


@pytest.mark.parametrize(
    ("typed", "command"), list(commands()), ids=lambda one: " ".join(one) if isinstance(one, list) else ""
)
def test_help_names_every_option_and_says_what_it_does(typed: list[str], command: click.Command, verb: Any) -> None:
    said = verb(*typed, "--help")
    assert said.code == 0 and said.err == ""
    assert command.help and command.help.splitlines()[0].split(".")[0][:30] in said.out
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.name} is not explained"
            assert max(parameter.opts, key=len) in said.out


def test_an_unknown_option_is_the_users_fault(verb: Any) -> None:
    for typed, _ in commands():
        said = verb(*typed, "--no-such-option")
        assert said.code == 2 and "--no-such-option" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        (["pul"], "'pull'"),
        (["pull", "shakespear"], "'shakespeare'"),
        (["recipes", "python-doc"], "'python-docs'"),
        (["recipes", "show", "python-doc"], "'python-docs'"),
        (["schema", "train.rowz"], "'train.rows'"),
        (["schema", "learning_rate"], "'train.learning_rate'"),
        (["runs", "gardem"], "'garden'"),
        (["export", "gardem", "out"], "'garden'"),
        (["export", "smollm2-135m", "out"], "'smollm2-135m-instruct'"),
        (["prepare", "shakespear", "--out", "out"], "'shakespeare'"),
        (["tokenizer", "train", "shakespear", "--vocab-size", "300", "--out", "out"], "'shakespeare'"),
        (["tokenizer", "inspect", "smollm2-135m"], "'smollm2-135m-instruct'"),
    ],
)
def test_an_unknown_name_gets_the_nearest(typed: list[str], near: str, verb: Any) -> None:
    Run.create("garden").write_state(status="running")
    said = verb(*typed)
    assert said.code == 2, said.err
    assert near in said.err and said.out == ""
    assert not Path("out").exists()
    if len(typed) > 1:
        told = verb(*typed, "--json")
        assert told.code == 2 and told.json["error"].endswith("Error") and near in told.out


def test_the_light_verbs_need_no_torch(own_folder: Path) -> None:
    """Each in a process of its own, so that what one imports does not hide what another does."""
    (own_folder / "a.txt").write_text("a text\n" * 9)
    lines = [
        ["recipes"],
        ["recipes", "python-docs"],
        ["schema", "--json"],
        ["pull", "--list"],
        ["runs"],
        ["prepare", "a.txt", "--out", "p", "--vocab-size", "260"],
        ["tokenizer", "inspect", "p"],
    ]
    code = (
        "import sys, json; from ratoon.cli.main import run\n"
        f"for line in json.loads({json.dumps(json.dumps(lines))}):\n"
        "    assert run(line) == 0, line\n"
        "    assert 'torch' not in sys.modules, line\n"
    )
    environment = {**os.environ, "RATOON_HOME": str(own_folder / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_real_process_speaks_on_the_right_channels(own_folder: Path) -> None:
    environment = {**os.environ, "RATOON_HOME": str(own_folder / "cache")}

    def typed(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ratoon", *arguments], capture_output=True, text=True, env=environment
        )

    done = typed("recipes", "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert {one["name"] for one in json.loads(done.stdout)["recipes"]} == set(shipped())
    done = typed("runs", "nowhere")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert done.stderr.startswith("ArtifactError: there is no run 'nowhere'")
    done = typed("--debug", "runs", "nowhere")
    assert done.returncode == 1 and "Traceback" in done.stderr


# -- pull ----------------------------------------------------------------------------------------------------------


def test_pull_answers_with_the_folder(verb: Any, toy_corpus: Entry) -> None:
    folder = put(toy_corpus)
    assert verb("pull", "toy-corpus") == Said(0, f"{folder}\n", "")
    found = verb("pull", "toy-corpus", "--json").json
    assert found["folder"] == str(folder) and found["here"] == "yes" and found["sha256"] == toy_corpus.sha256
    assert found["licence"] == "of its own" and found["bytes"] == len(TEXT)


def test_pull_without_a_network_says_what_to_do(verb: Any, toy_corpus: Entry) -> None:
    said = verb("pull", "toy-corpus")
    assert said.code == 1 and said.out == ""
    assert "fetching toy-corpus" in said.err and "put input.txt" in said.err
    assert str(catalog.folder_of("toy-corpus")) in said.err
    assert verb("pull", "toy-corpus", "--json").json["error"] == "RatoonError"


def test_pull_lists_the_catalogue(verb: Any, toy_corpus: Entry) -> None:
    said = verb("pull", "--list")
    assert said.code == 0 and said.err == ""
    for entry in catalog.ENTRIES.values():
        assert entry.name in said.out and entry.licence in said.out and str(entry.source) in said.out
    rows = {one["name"]: one for one in verb("pull", "--list", "--json").json["entries"]}
    assert rows.keys() == catalog.ENTRIES.keys() and rows["toy-corpus"]["here"] == "no"
    put(toy_corpus)
    assert {one["name"]: one["here"] for one in verb("pull", "--list", "--json").json["entries"]}["toy-corpus"] == "yes"
    (catalog.folder_of("toy-corpus") / "input.txt").write_text("mine")
    rows = {one["name"]: one for one in verb("pull", "--list", "--json").json["entries"]}
    assert rows["toy-corpus"]["here"].startswith("another file: ")


def test_pull_wants_a_name_or_the_list(verb: Any) -> None:
    for typed in (["pull"], ["pull", "shakespeare", "--list"]):
        said = verb(*typed)
        assert said.code == 2 and "--list" in said.err


# -- recipes -------------------------------------------------------------------------------------------------------


def test_recipes_lists_with_size_and_language(verb: Any) -> None:
    said = verb("recipes")
    assert said.code == 0
    assert verb("recipes", "list").out == said.out
    lines = {line.split()[0]: line for line in said.out.splitlines()}
    assert set(shipped()) <= lines.keys()
    assert "zh" in lines["reviews-zh"] and "7.4 MB" in lines["reviews-zh"]
    assert "smollm2-135m-instruct, 98.4 MB" in lines["continue-smollm2"]
    assert lines["clue-cluener"].split()[4] == "base-zh" and lines["base-zh"].split()[5] == "nothing"
    found = {one["name"]: one for one in verb("recipes", "--json").json["recipes"]}
    assert found["reviews-zh"]["corpus"]["licence"] == catalog.ENTRIES["reviews-zh"].licence
    assert all(one["what"] for one in found.values())


PRETRAINING = sorted(name for name in shipped() if "task" not in read_table(name)[0])


@pytest.mark.parametrize("name", sorted(shipped().keys() - set(PRETRAINING)))
def test_recipes_shows_one_of_fine_tuning(name: str, verb: Any) -> None:
    said = verb("recipes", name)
    assert said.code == 0
    assert yaml.safe_load(said.out) == yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))
    assert f"next: ratoon finetune {name}" in said.err
    assert ("`ratoon pretrain base-zh` makes, to be run first" in said.err) == ("base: base-zh" in said.out)
    found = verb("recipes", "show", name, "--json").json
    assert found["recipe"]["name"] == name and found["task"] == found["recipe"]["task"]["kind"]


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipes_shows_the_file_and_what_it_derives(name: str, verb: Any) -> None:
    said = verb("recipes", name)
    assert said.code == 0
    assert yaml.safe_load(said.out) == yaml.safe_load(shipped()[name].read_text(encoding="utf-8"))
    assert f"next: ratoon pretrain {name}" in said.err and "derived train.seed" in said.err
    assert ("licence: " in said.err) == ("corpus" in read_table(name)[0]["data"])  # files of one's own have their own
    found = verb("recipes", "show", name, "--json").json
    assert found["recipe"]["name"] == name
    assert {one["key"] for one in found["derived"]} >= {"train.seed"}


def test_recipes_shows_a_file_of_ones_own(verb: Any, own_folder: Path) -> None:
    path = own_folder / "mine.yaml"
    path.write_text("# Mine.\ndata: {sources: [a.txt]}\n")
    said = verb("recipes", str(path))
    assert said.code == 0 and said.out == path.read_text()


# -- schema --------------------------------------------------------------------------------------------------------


def test_schema_explains_every_key(verb: Any) -> None:
    from ratoon.cli.schema import all_keys
    from ratoon.model.config import ModelConfig
    from ratoon.train.settings import TrainSettings

    said = verb("schema")
    assert said.code == 0 and said.err == ""
    keys = {one.name: one for one in all_keys()}
    wanted = {f"train.{name}" for name in TrainSettings.model_fields}
    wanted |= {f"model.settings.{name}" for name in ModelConfig.model_fields}
    wanted |= {"name", "data.sources", "model.size", "model.settings.moe.experts", "model.settings.rope_scaling.factor"}
    assert wanted <= keys.keys()
    for name, key in keys.items():
        assert key.description, f"{name} is not explained"
        assert key.type and "typing" not in key.type and "<" not in key.type.replace("<=", "").replace("< ", "")
        assert f"\n{name}: {key.type}" in "\n" + said.out
    assert keys["train.rows"].default == 32 and keys["train.rows"].type == "whole number, >= 1"
    assert keys["model.settings.family"].default == "nanochat", "a recipe's default, not the bare settings'"
    assert keys["data"].required and not keys["model.settings.width"].required


def test_schema_of_one_table(verb: Any) -> None:
    said = verb("schema", "model.settings.moe")
    assert said.code == 0 and said.out.startswith("model.settings.moe: table")
    assert {one["name"] for one in verb("schema", "data", "--json").json["keys"]} == {
        "data",
        *(f"data.{name}" for name in load_recipe("python-docs").data.model_dump()),
    }


@pytest.mark.parametrize("kind", ["task.scoring", "method.lora"])
def test_schema_of_one_kind(kind: str, verb: Any) -> None:
    """Its own settings alone, with its own defaults, though the key is one of fine-tuning."""
    found = verb("schema", kind, "--json").json["keys"]
    table, _, name = kind.partition(".")
    assert found[0]["name"] == f"{table}.kind" and found[0]["type"] == name
    settings = class_of(name).settings_type if table == "task" else settings_of(name)
    wanted = {f"{table}.{field}": one.default for field, one in settings.model_fields.items() if field != "kind"}
    assert {one["name"] for one in found[1:]} == set(wanted)
    for one in found[1:]:
        default = wanted[one["name"]]
        assert one["default"] == (list(default) if isinstance(default, tuple) else default)


def test_schema_finds_keys_of_fine_tuning_too(verb: Any) -> None:
    said = verb("schema", "task.stretch")
    assert said.code == 0 and said.out.startswith("task.stretch: true or false or absent")
    assert "did you mean 'task.stretch'?" in verb("schema", "task.strech").err


@pytest.mark.parametrize(
    ("told", "command"),
    [
        ("task.lo=2", "ratoon schema task"),
        ("method.rnk=2", "ratoon schema method"),
        ("train.row=2", "ratoon schema train"),
        ("modl.base=x", "ratoon schema --finetune"),
    ],
)
def test_an_error_of_fine_tuning_names_the_command_that_explains_it(told: str, command: str, verb: Any) -> None:
    said = verb("finetune", "essays-en", told)
    assert said.code == 2 and f"`{command}` lists every key" in said.err
    assert verb(*command.split()[1:]).code == 0


def test_the_json_schema_takes_what_ships_and_refuses_what_is_wrong(verb: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = verb("schema", "--json").json
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    tuning = jsonschema.Draft202012Validator(verb("schema", "--finetune", "--json").json)
    for name, path in shipped().items():
        (check if name in PRETRAINING else tuning).validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    row = {"data": {"train": ["a"]}, "model": {"base": "b"}}
    assert tuning.is_valid({**row, "task": {"kind": "tagging", "join": ""}})
    assert not tuning.is_valid({**row, "task": {"kind": "taging"}})
    assert not tuning.is_valid({**row, "task": {"kind": "tagging", "stop": ["x"]}})
    assert not tuning.is_valid({**row, "task": {"kind": "tagging"}, "method": {"kind": "lora", "rnk": 4}})
    good = {"data": {"sources": ["a"]}, "train": {"rows": 4}, "model": {"settings": {"width": 64, "moe": None}}}
    check.validate(good)
    for wrong in (
        {"data": {"sources": ["a"]}, "minuts": 3},
        {"data": {"sources": ["a"]}, "train": {"rowz": 3}},
        {"data": {"sources": ["a"]}, "train": {"rows": "many"}},
        {"data": {"sources": ["a"]}, "train": {"optimizer": "sgd"}},
        {"data": {"sources": ["a"]}, "model": {"settings": {"layrs": 2}}},
        {"data": {"sources": ["a"]}, "model": {"settings": {"moe": {"expert": 2}}}},
        {"name": "x"},
    ):
        assert not check.is_valid(wrong), wrong
    assert set(schema["properties"]) == set(Recipe.model_fields)


# -- runs ----------------------------------------------------------------------------------------------------------


def make_runs() -> None:
    """A run that is done, one that was interrupted, one that goes on, one that failed before it began."""
    done = Run.create("done")
    done.recipe_path.write_text("name: done\n")
    done.report.write_text("<html>")
    done.append_metrics({"step": 9, "kind": "train", "time_seconds": 50.0, "loss": 2.5, "tokens": 90})
    done.write_state(
        status="done",
        steps=10,
        tokens=100,
        seconds=120.0,
        evaluation={"loss": 2.25, "interval": [2.2, 2.3], "perplexity": 9.5, "bits_per_byte": 1.25, "n_tokens": 5000},
        model={"parameters": 12345, "family": "nanochat", "layers": 2, "width": 16},
        data={"sources": ["a.txt"], "train_tokens": 1000, "held_out_tokens": 50, "vocab_size": 300},
        next_commands=["ratoon evaluate done"],
    )
    stopped = Run.create("stopped")
    stopped.recipe_path.write_text("name: stopped\n")
    record = {"kind": "train", "time_seconds": 6.0, "loss": 3.5, "tokens": 70, "tokens_per_second": 1234.0}
    stopped.append_metrics({"step": 7, **record, "memory_bytes": 2 * 10**9})
    stopped.append_metrics({"step": 5, "kind": "eval", "time_seconds": 5.0, "loss": 3.75, "n_tokens": 9})
    stopped.write_state(status="interrupted", reason="stopped by the user")
    Run.create("going").write_state(status="running")
    Run.create("failed").write_state(status="failed", reason="the corpus is empty")


def test_runs_lists(verb: Any) -> None:
    said = verb("runs")
    assert said.code == 0 and said.out == "" and "ratoon quickstart" in said.err
    assert verb("runs", "--json").json == {"runs": []}
    make_runs()
    said = verb("runs")
    lines = {line.split()[0]: line.split() for line in said.out.splitlines()}
    assert lines["done"][1:6] == ["done", "10", "2.2500", "1.2500", "-"]
    assert lines["stopped"][1:6] == ["interrupted", "7", "3.7500", "-", "-"]
    assert lines["failed"][1:6] == ["failed", "-", "-", "-", "-"]
    assert [lines[name][6] for name in ("done", "stopped", "failed")] == ["2.0", "0.1", "-"]
    assert [one["name"] for one in verb("runs", "list", "--json").json["runs"]] == [
        "done",
        "stopped",
        "going",
        "failed",
    ]


def test_runs_shows_one(verb: Any) -> None:
    make_runs()
    said = verb("runs", "done")
    assert said.code == 0 and said.err == ""
    for words in (
        "12,345 parameters, 2 layers, 16 wide",
        "1,000 to train on, 50 held out",
        "10 steps, 100 tokens",
        "2.2500 [2.2000, 2.3000], n = 5,000 tokens",
        "9.5000 perplexity, 1.2500 bits per byte",
        "runs/done/report.html",
        "\nnext:\n  ratoon evaluate done",
    ):
        assert words in said.out, words
    assert "model   " not in said.out.replace("model         ", ""), "what is not on the disk has no place"
    assert verb("runs", "show", "done").out == said.out == verb("runs", "runs/done").out
    said = verb("runs", "stopped")
    assert "interrupted: stopped by the user" in said.out and "1,234 tokens/s" in said.out and "2.0 GB" in said.out
    assert "ratoon pretrain runs/stopped/recipe.yaml --resume" in said.out
    assert "seconds ago" in verb("runs", "going").out
    found = verb("runs", "stopped", "--json").json
    assert found["state"]["status"] == "interrupted" and found["train_loss"] == 3.5 and found["model_hash"] is None


# -- export --------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(own_folder: Path) -> Path:
    """A little model in a folder, with a tokenizer, a template and settings of generation that are not ours."""
    tokenizer = Tokenizer.bytes_only()
    model = little_model(vocab_size=tokenizer.vocab_size)
    files = {**tokenizer.files(), "generation_config.json": b'{"temperature": 0.3, "bos_token_id": 1}'}
    write_model(model, own_folder / "source", extra_files=files, facts={"step": 7}, recipe={"name": "old"})
    return own_folder / "source"


def test_export_writes_a_folder_that_is_the_same_model(verb: Any, source: Path) -> None:
    said = verb("export", "source", "out")
    assert said.code == 0 and said.out == "out\n" and "parameters as float32" in said.err
    one, other = read_model(source), read_model("out")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    names = {path.name for path in Path("out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= names
    assert json.loads(Path("out/generation_config.json").read_text())["temperature"] == 0.3
    assert "chat_template" in json.loads(Path("out/tokenizer_config.json").read_text())
    manifest, before = read_manifest("out", "model", check="hash"), read_manifest(source)
    assert manifest.parent("model").hash == before.hash and manifest.parent("model").name == "source"
    assert manifest.parent("tokenizer").hash == Tokenizer.load(source).hash
    assert manifest.facts["step"] == 7 and manifest.recipe == {"name": "old"}
    again = verb("export", "out", "third", "--json").json
    assert again["parents"][0]["hash"] == manifest.hash and again["files"].keys() == names - {"ratoon.json"}


def test_export_rounds_and_shards_as_told(verb: Any, source: Path) -> None:
    found = verb("export", "source", "out", "--dtype", "bfloat16", "--max-shard-size", "20KB", "--json").json
    assert found["dtype"] == "bfloat16"
    assert len([name for name in found["files"] if name.endswith(".safetensors")]) > 1
    for one, other in zip(read_model(source).parameters(), read_model("out", torch.bfloat16).parameters(), strict=True):
        assert torch.equal(one.to(torch.bfloat16), other)
    assert verb("export", "out", "kept", "--json").json["dtype"] == "bfloat16", "absent: as the files hold it"
    assert verb("export", "out", "wide", "--dtype", "float32", "--json").json["dtype"] == "float32"
    for size in ("0", "-1", "7QB", "big"):
        said = verb("export", "source", "no", f"--max-shard-size={size}")
        assert said.code == 2 and "no size" in said.err and not Path("no").exists()


def test_export_writes_over_nothing_that_is_not_ours(verb: Any, source: Path) -> None:
    assert verb("export", "source", "out").code == 0
    before = read_manifest("out").hash
    said = verb("export", "source", "out", "--dtype", "bfloat16")
    assert said.code == 2 and "--replace" in said.err and read_manifest("out").hash == before
    assert verb("export", "source", "out", "--dtype", "bfloat16", "--replace").code == 0
    assert read_manifest("out").hash != before
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    said = verb("export", "source", "mine", "--replace")
    assert said.code == 2 and "did not make" in said.err and Path("mine/letter.txt").read_text() == "dear"
    Path("file").write_text("dear")
    assert verb("export", "source", "file", "--replace").code == 2 and Path("file").read_text() == "dear"


def test_export_of_a_model_without_a_tokenizer_says_so(verb: Any, own_folder: Path) -> None:
    LanguageModel(little_model()).save(own_folder / "bare")
    said = verb("export", "bare", "out")
    assert said.code == 0 and "no tokenizer" in said.err and not Path("out/tokenizer.json").exists()


def test_export_of_a_run(verb: Any, source: Path) -> None:
    run = Run.create("garden")
    said = verb("export", "garden", "out")
    assert said.code == 2 and "no run of that name" in said.err
    run.write_state(status="running")
    said = verb("export", "garden", "out")
    assert said.code == 2 and "has not written its model yet" in said.err
    source.rename(run.model)
    assert verb("export", "garden", "out").code == 0
    assert read_manifest("out").parent("model").name == "garden"
    assert read_manifest("out").parent("model").hash == read_manifest(run.model).hash


@pytest.mark.slow
def test_export_of_the_real_gguf(
    own_folder: Path, smollm2_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GGUF in, safetensors out: the same numbers, the same tokenizer; rounded only when told."""
    assert run(["export", str(smollm2_path), "out", "--dtype", "bfloat16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 134_515_008
    one, other = load(smollm2_path, dtype="bfloat16"), load("out", dtype="bfloat16")
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.tokenizer is not None and other.tokenizer is not None
    assert one.tokenizer.hash == other.tokenizer.hash and one.tokenizer.chat_template == other.tokenizer.chat_template
    assert one.eos_ids == other.eos_ids


# -- prepare -------------------------------------------------------------------------------------------------------


def write_corpus(folder: Path, count: int = 60) -> Path:
    """Lines, one of them twice and one empty."""
    digests = [hashlib.sha256(str(i).encode()).hexdigest()[:24] for i in range(count)]
    lines = [f"line number {i} of a small corpus goes on with {digest}" for i, digest in enumerate(digests)]
    path = folder / "book.txt"
    path.write_text("\n".join([*lines[:9], "", *lines, "end"]) + "\n", encoding="utf-8")
    return path


def test_prepare_prints_the_ledger_and_leaves_a_folder(verb: Any, own_folder: Path) -> None:
    write_corpus(own_folder)
    said = verb("prepare", "book.txt", "--out", "data", "--split-documents", "lines", "--vocab-size", "300")
    assert said.code == 0 and said.out == "data\n"
    prepared = Prepared.open("data")
    assert prepared.tokenizer.vocab_size == 300
    table = {line.split()[0]: line for line in said.err.splitlines() if line.strip()}
    for reason, account in {"read": prepared.ledger["read"], **prepared.ledger["accounts"]}.items():
        assert [f"{account[what]:,}" for what in ("documents", "bytes", "tokens")] == table[reason].split()[1:4]
    assert prepared.ledger["accounts"]["duplicate"]["documents"] == 9
    assert "first: book.txt:11" in table["duplicate"]
    assert "ratoon pretrain RECIPE data.prepared=data" in said.err


def test_prepare_as_json_adds_up(verb: Any, own_folder: Path) -> None:
    write_corpus(own_folder)
    found = verb("prepare", "book.txt", "--out", "data", "--split-documents", "lines", "--json").json
    ledger = found["ledger"]
    for what in ("documents", "bytes", "tokens"):
        assert ledger["read"][what] == sum(account[what] for account in ledger["accounts"].values())
    prepared = Prepared.open("data")
    assert (found["hash"], found["train_tokens"]) == (prepared.manifest.hash, prepared.train.n_tokens)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (["--vocab-size", "280"], lambda one, other: one["vocab_size"] == 280 != other["vocab_size"]),
        (["--held-out-fraction", "0.5"], lambda one, other: one["held_out_tokens"] > 3 * other["held_out_tokens"]),
        (["--min-characters", "12"], lambda one, other: one["ledger"]["accounts"]["too_short"]["documents"] == 1),
        (["--seed", "2"], lambda one, other: one["hash"] != other["hash"]),
        (["--split-documents", "number"], lambda one, other: one["ledger"] != other["ledger"]),
    ],
)
def test_every_option_of_prepare_does_something(options: list[str], change: Any, verb: Any, own_folder: Path) -> None:
    write_corpus(own_folder)
    plain = ["prepare", "book.txt", "--split-documents", "lines", "--vocab-size", "300", "--json"]
    other = verb(*plain, "--out", "plain").json
    one = verb(*plain, *options, "--out", "changed").json
    assert change(one, other)


def test_prepare_reads_rows_and_other_encodings(verb: Any, own_folder: Path) -> None:
    rows = [{"q": f"a question number {i}", "text": "never"} for i in range(9)]
    text = "\n".join(json.dumps(row) for row in rows)
    with gzip.open("rows.jsonl.gz", "wt") as out:
        out.write(text + "\n{broken\n")
    plain = ["prepare", "rows.jsonl.gz", "--out", "data", "--vocab-size", "300", "--field", "q"]
    said = verb(*plain)
    assert said.code == 2 and "rows.jsonl.gz:10" in said.err and not Path("data").exists()
    found = verb(*plain, "--on-bad-row", "skip", "--json").json
    assert found["ledger"]["accounts"]["broken row"]["documents"] == 1
    Path("old.txt").write_bytes("质量不错，送货也快。\n".encode("gb18030") * 30)
    assert verb("prepare", "old.txt", "--out", "old", "--vocab-size", "300").code == 2
    assert verb("prepare", "old.txt", "--out", "old", "--vocab-size", "300", "--encoding", "gb18030").code == 0
    assert "质量不错" in Prepared.open("old").tokenizer.decode(list(Prepared.open("old").train.tokens(0, 40)))


def test_prepare_with_a_tokenizer_of_another_folder(verb: Any, own_folder: Path, source: Path) -> None:
    write_corpus(own_folder)
    assert verb("prepare", "book.txt", "--out", "one", "--vocab-size", "300").code == 0
    for name in ("one", "one/tokenizer", "source"):
        out = f"as-{name.replace('/', '-')}"
        assert verb("prepare", "book.txt", "--out", out, "--tokenizer", name).code == 0
        assert Prepared.open(out).tokenizer.hash == Tokenizer.load("one/tokenizer" if "one" in name else name).hash


def test_prepare_a_name_of_the_catalogue(verb: Any, toy_corpus: Entry) -> None:
    put(toy_corpus)
    said = verb("prepare", "toy-corpus", "--out", "data", "--vocab-size", "300")
    assert said.code == 0 and "data.split_documents = lines" in said.err
    assert Prepared.open("data").ledger["accounts"]["duplicate"]["documents"] == 1


def test_prepare_refuses_before_it_works(verb: Any, own_folder: Path) -> None:
    write_corpus(own_folder)
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for typed, words in (
        (["book.txt", "--out", "mine"], "exists already"),
        (["book.txt", "--out", "mine", "--replace"], "did not make"),
        (["book.txt", "--out", "new", "--vocab-size", "10"], "vocab_size"),
        (["nothing.txt", "--out", "new"], "no such file"),
        (["book.txt", "--out", "new", "--held-out-fraction", "2"], "held_out_fraction"),
        (["book.txt", "--out", "new", "--tokenizer", "nowhere"], "nowhere"),
    ):
        said = verb("prepare", *typed)
        assert said.code == 2 and words in said.err and said.out == "", typed
    assert Path("mine/letter.txt").read_text() == "dear" and not Path("new").exists()
    assert verb("prepare", "book.txt", "--out", "data", "--vocab-size", "300").code == 0
    assert verb("prepare", "book.txt", "--out", "data", "--vocab-size", "301", "--replace").code == 0
    assert Prepared.open("data").tokenizer.vocab_size == 301


# -- tokenizer -----------------------------------------------------------------------------------------------------


def test_tokenizer_train_leaves_an_artifact(verb: Any, own_folder: Path) -> None:
    write_corpus(own_folder)
    found = verb("tokenizer", "train", "book.txt", "--vocab-size", "300", "--out", "tok", "--json").json
    tokenizer = Tokenizer.load("tok")
    assert found["hash"] == tokenizer.hash and found["vocab_size"] == tokenizer.vocab_size == 300
    assert found["bytes"] == Path("book.txt").stat().st_size
    assert read_manifest("tok", "tokenizer", check="hash").facts["hash"] == tokenizer.hash
    said = verb("tokenizer", "train", "book.txt", "--vocab-size", "300", "--out", "tok")
    assert said.code == 2 and "exists already" in said.err
    said = verb("tokenizer", "train", "book.txt", "--vocab-size", "9000", "--out", "tok", "--replace")
    assert said.code == 0 and said.out == "tok\n" and "not 9,000" in said.err
    assert verb("tokenizer", "train", "book.txt", "--vocab-size", "100", "--out", "no").code == 2


def test_split_han_reaches_every_tokenizer_that_is_trained(verb: Any, own_folder: Path) -> None:
    Path("zh.txt").write_text("".join(f"一个人坐在门口{i}。\n" for i in range(80)), encoding="utf-8")
    plain = ["zh.txt", "--vocab-size", "300", "--split-documents", "lines"]
    for name, verbs in (("tok", ["tokenizer", "train"]), ("data", ["prepare"])):
        for out, option in ((name, []), (f"{name}-alone", ["--split-han"])):
            assert verb(*verbs, *plain, *option, "--out", out).code == 0
            tokenizer = Tokenizer.load(Path(out) / "tokenizer" if name == "data" else out)
            assert (len(tokenizer.encode("一个人")) == 3) == bool(option)
    Path("r.yaml").write_text(
        "data: {sources: [zh.txt], split_documents: lines, vocab_size: 300}\nmodel: {size: tiny}\ntrain: {steps: 1}\n"
    )
    said = [verb("plan", "r.yaml", "--json", f"data.split_han={value}").json for value in ("false", "true")]
    assert said[0]["data"] != said[1]["data"]


def test_tokenizer_train_says_what_it_left_out(verb: Any, own_folder: Path) -> None:
    Path("rows.jsonl").write_text('{"q": "hello hello"}\n\n{broken\n')
    typed = ["tokenizer", "train", "rows.jsonl", "--vocab-size", "262", "--out", "tok", "--field", "q"]
    said = verb(*typed)
    assert said.code == 2 and "rows.jsonl:3" in said.err and not Path("tok").exists()
    said = verb(*typed, "--on-bad-row", "skip")
    assert said.code == 0 and "1 documents" in said.err
    assert "broken row: 1 documents left out (first: rows.jsonl:3)" in said.err
    assert "empty: 1 documents left out (first: rows.jsonl:2)" in said.err


def test_tokenizer_inspect_counts_as_by_hand(verb: Any, own_folder: Path) -> None:
    path = write_corpus(own_folder)
    assert verb("tokenizer", "train", "book.txt", "--vocab-size", "320", "--out", "tok").code == 0
    tokenizer = Tokenizer.load("tok")
    (own_folder / "rows.jsonl").write_text(json.dumps({"text": "zz 七"}) + "\n")
    found = verb("tokenizer", "inspect", "tok", "book.txt", "rows.jsonl", "--json").json
    text = path.read_text(encoding="utf-8")
    ids = tokenizer.encode(text)
    one = found["texts"][0]
    assert (one["characters"], one["bytes"], one["tokens"]) == (len(text), len(text.encode()), len(ids))
    assert one["bytes_per_token"] == len(text.encode()) / len(ids)
    assert one["round_trip"] and found["texts"][1]["characters"] == 4 and found["texts"][1]["bytes"] == 6
    used = set(ids) | set(tokenizer.encode("zz 七"))
    unused = [number for number in range(tokenizer.vocab_size) if number not in used | tokenizer.special_ids]
    assert found["unused"]["count"] == len(unused) and found["unused"]["of"] == 320 - len(tokenizer.special)
    assert [row["id"] for row in found["unused"]["first"]] == unused[: len(found["unused"]["first"])]
    lengths = {number: len(tokenizer.decode([number]).encode()) for number in range(320)}
    assert lengths[found["longest"][0]["id"]] == max(lengths.values())
    assert found["hash"] == tokenizer.hash and found["special_tokens"] == tokenizer.special
    assert found["chat_template"] is True and found["begins_with_bos"] is True


def test_tokenizer_inspect_measures_the_samples(verb: Any, source: Path) -> None:
    from ratoon.cli.tokenizer import SAMPLES

    said = verb("tokenizer", "inspect", "source")
    assert said.code == 0 and said.err == ""
    rows = {line.split()[0]: line.split() for line in said.out.splitlines() if line}
    for name, text in SAMPLES.items():
        size = len(text.encode())
        # One byte a token: what is known beforehand.
        ratio = f"{len(text) / size:.2f}"
        assert rows[name][1:] == [f"{len(text):,}", f"{size:,}", f"{size:,}", "1.00", ratio, "exact"]
    assert "round trip of difficult signs: exact" in said.out
    assert verb("tokenizer", "inspect", "source", "--json").json["unused"] is None


def test_tokenizer_inspect_finds_what_is_lost(verb: Any, own_folder: Path) -> None:
    tokenizer = Tokenizer.bytes_only()
    tokenizer.core.normalizer = normalizers.Lowercase()
    Path("lossy").mkdir()
    tokenizer.save("lossy")
    found = verb("tokenizer", "inspect", "lossy", "--json").json
    lost = {one["name"]: one["lost"] for one in found["texts"]}
    assert lost["chinese"] is None and lost["english"].startswith("at character 0: 'The")
    assert found["hard_round_trip"].startswith("at character 0: 'A")
    assert "comes back as" in verb("tokenizer", "inspect", "lossy").out


def test_tokenizer_inspect_of_what_has_none(verb: Any, own_folder: Path) -> None:
    LanguageModel(little_model()).save(own_folder / "bare")
    for name, words in (("bare", "no tokenizer"), ("nowhere", "no model 'nowhere'")):
        said = verb("tokenizer", "inspect", name)
        assert said.code == 2 and words in said.err
    assert verb("tokenizer", "inspect", "bare", "missing.txt").code == 2


@pytest.mark.slow
def test_tokenizer_inspect_of_the_real_gguf(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["tokenizer", "inspect", str(smollm2_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["vocab_size"] == 49_152 and found["hard_round_trip"] is None
    ratio = {one["name"]: one["bytes_per_token"] for one in found["texts"]}
    assert ratio["english"] > 4 > ratio["chinese"]


def test_the_verbs_are_in_the_group() -> None:
    assert set(MINE) <= VERBS.keys()
