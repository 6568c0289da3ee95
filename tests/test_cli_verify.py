"""`ratoon verify`: passes on a whole model, and each check is seen failing on one that is broken on purpose."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import little
from ratoon.cli.main import run as ratoon
from ratoon.generate.lm import LanguageModel
from ratoon.text.tokenizer import Tokenizer

NAMES = ["cached", "batched", "packed", "accumulated", "native", "saved", "transformers", "tokenizer", "manifest"]
TEXTS = ["The old root sends up new shoots, and the field is green again. " * 4, "老根上长出新苗，田里又是一片绿。" * 4]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, vocab_size=320)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(own_folder: Path, tokenizer: Tokenizer) -> Path:
    made = little.model(vocab_size=tokenizer.vocab_size, tied_embeddings=False)
    return LanguageModel(made.eval(), tokenizer).save(own_folder / "model")


def checks(capsys: pytest.CaptureFixture[str], model: Path | str, code: int) -> dict[str, dict[str, Any]]:
    """The checks of `ratoon verify MODEL --json` by name, after seeing its exit code."""
    with pytest.raises(SystemExit) if code else _nothing() as caught:
        assert ratoon(["verify", str(model), "--json"]) == 0
    if code:
        assert caught.value.code == code
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is (code == 0)
    assert [check["name"] for check in found["checks"]] == NAMES
    return {check["name"]: check for check in found["checks"]}


class _nothing:
    def __enter__(self) -> Any:
        return None

    def __exit__(self, *error: object) -> None:
        return None


def test_a_whole_model_passes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checks(capsys, folder, 0)
    for name, check in found.items():
        if check["passed"] is None:
            assert check["note"].startswith("not checked: "), name
            continue
        assert check["passed"] and check["difference"] <= check["tolerance"], check
    assert found["saved"]["difference"] == 0
    for name in ("cached", "batched", "packed", "accumulated", "saved", "tokenizer", "manifest"):
        assert found[name]["passed"], name


def test_as_a_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ratoon(["verify", str(folder)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == NAMES
    assert "largest difference" in lines[0] and "tolerance" in lines[0]
    assert "0 failed" in lines[-1]
    assert "embedded sentences in English and Chinese" in said.err


def test_without_a_tokenizer_or_a_manifest(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LanguageModel(little.model().eval()).save(own_folder / "bare")
    (own_folder / "bare" / "ratoon.json").unlink()
    found = checks(capsys, own_folder / "bare", 0)
    assert found["tokenizer"]["note"] == "not checked: the model has no tokenizer"
    assert "no manifest" in found["manifest"]["note"]
    assert found["cached"]["passed"] and found["packed"]["passed"]


def test_a_missing_model_is_refused_as_everywhere(own_folder: Path) -> None:
    assert ratoon(["verify", "nowhere"]) == 2


def test_without_transformers_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    found = checks(capsys, folder, 0)["transformers"]
    assert found["passed"] is None
    assert found["note"] == "not checked: the package transformers is not installed"


def test_without_room_for_a_copy_it_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = checks(capsys, folder, 0)
    assert found["saved"]["passed"] is None and "are free" in found["saved"]["note"]
    assert found["transformers"]["passed"] is None


# -- seen failing ------------------------------------------------------------------------------------------------------


def test_a_cache_that_forgets(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from ratoon.model.cache import Cache

    extend = Cache.extend

    def forgetful(self: Cache, layer: int, k: Any, v: Any) -> Any:
        keys, values = extend(self, layer, k, v)
        return keys, torch.cat([values[:, :, :1] * 0.9, values[:, :, 1:]], dim=2)

    monkeypatch.setattr(Cache, "extend", forgetful)
    assert checks(capsys, folder, 1)["cached"]["passed"] is False


def test_padding_that_is_seen(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from ratoon.generate.decode import Reader

    init = Reader.__init__

    def unpadded(self: Reader, *arguments: Any) -> None:
        init(self, *arguments)
        rows = [[0] * pad + list(prompt) for pad, prompt in zip(self.padding, self.prompts, strict=True)]
        self.prompts, self.padding = rows, [0] * len(rows)
        self.position = [len(row) for row in rows]

    monkeypatch.setattr(Reader, "__init__", unpadded)
    found = checks(capsys, folder, 1)
    assert found["batched"]["passed"] is False
    assert found["cached"]["passed"] and found["packed"]["passed"]


def test_documents_that_see_each_other(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from ratoon.model import transformer

    visible = transformer.visible

    def everything(document_BT: Any, document_BS: Any, **more: Any) -> Any:
        return visible(None, None, **more)

    monkeypatch.setattr(transformer, "visible", everything)
    found = checks(capsys, folder, 1)
    assert found["packed"]["passed"] is False
    assert found["cached"]["passed"]


def test_positions_that_run_on(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """With rotary positions only distances count within a document: shifted ones pass, stretched ones do not."""
    from ratoon.evaluate import verify

    whole_rows = verify.whole_rows

    def stretched(*arguments: Any) -> Any:
        batch = whole_rows(*arguments)
        batch.position_BT[:] = batch.position_BT * 2 % 60
        return batch

    monkeypatch.setattr(verify, "whole_rows", stretched)
    assert checks(capsys, folder, 1)["packed"]["passed"] is False


def test_a_mean_of_means(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from ratoon.train import loss

    next_token = loss.next_token

    def mean(model: Any, inputs: Any) -> Any:
        total, weight = next_token(model, inputs)
        return total / weight, torch.ones(())

    monkeypatch.setattr(loss, "next_token", mean)
    found = checks(capsys, folder, 1)
    assert [name for name, check in found.items() if check["passed"] is False] == ["accumulated"]


def test_a_c_step_that_is_off(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from ratoon.generate import native

    try:
        native.kernel()
    except native.Unavailable as error:
        pytest.skip(f"no C step on this machine: {error}")
    monkeypatch.setitem(native._ACTIVATIONS, "swiglu", native._ACTIVATIONS["relu2"])
    found = checks(capsys, folder, 1)
    assert [name for name, check in found.items() if check["passed"] is False] == ["native"]


def test_weights_that_are_rounded_on_the_way(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from ratoon.model import folder as folders

    to_family = folders.to_family

    def rounded(model: Any, dtype: Any = None) -> Any:
        return {name: value.bfloat16().float() for name, value in to_family(model, dtype).items()}

    monkeypatch.setattr(folders, "to_family", rounded)
    assert checks(capsys, folder, 1)["saved"]["passed"] is False


def test_a_config_that_says_something_else(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """What only Transformers can notice: we read back what we wrote, wrong as it is for others."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("Transformers is not installed")
    from ratoon.evaluate import verify

    saved = verify._saved

    def misnamed(subject: Any, workplace: Path) -> Any:
        found = saved(subject, workplace)
        path = subject.saved / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config["rms_norm_eps"] = 0.5
        path.write_text(json.dumps(config), encoding="utf-8")
        return found

    monkeypatch.setattr(verify, "_saved", misnamed)
    found = checks(capsys, folder, 1)
    assert [name for name, check in found.items() if check["passed"] is False] == ["transformers"]


