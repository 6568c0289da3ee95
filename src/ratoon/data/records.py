"""Files -> rows -> records in their parts: training, validation, test.

Decides how the parts are made where only one is given, which rows are left out before training (duplicates, copies of
test rows, what a limit leaves), and books all of it. What a record is, is the task's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from ratoon.base.errors import ConfigError, DataError
from ratoon.base.seeds import stream
from ratoon.base.settings import Settings
from ratoon.data.examples import joined
from ratoon.data.layouts import announced
from ratoon.data.leaks import Keyed, Leaks, find_leaks
from ratoon.data.ledger import Ledger
from ratoon.data.rows import Kind, RowReading, read_rows
from ratoon.data.sources import find_files
from ratoon.data.task_ledger import TaskLedger
from ratoon.tasks.contract import Record, Task, TooLong
from ratoon.tasks.example import Example
from ratoon.text.tokenizer import Tokenizer

PARTS = ("train", "validation", "test")


class RecordSettings(Settings):
    """Where the rows of a task come from, and what may be left out of them."""

    folder: str = Field(".", description="where files without a full path are looked for")
    train: tuple[str, ...] = Field(min_length=1, description="files to learn from")
    validation: tuple[str, ...] = Field((), description="files to choose by; absent: a share of the training rows")
    test: tuple[str, ...] = Field((), description="files to be measured on at the end; absent: a share, or none")
    validation_fraction: float = Field(0.1, gt=0, lt=0.9, description="share of the rows; read without `validation`")
    test_fraction: float = Field(0.0, ge=0, lt=0.9, description="share of the rows; read without `test`")
    group: str | None = Field(
        None, description="rows that agree in this field stay in one part; absent: each row for itself"
    )
    kind: Kind | None = Field(None, description="what kind of files they are; absent: recognised, and said")
    columns: tuple[str, ...] = Field((), description="names of the columns of files without a head")
    separator: str | None = Field(None, description="what stands between the columns of plain lines")
    part: str | None = Field(None, description="the key of a JSON file that holds the rows")
    where: dict[str, str] = Field({}, description="only rows whose fields have these values, others counted")
    encoding: str = Field("utf-8", description="encoding of the files")
    on_bad_row: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: rows that cannot be read or do not fit the task are left out, counted"
    )
    shots: int | None = Field(None, ge=1, description="so many training rows of each label, the others left out")
    seed: int | None = Field(
        None,
        ge=0,
        description="draws parts, shots and limits; absent: the recipe's seed (runs of several seeds that are "
        "compared need one here)",
    )
    limit_rows: int | None = Field(None, ge=1, description="so many training rows, drawn from the seed")
    limit_test_rows: int | None = Field(None, ge=1, description="so many test rows, drawn from the seed")
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="training rows that are equal in text and answer are left out, counted"
    )
    leaks: Literal["drop", "report", "refuse"] = Field(
        "report",
        description="training rows that also stand in validation or test: left out, told with both scores, or refused",
    )
    near: float = Field(0.8, gt=0, le=1, description="likeness (Jaccard of character runs) that counts as a copy")
    too_long: TooLong = Field("refuse", description="what happens to a record that is longer than a row")
    most_lost_fraction: float = Field(
        0.05, ge=0, le=1, description="a run that loses more of its tokens to cutting and dropping does not start"
    )

    @model_validator(mode="after")
    def _fits(self) -> RecordSettings:
        if self.test and self.test_fraction:
            raise ValueError("'test' and 'test_fraction' are both given")
        return self

    @property
    def reading(self) -> RowReading:
        """How the files are read."""
        return RowReading(self.kind, self.columns, self.separator, self.part, self.encoding, self.on_bad_row)


@dataclass
class Parts:
    """The records of a task: `train`, `validation`, `test` (perhaps empty), a ledger of each part, and copies that
    stand in two parts."""

    train: list[Any]
    validation: list[Any]
    test: list[Any]
    ledgers: dict[str, TaskLedger]
    leaks: Leaks
    sentences: list[str] = field(default_factory=list)

    def of(self, name: str) -> list[Any]:
        """The records of one part."""
        found: list[Any] = getattr(self, name)
        return found

    @property
    def seen_test_places(self) -> set[str]:
        """Places of test records that also stand in training, exactly or nearly."""
        test, train = (self.leaks.splits.get(name, ()) for name in ("test", "train"))
        if not test or not train:
            return set()
        learned = {record.place for record in self.train}  # without those that were left out as copies
        found = [copy for copy in self.leaks.copies("test", "train") if train[copy.other].place in learned]
        return {test[copy.row].place for copy in found}


def read_records(
    task: Task[Any], files: Sequence[str], settings: RecordSettings, ledger: TaskLedger, *, unanswered: bool = False
) -> list[Any]:
    """The records of some files, each with its row's fields; `unanswered`: of rows whose answers are not told.

    Raises `DataError` with file and line; under `on_bad_row: skip` such rows are booked instead.
    """
    record_of = task.unanswered if unanswered else task.record
    records: list[Any] = []
    listing = Ledger()
    paths = [Path(settings.folder) / file for file in files]
    found = find_files(paths, listing, any_kind=True) if paths else []
    for row in announced(read_rows(found, settings.reading, ledger), ledger):
        told = {key: str(row.fields.get(key)) for key in settings.where}
        if told != settings.where:
            ledger.drop_unread("not wanted (data.where)", row.place, asked=True)
            continue
        try:
            record = record_of(row.fields, row.place)
        except DataError as error:
            if settings.on_bad_row == "refuse":
                raise
            ledger.drop_unread(error.found, row.place)
            continue
        if record is None:
            ledger.drop_unread("without an answer", row.place)
        else:
            records.append((record, row.fields))
    for note in listing.notes:
        ledger.note(note)
    return records


def read_parts(task: Task[Any], settings: RecordSettings, *, seed: int) -> Parts:
    """The records of all parts, split, limited, freed of duplicates and looked through for copies, everything booked.

    Raises `DataError` when nothing is left to learn from, or, under `leaks: refuse`, for a copy. Ids that stand twice
    are told, not refused: data sets have them.
    """
    seed = seed if settings.seed is None else settings.seed
    ledgers = {name: TaskLedger() for name in PARTS}
    ledger = ledgers["train"]
    found = {name: read_records(task, getattr(settings, name), settings, ledgers[name]) for name in PARTS}
    if not found["train"]:
        raise DataError(
            "no training row is left" + _first_reason(ledger),
            where=", ".join(settings.train),
            expected="rows of the task",
            fix="look at the reasons above, at task.fields and data.where",
        )
    sentences = []
    for name, share in (("test", settings.test_fraction), ("validation", settings.validation_fraction)):
        if not found[name] and share:
            found["train"], found[name] = _split(found["train"], share, settings.group, seed, name)
            sentences.append(f"{name}: {len(found[name]):,} of the training rows, drawn from the seed")
    records = {name: [record for record, _ in pairs] for name, pairs in found.items()}
    if settings.limit_test_rows is not None:
        records["test"], left = _draw(records["test"], settings.limit_test_rows, seed, "test")
        _book(ledgers["test"], left, "beyond data.limit_test_rows")
    if settings.duplicates == "drop":
        records["train"] = _distinct(task, records["train"], ledger)
    records["train"] = _limited(task, records["train"], settings, seed, ledger)
    keyed = {name: [_keyed(task, one) for one in records[name]] for name in PARTS if records[name]}
    leaks = find_leaks(keyed, near=settings.near)
    records["train"] = _without_copies(records["train"], leaks, settings, ledger)
    sentences += leaks.sentences()
    return Parts(records["train"], records["validation"], records["test"], ledgers, leaks, sentences)


def read_beside(
    task: Task[Any],
    files: Sequence[str],
    training: Sequence[Any],
    settings: RecordSettings,
    *,
    seed: int,
    unanswered: bool = False,
) -> Parts:
    """The records of `files` as the test part beside the `training` records of a run, looked through for copies of
    these; `unanswered`: of rows whose answers are not told, which are not compared. Raises as `read_records`."""
    seed = seed if settings.seed is None else settings.seed
    ledgers = {name: TaskLedger() for name in PARTS}
    found = read_records(task, files, settings, ledgers["test"], unanswered=unanswered)
    records = [record for record, _ in found]
    if settings.limit_test_rows is not None:
        records, left = _draw(records, settings.limit_test_rows, seed, "test")
        _book(ledgers["test"], left, "beyond data.limit_test_rows")
    compared = {} if unanswered else {"train": training, "test": records}
    leaks = find_leaks({name: [_keyed(task, one) for one in part] for name, part in compared.items() if part},
                       near=settings.near)  # fmt: skip
    return Parts(list(training), [], records, ledgers, leaks, leaks.sentences())


def _first_reason(ledger: TaskLedger) -> str:
    first = next(iter(ledger.reasons.items()), None)
    return "" if first is None else f": {first[0]} ({first[1].rows:,} rows, first {first[1].places[0]})"


def _keyed(task: Task[Any], record: Any) -> Keyed:
    return Keyed(id=record.id, text=task.text(record), place=record.place, label=str(task.expected(record)))


def _book(ledger: TaskLedger, records: Iterable[Record], reason: str) -> None:
    for record in records:
        ledger.drop_unread(reason, record.place, asked=True)


def _split(pairs: list[Any], share: float, group: str | None, seed: int, name: str) -> tuple[list[Any], list[Any]]:
    """Rows apart by groups, about `share` of them in the second part."""
    keys = [str(fields.get(group)) if group is not None else str(number) for number, (_, fields) in enumerate(pairs)]
    if group is not None and all(key == "None" for key in keys):
        raise ConfigError(f"no row has the field '{group}'", where="data.group", expected="a field of the rows")
    names = list(dict.fromkeys(keys))
    order = stream(seed, "split", name).permutation(len(names))
    taken = {names[int(number)] for number in order[: max(1, round(share * len(names)))]}
    return (
        [pair for pair, key in zip(pairs, keys, strict=True) if key not in taken],
        [pair for pair, key in zip(pairs, keys, strict=True) if key in taken],
    )


def _draw(records: list[Any], count: int, seed: int, name: str) -> tuple[list[Any], list[Any]]:
    """`count` records drawn from the seed, in the files' order, and those left."""
    if count >= len(records):
        return records, []
    chosen = set(stream(seed, "draw", name).permutation(len(records))[:count].tolist())
    return (
        [record for number, record in enumerate(records) if number in chosen],
        [record for number, record in enumerate(records) if number not in chosen],
    )


