"""Recipes: each that ships settles; what does not fit is refused with file, line, key and the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from ratoon.base.errors import ConfigError
from ratoon.base.settings import parse_overrides
from ratoon.recipe import INSTEAD, SIZES, TOKENS_A_PARAMETER, Plan, default_shape, load, read_table, settle, shipped
from ratoon.recipe.tuning import load_tuning, settle_tuning


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(recipe: Any, overrides: dict[str, Any] | None = None) -> ConfigError:
    """The error that loading and settling gives."""
    with pytest.raises(ConfigError) as caught:
        settle(load(recipe, overrides))
    assert caught.value.exit_code == 2
    return caught.value


def derived(plan: Plan) -> dict[str, Any]:
    return {one.key: one.value for one in plan.derived}


BASE = "name: mine\ndata:\n  sources: [book.txt]\n"


PRETRAINING = sorted(name for name in shipped() if "task" not in read_table(name)[0])
TUNING = sorted(shipped().keys() - set(PRETRAINING))


# -- what ships ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRETRAINING)
def test_every_shipped_recipe_settles(name: str) -> None:
    plan = settle(load(name))
    assert plan.recipe.name == name
    assert (plan.train.steps is None) != (plan.train.budget_minutes is None)
    assert plan.recipe.data.split_documents is not None
    if plan.recipe.model.init is None:
        cfg = plan.model_config(plan.recipe.data.vocab_size, 0, 0, 0)
        longest = plan.recipe.model.settings.get("context_tokens", plan.train.context_tokens)
        assert cfg.context_tokens == longest >= plan.train.context_tokens and cfg.mlp_width == 4 * cfg.width
    for one in plan.derived:
        assert one.reason, f"{one.key} is derived without a reason"


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_resolved_recipe_is_the_same_recipe(name: str, tmp_path: Path) -> None:
    """What is written into the run's folder settles to the same, with nothing left to derive."""
    plan = settle(load(name))
    again = settle(load(write(tmp_path, yaml.safe_dump(plan.as_dict(), allow_unicode=True))))
    assert again.as_dict() == plan.as_dict()
    assert (again.train, again.shape) == (plan.train, plan.shape)
    assert again.derived == ()


def test_a_recipe_of_three_lines_is_enough(tmp_path: Path) -> None:
    plan = settle(load(write(tmp_path, BASE)))
    found = derived(plan)
    assert found["model.size"] == "medium" and found["data.split_documents"] == "file"
    assert found["train.rows"] == SIZES["medium"].rows == plan.train.rows
    assert found["train.context_tokens"] == SIZES["medium"].context_tokens
    assert {"train.steps", "train.seed", "model.settings.layers", "model.settings.width"} <= found.keys()


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "key", "line", "near"),
    [
        ("minuts: 3\n", "minuts", 4, "minutes"),
        ("train:\n  steps: 5\n  learning_rat: 1e-3\n", "train.learning_rat", 6, "learning_rate"),
        ("model:\n  siez: tiny\n", "model.siez", 5, "size"),
        ("model:\n  settings:\n    width: 64\n    layrs: 2\n", "model.settings.layrs", 7, "layers"),
        (
            "model:\n  settings:\n    moe: {experts: 4, experts_per_token: 1, expert_widht: 8}\n",
            "model.settings.moe.expert_widht",
            6,
            "expert_width",
        ),
    ],
)
def test_an_unknown_key_names_file_line_and_the_nearest(
    lines: str, key: str, line: int, near: str, tmp_path: Path
) -> None:
    path = write(tmp_path, BASE + lines)
    error = refused(path)
    assert f"unknown key '{key}'" in error.found
    assert error.where == f"{path}:{line}"
    assert error.expected == f"did you mean '{near}'?"