def test_a_tokenizer_that_loses_something(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, *given: decode(self, *given).replace("\t", " "))
    found = checks(capsys, folder, 1)
    assert [name for name, check in found.items() if check["passed"] is False] == ["tokenizer"]
    assert found["tokenizer"]["difference"] == 1


def test_a_file_that_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One letter in a file that no size gives away."""
    path = folder / "generation_config.json"
    path.write_bytes(path.read_bytes()[:-1] + b" ")
    found = checks(capsys, folder, 1)
    assert [name for name, check in found.items() if check["passed"] is False] == ["manifest"]
    assert "generation_config.json" in found["manifest"]["note"]


def test_a_number_that_is_none_fails(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """NaN is neither larger nor smaller than the tolerance."""
    from ratoon.model.transformer import Transformer

    logits = Transformer.logits
    monkeypatch.setattr(Transformer, "logits", lambda self, hidden: logits(self, hidden) * float("nan"))
    found = checks(capsys, folder, 1)
    assert found["cached"]["passed"] is False and found["batched"]["passed"] is False


# -- runs and real weights ---------------------------------------------------------------------------------------------


def test_a_run_on_its_own_held_out_text(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: a run that was trained here, its shards, its checkpoints; then a torn checkpoint."""
    from ratoon.cli.pretrain import run_recipe
    from ratoon.recipe import load

    text = "".join(f"Shoot number {i} of row {i % 7} is {'green' if i % 3 else 'dry'}.\n" for i in range(300))
    (own_folder / "text.txt").write_text(text, encoding="utf-8")
    table = {
        "name": "tiny",
        "data": {"sources": ["text.txt"], "vocab_size": 300, "split_documents": "lines"},
        "model": {"size": "tiny", "settings": {"layers": 1, "width": 16, "heads": 2}},
        "train": {"steps": 4, "rows": 8, "context_tokens": 16, "precision": "float32", "compile": "off"},
        "samples": ["Shoot"],
        "sample_tokens": 4,
    }
    made = run_recipe(load(table))
    capsys.readouterr()
    found = checks(capsys, "tiny", 0)
    assert all(check["passed"] is not False for check in found.values())
    assert int(found["manifest"]["note"].split(" folders")[0].split()[-1]) >= 3
    weights = next(made.checkpoints.glob("step-*/optimizer.safetensors"))
    torn = bytearray(weights.read_bytes())
    torn[-1] ^= 1
    weights.write_bytes(bytes(torn))
    assert checks(capsys, "tiny", 1)["manifest"]["passed"] is False


@pytest.mark.slow
def test_smollm2(smollm2_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checks(capsys, "smollm2-135m-instruct", 0)
    assert found["cached"]["passed"] and found["accumulated"]["passed"] and found["saved"]["passed"]
    assert found["manifest"]["passed"], "the catalogue knows this file's hash"
