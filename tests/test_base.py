"""Errors, settings and named streams."""

from __future__ import annotations

import copy
import errno
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from ratoon.base.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    GateError,
    NumericError,
    RatoonError,
    StorageError,
    storage_errors,
)
from ratoon.base.seeds import derive, stream
from ratoon.base.settings import Settings, build, merge, parse_overrides, read_yaml

# -- errors ------------------------------------------------------------------------------------------------------------


def test_an_error_reads_as_found_where_expected_to_do() -> None:
    error = DataError("the row is torn", where=Path("a.jsonl:3"), expected="one object a line", fix="mend the line")
    assert str(error).splitlines() == [
        "the row is torn",
        "  where:    a.jsonl:3",
        "  expected: one object a line",
        "  to do:    mend the line",
    ]
    assert error.as_dict() == {
        "error": "DataError",
        "found": "the row is torn",
        "where": "a.jsonl:3",
        "expected": "one object a line",
        "fix": "mend the line",
    }


def test_what_is_not_known_is_not_printed() -> None:
    assert str(ConfigError("no")) == "no"
    assert str(ConfigError("no", fix="yes")).splitlines() == ["no", "  to do:    yes"]


def test_exit_codes_say_whose_fault_it_is() -> None:
    codes = {kind: kind.exit_code for kind in (ConfigError, DataError, ArtifactError, NumericError, StorageError)}
    assert codes == {ConfigError: 2, DataError: 2, ArtifactError: 2, NumericError: 1, StorageError: 1}
    assert GateError.exit_code == 3
    assert all(issubclass(kind, RatoonError) for kind in codes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_storage_error_with_the_cause(number: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors("out/file"):
        raise OSError(number, "told by the system")
    assert caught.value.found == "the disk is full" and caught.value.where == "out/file"
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("words", ["I/O error: No space left on device (os error 28)", "broken (os error 28)"])
def test_a_full_disk_in_the_words_of_a_library(words: str) -> None:
    with pytest.raises(StorageError, match="the disk is full"), storage_errors("file"):
        raise RuntimeError(words)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_a_refusing_disk_says_what_the_system_said(number: int) -> None:
    with pytest.raises(StorageError, match="could not be written: said so"), storage_errors("file"):
        raise OSError(number, "said so")


def test_other_errors_pass_through_untouched() -> None:
    with pytest.raises(ZeroDivisionError), storage_errors("file"):
        raise ZeroDivisionError
    with pytest.raises(FileNotFoundError), storage_errors("file"):
        raise FileNotFoundError(errno.ENOENT, "gone")
    with pytest.raises(ConfigError), storage_errors("file"):
        raise ConfigError("mine")


# -- settings ----------------------------------------------------------------------------------------------------------


class Inner(Settings):
    learning_rate: float = 0.1
    steps: int | None = Field(None, ge=1)
    precision: Literal["auto", "off"] = "auto"
    compiled: bool = False


class Outer(Settings):
    name: str
    train: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    maybe: Inner | None = None

    @model_validator(mode="after")
    def _fits(self) -> Outer:
        if self.name == "forbidden":
            raise ValueError("'forbidden' and everything else exclude each other")
        return self


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load(path: Path) -> Outer:
    return build(Outer, read_yaml(path), where=path)


def refused(folder: Path, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(written(folder, text))
    return caught.value


def test_an_unknown_key_is_refused_with_the_nearest_name_and_the_line(tmp_path: Path) -> None:
    error = refused(tmp_path, "name: a\ntrain:\n  steps: 3\n  learnin_rate: 0.1\n")
    assert "unknown key 'train.learnin_rate'" in error.found
    assert str(error.where).endswith("recipe.yaml:4")
    assert error.expected == "did you mean 'learning_rate'?"


def test_a_key_like_no_other_is_answered_with_all_that_are_known(tmp_path: Path) -> None:
    error = refused(tmp_path, "name: a\ntrain: {zzz: 1}\n")
    assert error.expected == "one of: compiled, learning_rate, precision, steps"


@pytest.mark.parametrize("table", ["parts:\n  - {}\n  - stepz: 1\n", "maybe:\n  x: 1\n  stepz: 1\n"])
def test_unknown_keys_in_lists_and_optional_tables(tmp_path: Path, table: str) -> None:
    error = refused(tmp_path, "name: a\n" + table.replace("  x: 1\n", ""))
    assert "stepz'" in error.found and error.expected == "did you mean 'steps'?"
    assert ":" in str(error.where) and str(error.where).rsplit(":", 1)[1] in {"3", "4"}


def test_a_wrong_type_names_key_line_and_what_was_found(tmp_path: Path) -> None:
    error = refused(tmp_path, "name: a\n\ntrain:\n  steps: many\n")
    assert "'train.steps'" in error.found and "'many'" in error.found and "integer" in error.found
    assert str(error.where).endswith(":4")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "true", "[1]"])
def test_impossible_values_are_refused(tmp_path: Path, value: str) -> None:
    assert "'train.steps'" in refused(tmp_path, f"name: a\ntrain:\n  steps: {value}\n").found


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "true", "off"])
def test_numbers_are_finite_and_true_is_none(tmp_path: Path, value: str) -> None:
    assert "'train.learning_rate'" in refused(tmp_path, f"name: a\ntrain:\n  learning_rate: {value}\n").found


def test_an_impossible_combination_is_told(tmp_path: Path) -> None:
    assert "exclude each other" in refused(tmp_path, "name: forbidden\n").found