@pytest.mark.parametrize(
    ("lines", "key", "line"),
    [
        ("minutes: soon\n", "minutes", 4),
        ("seed: -1\n", "seed", 4),
        ("language: fr\n", "language", 4),
        ("samples: ROMEO\n", "samples", 4),
        ("train: 7\n", "train", 4),
        ("train:\n  steps: 5\n  rows: many\n", "train.rows", 6),
        ("train:\n  steps: 0\n", "train.steps", 5),
        ("train:\n  budget_minutes: soon\n", "train.budget_minutes", 5),
        ("train:\n  steps: 5\n  optimizer: sgd\n", "train.optimizer", 6),
        ("train:\n  rows: [1, 2]\n", "train.rows", 5),
        ("train:\n  context_tokens: wide\n", "train.context_tokens", 5),
        ("model:\n  settings:\n    width: wide\n", "model.settings.width", 6),
        ("model:\n  settings:\n    heads: true\n", "model.settings.heads", 6),
        ("model:\n  settings: tiny\n", "model.settings", 5),
        ("model:\n  size: huge\n", "model.size", 5),
    ],
)
def test_a_wrong_type_names_file_line_and_key(lines: str, key: str, line: int, tmp_path: Path) -> None:
    path = write(tmp_path, BASE + lines)
    error = refused(path)
    assert error.found.startswith(f"'{key}"), error.found
    assert error.where == f"{path}:{line}"


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"data": {}}, "give one of sources, corpus, prepared; found none"),
        ({"data": {"sources": ["a"], "corpus": "python-docs"}}, "found sources, corpus"),
        ({"train": {"steps": 5, "budget_minutes": 1}}, "are both given"),
        ({"train": {"steps": 5, "warmup_steps": 5}}, "leaves nothing of 5 steps"),
        ({"train": {"steps": 5, "rows": 4, "micro_batch_rows": 8}}, "micro_batch_rows 8 is more than the 4 rows"),
        ({"model": {"init": "a", "size": "tiny"}, "train": {"steps": 5}}, "size and settings make a new one"),
        ({"model": {"init": "a", "settings": {"layers": 2}}, "train": {"steps": 5}}, "size and settings make a new"),
        ({"model": {"init": "a"}}, "give 'steps' or 'budget_minutes'"),
        ({"model": {"settings": {"heads": 7}}}, "is not a multiple of 7 heads"),
        ({"model": {"settings": {"heads": 6, "kv_heads": 4}}}, "cannot share 4 key/value heads evenly"),
        ({"model": {"settings": {"windows": [4]}}}, "windows has 1 entries for 6 layers"),
    ],
)
def test_what_cannot_be_together_is_refused(table: dict[str, Any], words: str) -> None:
    error = refused({"name": "mine", "data": {"sources": ["book.txt"]}, **table})
    assert words in error.found


def test_corpora_are_names_of_the_catalogue() -> None:
    error = refused({"data": {"corpus": "review-zh"}})
    assert "did you mean 'reviews-zh'" in str(error) and "data.corpus" in str(error.where)
    error = refused({"data": {"corpus": "smollm2-135m-instruct"}})
    assert "is a model" in error.found and "python-docs" in str(error.expected)


def test_an_unknown_recipe_gets_the_nearest() -> None:
    assert refused("python-doc").expected == "did you mean 'python-docs'?"
    assert "one of: " + ", ".join(shipped()) in str(refused("qqqq"))


def test_a_missing_table_is_told(tmp_path: Path) -> None:
    assert "the key 'data' is missing" in refused(write(tmp_path, "name: mine\n")).found
    assert "the key 'data' is missing" in refused(write(tmp_path, "")).found


# -- overrides -----------------------------------------------------------------------------------------------------


def test_overrides_stand_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, BASE + "train:\n  rows: 8\n  steps: 3\n")
    given = parse_overrides(["train.rows=4", "model.settings.layers=2", "seed=9", "samples=[a, b]"])
    plan = settle(load(path, given))
    assert plan.train.rows == 4 and plan.train.steps == 3 and plan.train.seed == 9
    assert plan.shape["layers"] == 2 and plan.recipe.samples == ("a", "b")
    assert yaml.safe_load(path.read_text())["train"]["rows"] == 8


@pytest.mark.parametrize("override", ["train.rowz=4", "model.settings.layerz=2", "train.rows=many"])
def test_a_wrong_override_names_the_command_line(override: str, tmp_path: Path) -> None:
    error = refused(write(tmp_path, BASE + "train:\n  rows: 8\n"), parse_overrides([override]))
    assert error.where == "command line" and override.partition("=")[0] in error.found


def test_an_override_takes_the_place_of_what_it_excludes() -> None:
    plan = settle(load("continue-smollm2", {"data.sources": ["book.txt"]}))
    assert plan.recipe.data.sources == ("book.txt",) and plan.recipe.data.corpus is None
    (said,) = [one for one in plan.derived if one.key == "data.corpus"]
    assert said.value is None and "data.sources is given in its place" in said.reason
    plan = settle(load("shakespeare", {"train.budget_minutes": 2}))
    assert plan.train.steps is None and plan.train.budget_minutes == 2
    plan = settle(load("python-docs", {"minutes": 30}))
    assert plan.train.budget_minutes == 30 and derived(plan)["model.size"] == "medium"
    both = refused("shakespeare", {"train.budget_minutes": 2, "train.steps": 3})
    assert "are both given" in both.found, "two overrides that exclude each other are the user's to settle"
    assert all(key not in others for key, others in INSTEAD.items())