def _distinct(task: Task[Any], records: list[Any], ledger: TaskLedger) -> list[Any]:
    """The records without those equal to an earlier one in text and answer."""
    kept: list[Any] = []
    seen: set[tuple[str, str]] = set()
    for record in records:
        key = (task.text(record), str(task.expected(record)))
        if key in seen:
            ledger.drop_unread("equal to an earlier row", record.place, duplicate=True)
        else:
            kept.append(record)
            seen.add(key)
    return kept


def _limited(task: Task[Any], records: list[Any], settings: RecordSettings, seed: int, ledger: TaskLedger) -> list[Any]:
    if settings.shots is not None:
        by_label: dict[str, list[Any]] = defaultdict(list)
        for record in records:
            by_label[str(task.expected(record))].append(record)
        kept: list[Any] = []
        for label, members in by_label.items():
            if len(members) < settings.shots:
                raise DataError(
                    f"the label '{label}' has {len(members)} rows",
                    where="data.shots",
                    expected=f"at least {settings.shots}",
                )
            chosen, left = _draw(members, settings.shots, seed, f"shots {label}")
            kept += chosen
            _book(ledger, left, "beyond data.shots")
        places = {id(record) for record in kept}
        records = [record for record in records if id(record) in places]
    if settings.limit_rows is not None:
        records, left = _draw(records, settings.limit_rows, seed, "train")
        _book(ledger, left, "beyond data.limit_rows")
    return records


