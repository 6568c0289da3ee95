"""`ratoon prepare`: files of text -> a folder with tokenizer, shards and a ledger, which any later run takes.

`ratoon pretrain` prepares through `prepare_as_told` too; how it is done is `data/prepare.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.data.prepare import Prepared
    from ratoon.data.sources import Reading
    from ratoon.recipe import DataSettings
    from ratoon.text.tokenizer import Tokenizer


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE…")
@click.option("--out", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The folder to write.")
@click.option("--tokenizer", metavar="MODEL", help="The tokenizer of that folder or model; absent: one is trained.")
@click.option("--vocab-size", type=int, help="Tokens of the tokenizer that is trained; 4096 if not given.")
@click.option("--split-han", is_flag=True, default=None, help="Every Chinese character is a token of its own.")
@click.option("--held-out-fraction", type=float, help="Share of the documents never trained on; 0.05 if not given.")
@click.option(
    "--split-documents",
    metavar="HOW",
    help="What a document is in plain text: file, lines, blank-lines, or a separator of your own.",
)
@click.option("--field", help="The field of rows that holds the text; recognised, and said, if not given.")
@click.option("--encoding", help="Encoding of the sources; utf-8 if not given.")
@click.option("--on-bad-row", type=click.Choice(["refuse", "skip"]), help="skip: leave such rows out, counted.")
@click.option("--min-characters", type=int, help="Leave shorter texts out, counted.")
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="Decides what is held out.")
@click.option("--replace", is_flag=True, help="Put the new folder in the place of one that exists.")
@click.option("--json", "as_json", is_flag=True, help="Print the folder, its figures and the ledger as JSON.")
def command(
    sources: tuple[str, ...],
    out: Path,
    tokenizer: str | None,
    seed: int,
    replace: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Prepare SOURCE…: files and folders (txt, md, jsonl, csv, parquet; also .gz, .zst), or a name of the catalogue.

    Exact duplicates and empty texts are left out, a part of the documents is held out, and the ledger says where
    everything that was read went. The answer is the folder: `data.prepared` of a recipe takes it.
    """
    from ratoon.base.settings import build
    from ratoon.cli.output import answer, answer_json, expect_new
    from ratoon.cli.output import talk as say
    from ratoon.cli.tokenizer import tokenizer_of
    from ratoon.recipe import DataSettings, with_documents

    expect_new(out, replace=replace)
    table = {key: value for key, value in given.items() if value is not None}
    data = build(DataSettings, {**table, **named(sources)}, where="command line")
    data, derived = with_documents(data, "command line")
    for one in derived:
        say(f"derived {one.key} = {one.value} ({one.reason})")
    prepared = prepare_as_told(
        data,
        out,
        tokenizer=None if tokenizer is None else tokenizer_of(tokenizer),
        seed=seed,
        talk=say,
        replace=replace,
    )
    say(f"next: ratoon pretrain RECIPE data.prepared={out}")
    if as_json:
        answer_json(facts(prepared))
    else:
        answer(str(prepared.folder))


def named(sources: tuple[str, ...]) -> dict[str, Any]:
    """The sources as settings: one name of the catalogue that is no file here is a corpus.

    Raises `ConfigError` with the nearest name for one that is neither.
    """
    from ratoon.base.catalog import ENTRIES, entry

    one = sources[0]
    if len(sources) == 1 and not Path(one).exists() and (one in ENTRIES or not _looks_like_a_path(one)):
        return {"corpus": entry(one, where=f"'{one}', which is no file or folder here").name}
    return {"sources": list(sources)}


def _looks_like_a_path(text: str) -> bool:
    return bool(Path(text).suffix) or len(Path(text).parts) > 1


def prepare_as_told(
    data: DataSettings,
    out: Path,
    *,
    tokenizer: Tokenizer | None,
    seed: int,
    talk: Callable[[str], None],
    replace: bool = False,
) -> Prepared:
    """Prepare the sources or the corpus of `data` into `out` and say what became of everything that was read.

    Raises as `data.prepare.prepare` and `store.fetch.obtain` do.
    """
    from ratoon.data.prepare import prepare

    began = time.perf_counter()
    prepared = prepare(
        paths_of(data, talk),
        out,
        tokenizer=tokenizer,
        vocab_size=data.vocab_size,
        split_han=data.split_han,
        held_out_fraction=data.held_out_fraction,
        reading=reading_of(data),
        min_characters=data.min_characters,
        seed=seed,
        replace=replace,
    )
    talk(f"data: read in {time.perf_counter() - began:.1f} s, {prepared.tokenizer.vocab_size:,} tokens of vocabulary")
    if tokenizer is None:
        say_if_fewer(prepared.tokenizer.vocab_size, data.vocab_size, talk)
    for line in ledger_lines(prepared.ledger):
        talk(line)
    return prepared


def say_if_fewer(found: int, asked: int, talk: Callable[[str], None]) -> None:
    """Say when a trained vocabulary is smaller than what was asked for."""
    if found < asked:
        talk(f"the vocabulary has {found:,} tokens, not {asked:,}: the text holds no more pairs that come twice")


def paths_of(data: DataSettings, talk: Callable[[str], None]) -> list[Path]:
    """The files and folders to read; a corpus of the catalogue is fetched first, if it is not here."""
    from ratoon.store.fetch import corpus_sources, obtain

    if data.corpus is None:
        return [Path(source) for source in data.sources]
    obtain(data.corpus, talk=talk)
    return corpus_sources(data.corpus)


def reading_of(data: DataSettings) -> Reading:
    """How the files are read."""
    from ratoon.data.sources import Reading

    return Reading(data.field, data.split_documents or "file", data.encoding, data.on_bad_row)


def ledger_lines(ledger: dict[str, Any]) -> list[str]:
    """The ledger as lines of a table, its notes below it."""
    from ratoon.cli.output import aligned

    rows: list[tuple[str, ...]] = [("", "documents", "bytes", "tokens", "")]
    for reason, account in {"read": ledger["read"], **ledger["accounts"]}.items():
        places = account.get("places") or []
        first = f"first: {places[0]}" if places else ""
        rows.append((reason, *(f"{account[what]:,}" for what in ("documents", "bytes", "tokens")), first))
    return [*aligned(rows), *ledger["notes"]]


def facts(prepared: Prepared) -> dict[str, Any]:
    """A prepared folder as plain values."""
    return {
        "folder": str(prepared.folder),
        "hash": prepared.manifest.hash,
        "tokenizer_hash": prepared.tokenizer.hash,
        "vocab_size": prepared.tokenizer.vocab_size,
        "train_tokens": prepared.train.n_tokens,
        "held_out_tokens": prepared.held_out.n_tokens,
        "ledger": prepared.ledger,
    }