@pytest.mark.parametrize("name", TUNING)
def test_every_shipped_recipe_of_fine_tuning_settles(name: str) -> None:
    from ratoon.adapt.methods import method_of
    from ratoon.tasks.registry import task_of

    recipe = load_tuning(name)
    assert recipe.name == name
    task, method = task_of(recipe.task), method_of(recipe.method)
    settings, derived = settle_tuning(recipe).train_settings(rows_an_epoch=100, examples=400)
    assert settings.steps is not None and settings.steps > 0
    assert all(one.reason for one in derived)
    assert (task.kind, method.kind) == (recipe.task["kind"], recipe.method.get("kind", "full"))


@pytest.mark.parametrize(
    ("epochs", "examples", "rows", "steps"),
    [(3, 4_000, 32, 375), (1, 10_000, 32, 313), (3, 1_000, 15, 200), (6, 135, 8, 102), (1, 20, 8, 3)],
)
def test_few_examples_make_smaller_steps(epochs: float, examples: int, rows: int, steps: int) -> None:
    """32 examples a step, unless the run would then have fewer than 200 steps; but never fewer than 8."""
    plan = settle_tuning(load_tuning("banking77", {"epochs": epochs}))
    settings, derived = plan.train_settings(rows_an_epoch=examples, examples=examples)
    assert (settings.rows, settings.steps) == (rows, steps)
    assert any(one.key == "train.rows" and f"about {rows} examples a step" in one.reason for one in derived)


@pytest.mark.parametrize(
    ("kind", "width", "rate", "told"),
    [
        ("lora", 576, 1e-3, "method lora"),
        ("lora", 64, 1e-3, "method lora"),
        ("lora", 2048, 2.81e-4, "method lora: 0.001, less by 576 / 2048 for the model's width"),
        ("full", 2048, 5.625e-5, "method full: 0.0002, less by 576 / 2048 for the model's width"),
        ("prompt", 576, 3e-2, "method prompt"),
    ],
)
def test_the_learning_rate_is_the_methods_and_the_widths(kind: str, width: int, rate: float, told: str) -> None:
    recipe = {"name": "x", "task": {"kind": "classification"}, "data": {"train": ["a.csv"]}, "model": {"base": "b"},
              "method": {"kind": kind}}  # fmt: skip
    plan = settle_tuning(load_tuning(recipe))
    settings, derived = plan.train_settings(rows_an_epoch=100, examples=400, width=width)
    assert settings.learning_rate == pytest.approx(rate, rel=2e-3)
    assert [one.reason for one in derived if one.key == "train.learning_rate"] == [told]


def test_a_rate_that_was_chosen_for_another_method_is_not_kept() -> None:
    plan = settle_tuning(load_tuning("banking77", {"method.kind": "full"}))
    settings, _ = plan.train_settings(rows_an_epoch=100, examples=400)
    assert settings.learning_rate == 2e-4
    told = {one.key: one.reason for one in plan.derived}
    assert told["train.learning_rate"] == "it was set for lora, not for full"
    named = settle_tuning(load_tuning("banking77", {"method.kind": "full", "train.learning_rate": 7e-4}))
    assert named.train_settings(rows_an_epoch=100, examples=400)[0].learning_rate == 7e-4
    assert "train.learning_rate" not in {one.key for one in named.derived}
    same = settle_tuning(load_tuning("banking77", {"method.kind": "lora"}))
    assert same.train_settings(rows_an_epoch=100, examples=400)[0].learning_rate == 1e-3


@pytest.mark.parametrize("name", [*PRETRAINING, *TUNING])
def test_every_reason_has_its_chinese(name: str) -> None:
    from ratoon.report.phrases import sentence

    derived = settle(load(name)).derived if name in PRETRAINING else ()
    if name in TUNING:
        for change in ({}, {"method.kind": "ia3"}):
            new = "encdec" in name and change
            plan = settle_tuning(load_tuning(name, {} if new else change))
            derived = (*derived, *plan.derived)
            for width in (576, 960):
                derived = (*derived, *plan.train_settings(rows_an_epoch=1000, examples=4000, width=width)[1])
    assert derived
    for one in derived:
        assert sentence(one.reason, "zh") != one.reason, one


def test_new_weights_have_larger_steps() -> None:
    settings, _ = settle_tuning(load_tuning("translate-en-zh-encdec")).train_settings(
        rows_an_epoch=1_000, examples=28_000
    )
    assert (settings.rows, settings.steps) == (5, 2_400)  # 128 pairs, 28 a row; 12 epochs


