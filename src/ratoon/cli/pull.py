"""`ratoon pull`: what the catalogue names, onto this machine. How it is fetched is `store/fetch.py`'s."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ratoon.base.catalog import Entry


@click.command()
@click.argument("name", required=False)
@click.option("--list", "as_list", is_flag=True, help="List the catalogue.")
@click.option("--json", "as_json", is_flag=True, help="Print what is known of the entry, or of all, as JSON.")
def command(name: str | None, as_list: bool, as_json: bool) -> None:
    """Fetch the model or corpus NAME of the catalogue, unless it is here already. The answer is its folder.

    It is kept in $RATOON_HOME, or in the cache folder of this user; hashes are checked.
    """
    from ratoon.base.catalog import ENTRIES, entry
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.store.fetch import obtain

    if (name is None) != as_list:
        raise click.UsageError("Give a NAME, or --list to see which names there are.")
    if name is None:
        if as_json:
            answer_json({"entries": [facts(one) for one in ENTRIES.values()]})
        else:
            answer("\n".join(_listing()))
        return
    one = entry(name)
    folder = obtain(name, talk=talk)
    if as_json:
        answer_json(facts(one, folder))
    else:
        answer(str(folder))


def facts(one: Entry, folder: Path | None = None) -> dict[str, Any]:
    """An entry as plain values; `here` says whether it is whole on this machine."""
    from ratoon.base.catalog import folder_of

    return {
        "name": one.name,
        "kind": one.kind,
        "what": one.what,
        "language": one.language,
        "bytes": one.bytes,
        "licence": one.licence,
        "source": str(one.source),
        "sha256": one.sha256,
        "files": [file.model_dump(include={"name", "bytes", "sha256"}) for file in one.files],
        "folder": str(folder or folder_of(one.name)),
        "here": "yes" if folder is not None else _here(one.name),
    }


def _here(name: str) -> str:
    """yes, no, or why what lies there does not count."""
    from ratoon.base.errors import ArtifactError
    from ratoon.store.fetch import is_here

    try:
        return "yes" if is_here(name) else "no"
    except ArtifactError as error:
        return f"another file: {error.where}"


def _listing() -> list[str]:
    from ratoon.base.catalog import ENTRIES
    from ratoon.cli.output import aligned, size_words

    rows: list[tuple[str, ...]] = [("name", "kind", "language", "size", "here", "what")]
    for one in ENTRIES.values():
        rows.append((one.name, one.kind, one.language, size_words(one.bytes), _here(one.name), one.what))
    lines = aligned(rows, left=3)
    lines += ["", *(f"{one.name}: from {one.source}; licence: {one.licence}" for one in ENTRIES.values())]
    return lines