def _without_copies(records: list[Any], leaks: Leaks, settings: RecordSettings, ledger: TaskLedger) -> list[Any]:
    leaked = {drop.place: drop for drop in leaks.drop("train")} if settings.leaks != "report" else {}
    if settings.leaks == "refuse" and leaked:
        first = next(iter(leaked.values()))
        raise DataError(
            f"{len(leaked):,} training rows also stand in validation or test",
            where=f"{first.place} is an {first.reason}: {first.copy_of}",
            fix="data.leaks: drop leaves such training rows out, report measures with and without them",
        )
    kept = [record for record in records if record.place not in leaked]
    for record in records:
        if record.place in leaked:
            ledger.drop_unread(leaked[record.place].reason, record.place, asked=True)
    if not kept:
        raise DataError("no training row is left: all are copies", where="data.train", fix="give other rows")
    return kept


def encode_records(
    task: Task[Any],
    records: Sequence[Any],
    tokenizer: Tokenizer,
    ledger: TaskLedger,
    *,
    room_tokens: int,
    too_long: TooLong,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
    unfit: list[Any] | None = None,
) -> list[Example]:
    """The records as examples, every row and token booked.

    Raises `DataError` as the task does, with file and line; under `on_bad_row: skip` such rows are booked instead, and
    put into `unfit`.
    """
    examples: list[Example] = []
    behind: list[bool] = []
    before: Any = None
    for record in records:
        try:
            found = task.encode(record, tokenizer, room_tokens=room_tokens, too_long=too_long)
        except DataError as error:
            if on_bad_row == "refuse":
                raise
            ledger.drop_unread(error.found, record.place)
            if unfit is not None:
                unfit.append(record)
            continue
        ledger.receive(record, found.rendered_tokens)
        if not found.examples:
            ledger.book(record.place, dropped=found.rendered_tokens, reason=found.reason or "nothing to learn")
            continue
        learned = sum(_learned(example) for example in found.examples)
        kept = found.rendered_tokens - found.cut_tokens
        learned = min(learned, kept)
        ledger.book(
            record.place,
            learned=learned,
            masked=kept - learned,
            cut=found.cut_tokens,
            pieces=len(found.examples),
            repeated=found.repeated_tokens,
            reason=found.reason or (None if learned else "nothing to learn"),
        )
        behind += [before is not None and len(found.examples) == 1 and task.together(before, record)]
        behind += [False] * (len(found.examples) - 1)
        examples += found.examples
        before = record if len(found.examples) == 1 else None
    ledger.check()
    return joined(examples, behind, room_tokens)[0] if any(behind) else examples