@pytest.mark.parametrize(
    ("verb_of", "name", "words"),
    [(load, TUNING[0], "ratoon finetune"), (load_tuning, PRETRAINING[0], "ratoon pretrain")],
)
def test_each_verb_refuses_the_other_kind(verb_of: Any, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        verb_of(name)


def test_another_kind_of_method_leaves_the_settings_of_the_first() -> None:
    recipe = load_tuning("banking77", {"method.kind": "full", "method.freeze_layers": 3})
    assert recipe.method == {"kind": "full", "freeze_layers": 3}
    assert [(one.key, one.value) for one in settle_tuning(recipe).derived] == [
        ("method.rank", None),
        ("train.learning_rate", None),
    ]
    assert load_tuning("banking77", {"method.kind": "lora"}).method["rank"] == 8


def test_the_next_command_of_a_run_settles(tmp_path: Path) -> None:
    """`train.budget_minutes=30` over a resolved recipe, whichever dial it came from."""
    for name in PRETRAINING:
        path = write(tmp_path, yaml.safe_dump(settle(load(name)).as_dict(), allow_unicode=True))
        plan = settle(load(path, {"name": f"{name}-longer", "train.budget_minutes": 30}))
        assert plan.train.budget_minutes == 30 and plan.train.steps is None


# -- what is derived -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("minutes", "size"), [(1, "tiny"), (2.9, "tiny"), (3, "small"), (19, "small"), (20, "medium")])
def test_minutes_decide_the_size_and_it_is_said(minutes: float, size: str) -> None:
    plan = settle(load({"data": {"sources": ["a"]}, "minutes": minutes}))
    (said,) = [one for one in plan.derived if one.key == "model.size"]
    assert said.value == size and f"{minutes:g} minutes" in said.reason
    assert plan.train.budget_minutes == minutes
    assert {key: plan.shape[key] for key in ("layers", "width", "heads")} == {
        key: getattr(SIZES[size], key) for key in ("layers", "width", "heads")
    }


def test_steps_follow_from_the_parameters() -> None:
    from ratoon.model.transformer import Transformer

    plan = settle(load({"data": {"sources": ["a"], "vocab_size": 1000}, "model": {"size": "tiny"}}))
    model = Transformer(plan.model_config(1000, 0, 0, 0))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = plan.train.steps * plan.train.rows * plan.train.context_tokens
    assert tokens == pytest.approx(TOKENS_A_PARAMETER * parameters, rel=0.02)


def test_what_is_given_is_not_derived() -> None:
    table = {
        "data": {"corpus": "reviews-zh", "split_documents": "blank-lines"},
        "model": {"size": "tiny", "settings": {"layers": 3}},
        "train": {"steps": 7, "rows": 5, "context_tokens": 33, "seed": 4},
    }
    plan = settle(load(table))
    assert not derived(plan).keys() & {"train.steps", "train.rows", "train.seed", "model.size", "model.settings.layers"}
    assert (plan.train.rows, plan.train.context_tokens, plan.train.seed, plan.shape["layers"]) == (5, 33, 4, 3)
    assert plan.recipe.data.split_documents == "blank-lines"


def test_the_catalogue_says_what_a_document_is() -> None:
    plan = settle(load({"data": {"corpus": "reviews-zh"}}))
    assert plan.recipe.data.split_documents == "lines"
    (said,) = [one for one in plan.derived if one.key == "data.split_documents"]
    assert "reviews-zh" in said.reason
    assert settle(load({"data": {"corpus": "shakespeare"}})).recipe.data.split_documents == "file"


def test_settling_changes_nothing_that_was_given() -> None:
    table = {"data": {"sources": ["a"]}, "train": {"rows": 4}, "model": {"settings": {"layers": 2}}}
    recipe = load(table)
    settle(recipe)
    settle(recipe)
    assert table == {"data": {"sources": ["a"]}, "train": {"rows": 4}, "model": {"settings": {"layers": 2}}}
    assert dict(recipe.train) == {"rows": 4} and dict(recipe.model.settings) == {"layers": 2}


def test_every_size_is_a_model() -> None:
    for name, size in SIZES.items():
        shape = default_shape(size, size.context_tokens)
        assert shape["width"] % shape["heads"] == 0
        plan = settle(load({"data": {"sources": ["a"]}, "model": {"size": name}}))
        assert plan.model_config(4096, 0, 0, 0).family == "nanochat"