def test_a_missing_key_is_told(tmp_path: Path) -> None:
    assert "'name' is missing" in refused(tmp_path, "train: {steps: 2}\n").found


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path, "name: a\ntrain:\n  steps: 1\n  steps: 2\n")
    assert "'steps' stands twice" in error.found and str(error.where).endswith(":4")


def test_merged_keys_may_be_overridden_as_yaml_says(tmp_path: Path) -> None:
    found = load(written(tmp_path, "name: a\nmaybe: &base {steps: 1, compiled: true}\ntrain: {<<: *base, steps: 2}\n"))
    assert found.train.steps == 2 and found.train.compiled


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.e-3", "0.1e-2", ".1e-2", "+1e-3", "0.001"])
def test_small_numbers_are_numbers(tmp_path: Path, number: str) -> None:
    assert load(written(tmp_path, f"name: a\ntrain: {{learning_rate: {number}}}\n")).train.learning_rate == 0.001


@pytest.mark.parametrize("word", ["off", "no", "yes", "2024-05-01", "1:30", "010", "1e", "norway"])
def test_words_stay_words(tmp_path: Path, word: str) -> None:
    assert load(written(tmp_path, f"name: {word}\n")).name == word


def test_off_is_a_choice_like_another(tmp_path: Path) -> None:
    assert load(written(tmp_path, "name: a\ntrain: {precision: off, compiled: true}\n")).train.precision == "off"


BLANK = " \n"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_yaml_writes_is_read_as_itself(value: float) -> None:
    text = yaml.safe_dump({"a": value})
    assert parse_overrides([f"a={text.partition(':')[2].strip(BLANK)}"])["a"] == value


@given(st.text(alphabet=st.characters(categories=["L", "N", "P", "Zs"]), max_size=12))
def test_every_word_that_yaml_writes_is_read_as_itself(value: str) -> None:
    text = yaml.safe_dump({"a": value}, allow_unicode=True, width=1000)
    assert parse_overrides([f"a={text.partition(':')[2].strip(BLANK)}"])["a"] == value


@pytest.mark.parametrize(
    ("text", "words"),
    [("a: [1\n", "not readable as YAML"), ("- 1\n", "holds a list"), ("? [a]\n: 1\n", "a key must be a word")],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_yaml(written(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    (tmp_path / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="not UTF-8 at byte 9"):
        read_yaml(tmp_path / "latin.yaml")
    assert read_yaml(written(tmp_path, "")) == {}


def test_overrides_are_put_in_by_their_dots(tmp_path: Path) -> None:
    table = read_yaml(written(tmp_path, "name: a\ntrain:\n  steps: 3\n"))
    before = copy.deepcopy(dict(table))
    merged = merge(table, parse_overrides(["train.steps=200", "train.learning_rate=1e-3", "maybe.compiled=true"]))
    found = build(Outer, merged)
    assert found.train == Inner(steps=200, learning_rate=0.001)
    assert found.maybe == Inner(compiled=True)
    assert table == before


def test_the_place_of_a_wrong_override_is_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "name: a\ntrain:\n  steps: 3\n")
    for override in ("train.steps=many", "train.stepz=3", "maybe.stepz=3"):
        with pytest.raises(ConfigError) as caught:
            build(Outer, merge(read_yaml(path), parse_overrides([override])), where=path)
        assert caught.value.where == "command line"


@pytest.mark.parametrize("text", ["steps", "=3", "a=[1"])
def test_overrides_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_overrides([text])
    assert caught.value.where == "command line"


def test_an_override_below_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="'name' is a value"):
        merge({"name": "a"}, {"name.inner": 3})


def test_settings_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Inner().steps = 3  # type: ignore[misc]


# -- named streams -----------------------------------------------------------------------------------------------------

names = st.lists(st.one_of(st.text(max_size=5), st.integers()), max_size=3)


def draws(generator: np.random.Generator, count: int = 8) -> list[Any]:
    return generator.integers(0, 1 << 62, count).tolist()


def test_a_stream_depends_on_seed_and_names_alone() -> None:
    alone = draws(stream(1, "rows", 3))
    other = stream(1, "init")
    interleaved = stream(1, "rows", 3)
    mixed = []
    for _ in range(8):
        draws(other, 5)
        mixed += draws(interleaved, 1)
    assert mixed == alone
    draws(stream(1, "a new use of chance"), 1000)
    assert draws(stream(1, "rows", 3)) == alone


@settings(max_examples=200)
@given(st.integers(0, 1 << 40), names, st.integers(0, 1 << 40), names)
def test_other_seeds_and_names_other_streams(one: int, first: list[Any], two: int, second: list[Any]) -> None:
    same = one == two and first == second
    assert (derive(one, *first) == derive(two, *second)) == same
    assert (draws(stream(one, *first), 2) == draws(stream(two, *second), 2)) == same


def test_names_do_not_run_together() -> None:
    all_names = [("ab", "c"), ("a", "bc"), ("abc",), ("a", "b", "c"), ("1",), (1,), ("a", 1), ("a1",), ("a", "", "b")]
    assert len({derive(7, *one) for one in all_names}) == len(all_names)


def test_streams_are_independent() -> None:
    columns = np.stack([stream(3, "use", number).standard_normal(4000) for number in range(12)])
    correlation = np.corrcoef(columns) - np.eye(12)
    assert float(np.abs(correlation).max()) < 5 / math.sqrt(4000)


def test_a_derived_seed_fits_every_generator() -> None:
    assert all(0 <= derive(1, "x", number) < 1 << 63 for number in range(1000))