def measurable(
    task: Task[Any],
    records: Sequence[Any],
    tokenizer: Tokenizer,
    ledger: TaskLedger,
    *,
    room_tokens: int,
    too_long: TooLong,
    on_bad_row: Literal["refuse", "skip"] = "refuse",
) -> list[Any]:
    """The records that can be put to a model of `room_tokens` places, in order: found out before it is trained.

    Raises `DataError` as the task does, with file and line; under `on_bad_row: skip` such rows are booked instead.
    """
    head = task.head()
    decoded = head is None and task.measure not in ("perplexity", "preference")
    policy: TooLong = "split" if head is not None and head.kind in ("token", "span") else too_long
    kept = []
    for record in records:
        try:
            if decoded:
                task.question(record, tokenizer, room_tokens=room_tokens)
            else:
                task.encode(record, tokenizer, room_tokens=room_tokens, too_long=policy)
        except DataError as error:
            if on_bad_row == "refuse":
                raise
            ledger.drop_unread(error.found, record.place)
        else:
            kept.append(record)
    return kept


def _learned(example: Example) -> int:
    own = sum(weight > 0 for weight in example.weight)
    return own if example.beside is None else own + _learned(example.beside)


def booked(ledger: TaskLedger) -> list[str]:
    """What became of the rows and tokens of a part, for people: one sentence, and one for each reason."""
    rows = ", ".join(f"{count:,} {fate}" for fate, count in ledger.rows.items() if count)
    tokens = ", ".join(f"{count:,} {fate}" for fate, count in ledger.tokens.items() if count)
    said = [f"{ledger.rows_read:,} rows = {rows}; {ledger.tokens_read:,} tokens = {tokens}"]
    for name, reason in ledger.reasons.items():
        said.append(f"{reason.rows:,} rows, {name} (first: {reason.places[0]})")
    return said
