"""`ratoon evaluate`: a model on text (loss, perplexity, bits per byte), on given continuations, or for its task.

Decides which of these is meant and which options belong to it. What is counted on text is decided in `evaluate/run.py`
and `evaluate/score.py`; models for tasks are `evaluate_task.py`'s, suites `clue.py`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from ratoon.cli.sampling import load_model, model_options, with_options

if TYPE_CHECKING:
    from ratoon.cli.evaluate_task import Asked
    from ratoon.data.shards import Shards
    from ratoon.data.sources import Reading
    from ratoon.evaluate.run import Report
    from ratoon.generate.lm import LanguageModel

DEFAULT_CONTEXT_TOKENS = 1024
"""Longer contexts cost much and change the loss little; whoever wants one says so."""
OF_TEXT = ("context_tokens", "stride", "limit_tokens", "rows", "shorten", "field", "split_documents", "encoding",
           "on_bad_row")  # fmt: skip
OF_TASKS = ("floor", "base", "robust", "perturb", "strengths", "attack", "against", "unlabelled", "limit_rows", "out")
OF_SUITES = ("data", "models")
"""Options that are read for text, for a task, for a suite."""

_TEXT = (
    click.option("--pairs", metavar="FILE.jsonl", help="Score continuations: lines of {context, continuation}."),
    click.option(
        "--context-tokens", type=int, help=f"Tokens read at once; the model's, at most {DEFAULT_CONTEXT_TOKENS:,}."
    ),
    click.option(
        "--stride", type=int, help="Tokens that the window moves on; smaller gives each token more before it."
    ),
    click.option(
        "--limit-tokens", type=click.IntRange(min=1), help="Measure on at most so many tokens, spread evenly."
    ),
    click.option(
        "--rows", type=click.IntRange(min=1), default=64, show_default=True, help="Rows read at once, at most."
    ),
    click.option("--shorten", type=click.Choice(["left"]), help="Pairs: cut a context that does not fit, said aloud."),
    click.option("--field", help="The field of rows that holds the text; recognised, and said, if not given."),
    click.option(
        "--split-documents",
        metavar="HOW",
        default="file",
        show_default=True,
        help="What a document is in plain text: file, lines, blank-lines, or a separator of your own.",
    ),
    click.option("--encoding", default="utf-8", show_default=True, help="Encoding of the files."),
    click.option(
        "--on-bad-row",
        type=click.Choice(["refuse", "skip"]),
        default="refuse",
        help="skip: leave such rows out, counted.",
    ),
)
_SUITE = (
    click.option("--suite", type=click.Choice(["clue"]), help="Measure the runs of a suite's recipes in one table."),
    click.option(
        "--data", type=click.Path(path_type=Path), metavar="DIR", help="Suite: the folder of its official files."
    ),
    click.option(
        "--models", multiple=True, metavar="PART=RUN", help="Suite: the run for a part, if not that of its recipe."
    ),
)
_TASK = (
    click.option("--floor", is_flag=True, help="Task: put the cheap classics beside the model, and say who wins."),
    click.option("--base", is_flag=True, help="Task: the base without its training, on the same rows."),
    click.option("--robust", is_flag=True, help="Task: what typos, homophones and the like cost, by strength."),
    click.option("--perturb", metavar="NAME,…", help="Task: only these perturbations; read with --robust."),
    click.option("--strengths", metavar="0.1,…", help="Task: shares of the places touched; read with --robust."),
    click.option(
        "--attack",
        type=click.IntRange(min=1),
        metavar="QUERIES",
        help="Task: greedy word substitution, so many queries.",
    ),
    click.option("--against", metavar="MODEL", help="Task: another model on the same records, paired bootstrap."),
    click.option(
        "--unlabelled", is_flag=True, help="Task: FILE… without answers: predictions alone, nothing to measure."
    ),
    click.option("--limit-rows", type=click.IntRange(min=1), help="Task: so many test rows, drawn from the seed."),
    click.option(
        "--out", type=click.Path(path_type=Path), metavar="DIR", help="Task: where figures and page are written."
    ),
)


@click.command()
@click.argument("model", required=False)
@click.argument("files", nargs=-1, metavar="[FILE]…")
@with_options(_TEXT)
@with_options(_SUITE)
@with_options(_TASK)
@model_options
@click.option("--json", "as_json", is_flag=True, help="Print every figure as JSON.")
@click.pass_context
def command(
    context: click.Context,
    model: str | None,
    files: tuple[str, ...],
    pairs: str | None,
    context_tokens: int | None,
    stride: int | None,
    limit_tokens: int | None,
    rows: int,
    shorten: Literal["left"] | None,
    field: str | None,
    split_documents: str,
    encoding: str,
    on_bad_row: Literal["refuse", "skip"],
    suite: str | None,
    data: Path | None,
    models: tuple[str, ...],
    floor: bool,
    base: bool,
    robust: bool,
    perturb: str | None,
    strengths: str | None,
    attack: int | None,
    against: str | None,
    unlabelled: bool,
    limit_rows: int | None,
    out: Path | None,
    dtype: str,
    device: str | None,
    as_json: bool,
) -> None:
    """Measure MODEL on FILE… of text, or for the task it was fine-tuned for on its run's test rows (or rows in FILE…).

    Text: (txt, md, jsonl, csv, parquet; also .gz, .zst), or on its run's held-out text.

    Loss is in nats per token, with the token that ends a document; bits per byte leaves that token out and can be
    compared between models of different tokenizers. Each comes with what it was counted on and a 95 % interval.

    A task model computes in bfloat16 where that is fast, unless --dtype says otherwise. Rows in FILE… and --limit-rows
    are written beside the run's own evaluation, not over it.
    """
    from ratoon.base.errors import ConfigError
    from ratoon.cli.measure import of_task
    from ratoon.data.sources import Reading
    from ratoon.train.device import fast_dtype

    _expect_fitting(context, pairs, files, shorten)
    if suite is not None:
        from ratoon.cli.clue import run_suite

        beside = tuple(name for name in OF_TASKS if name not in ("limit_rows", "out"))
        _refuse(context, (*OF_TEXT, *beside, "pairs", "files"), "with --suite")
        run_suite(model, data, models, out, limit_rows, dtype=_given(context, "dtype"), device=device, as_json=as_json)
        return
    _refuse(context, OF_SUITES, "without --suite")
    if model is None:
        raise click.UsageError("Missing argument 'MODEL'.")
    asked = _asked(floor, base, robust, perturb, strengths, attack, against, limit_rows, unlabelled, out)
    lm = load_model(model, _given(context, "dtype") or (fast_dtype() if of_task(model) else dtype), device)
    if isinstance(lm.facts.get("task"), dict) and pairs is None:
        from ratoon.cli.evaluate_task import evaluate_task_model

        _refuse(context, OF_TEXT, f"on a model that was fine-tuned for {lm.facts['task'].get('kind')}")
        evaluate_task_model(lm, files, asked, as_json=as_json)
        return
    if asked != type(asked)():
        raise ConfigError(
            f"'{model}' was not fine-tuned for a task, and the options of tasks have no effect",
            where="command line",
            fix="leave them out, or name a run of `ratoon finetune`",
        )
    if pairs is not None:
        _pairs(lm, pairs, lm.context_tokens if context_tokens is None else context_tokens, shorten, as_json)
        return
    window = _Window(context_tokens, stride, limit_tokens, rows)
    _on_text(lm, model, files, Reading(field, split_documents, encoding, on_bad_row), window, as_json)


def _expect_fitting(context: click.Context, pairs: str | None, files: tuple[str, ...], shorten: str | None) -> None:
    """Raise `ConfigError` for options of which one says that another has no effect."""
    from ratoon.base.errors import ConfigError

    if pairs is not None and files:
        raise ConfigError("both FILE and --pairs", where="command line", expected="one of the two")
    if pairs is not None:
        _refuse(context, ("stride", "limit_tokens", *OF_TASKS, *OF_SUITES), "with --pairs")
    elif shorten is not None:
        raise ConfigError("--shorten has no effect without --pairs", where="command line", fix="leave out --shorten")


@dataclass(frozen=True)
class _Window:
    """What is read at once of a text."""

    context_tokens: int | None
    stride_tokens: int | None
    limit_tokens: int | None
    rows: int


def _given(context: click.Context, name: str) -> Any:
    """The option's value where it was typed, else None."""
    typed = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    return context.params[name] if typed else None


def _refuse(context: click.Context, names: tuple[str, ...], why: str) -> None:
    """Raise `ConfigError` for an option that was typed and that nothing would read."""
    from ratoon.base.errors import ConfigError

    for name in names:
        if _given(context, name) in (None, ()):
            continue
        said = "FILE" if name == "files" else "--" + name.replace("_", "-")
        raise ConfigError(f"{said} has no effect {why}", where="command line", fix=f"leave out {said}")


def _on_text(
    lm: LanguageModel,
    model: str,
    files: tuple[str, ...],
    reading: Reading,
    window: _Window,
    as_json: bool,
) -> None:
    """Loss, perplexity and bits per byte on files, or on the run's held-out text."""
    from ratoon.cli.output import answer_json, talk

    def measure(shards: Shards, usual_tokens: int) -> Report:
        from ratoon.evaluate.run import held_out

        context = usual_tokens if window.context_tokens is None else window.context_tokens
        talk(f"{shards.n_tokens:,} tokens in {shards.n_documents:,} documents, {context:,} tokens of context")
        line = _progress()
        return held_out(
            lm.model,
            shards,
            context_tokens=context,
            rows=window.rows,
            limit_tokens=window.limit_tokens,
            stride_tokens=window.stride_tokens,
            tokenizer=lm.tokenizer,
            progress=line,
        )

    facts: dict[str, Any] = {"model": model}
    if files:
        report, ledger = _on_files(lm, files, reading, measure)
        facts |= {"files": list(files), "ledger": ledger}
        for note in ledger["notes"]:
            talk(note)
        for reason, account in ledger["accounts"].items():
            if reason != "measured":
                talk(f"left out, {reason}: {account['documents']:,} documents (first: {account['places'][0]})")
    else:
        shards, usual = _held_out_part(model, lm)
        report = measure(shards, usual)
        facts["shards"] = str(shards.folder)
    if as_json:
        answer_json(facts | report.as_dict())
    else:
        _show(report)


def _asked(
    floor: bool,
    base: bool,
    robust: bool,
    perturb: str | None,
    strengths: str | None,
    attack: int | None,
    against: str | None,
    limit_rows: int | None,
    unlabelled: bool,
    out: Path | None,
) -> Asked:
    """What is asked of a task model. Raises `ConfigError` for what does not fit together."""
    from ratoon.base.errors import ConfigError
    from ratoon.cli.evaluate_task import Asked

    for name, value in (("--perturb", perturb), ("--strengths", strengths)):
        if value is not None and not robust:
            raise ConfigError(f"{name} has no effect without --robust", where="command line", fix="add --robust")
    needs = {
        "--floor": floor, "--base": base, "--robust": robust, "--attack": attack is not None,
        "--against": against is not None,
    }  # fmt: skip
    for name, wanted in needs.items():
        if unlabelled and wanted:
            raise ConfigError(
                f"{name} needs answers, and --unlabelled says that there are none",
                where="command line",
                fix=f"leave out {name}",
            )
    try:
        levels = tuple(float(one) for one in (strengths or "").split(",") if one)
    except ValueError:
        raise ConfigError(f"'{strengths}' is no list of shares", where="--strengths", expected="0.1,0.2") from None
    names = tuple(one.strip() for one in (perturb or "").split(",") if one.strip())
    return Asked(floor, base, robust, names, levels, attack, against, limit_rows, unlabelled, out)


def _on_files(
    lm: LanguageModel, files: tuple[str, ...], reading: Reading, measure: Callable[[Shards, int], Report]
) -> tuple[Report, dict[str, Any]]:
    from ratoon.base.errors import ArtifactError
    from ratoon.data.ledger import Ledger
    from ratoon.data.sources import find_files, read
    from ratoon.evaluate.texts import as_shards

    if lm.tokenizer is None:
        raise ArtifactError(f"'{lm.name}' has no tokenizer, and text cannot be measured without one")
    ledger = Ledger()
    found = find_files(files, ledger)
    with as_shards(read(found, reading, ledger), lm.tokenizer, ledger) as shards:
        return measure(shards, _usual(lm)), ledger.as_dict()


def _usual(lm: LanguageModel) -> int:
    return min(lm.context_tokens, DEFAULT_CONTEXT_TOKENS)


def _held_out_part(name: str, lm: LanguageModel) -> tuple[Shards, int]:
    """The held-out part of the run that `name` is, and the context that the run itself measured it with.

    Raises `ConfigError` when it is no run, `ArtifactError` when the part is gone or was made with another tokenizer.
    """
    from ratoon.base.errors import ArtifactError, ConfigError
    from ratoon.data.shards import Shards
    from ratoon.store.runs import Run

    try:
        run = Run.find(name)
    except ArtifactError:
        raise ConfigError(
            f"there is nothing to measure on: '{name}' is no run, so no held-out text belongs to it",
            where="command line",
            fix=f"name a file: ratoon evaluate {name} FILE",
        ) from None
    state = run.read_state()
    told = state.get("data", {}).get("prepared")
    places = [run.folder / "data" / "held_out", *([Path(told) / "held_out"] if told else [])]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise ArtifactError(
            "the run's held-out text is gone",
            where=", ".join(map(str, places)),
            fix=f"name a file: ratoon evaluate {name} FILE",
        )
    shards = Shards(folder)
    if lm.tokenizer is not None and lm.tokenizer.hash != shards.tokenizer_hash:
        raise ArtifactError(
            "the held-out text was made with another tokenizer than the model's",
            where=folder,
            expected=f"tokenizer {lm.tokenizer.hash[:12]}, found {str(shards.tokenizer_hash)[:12]}",
            fix=f"name a file: ratoon evaluate {name} FILE",
        )
    measured = state.get("evaluation", {}).get("context_tokens")
    return shards, measured if isinstance(measured, int) else _usual(lm)


def _pairs(lm: LanguageModel, path: str, context_tokens: int, shorten: Literal["left"] | None, as_json: bool) -> None:
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.evaluate.pairs import read_pairs, score_pairs
    from ratoon.evaluate.score import LocalScorer

    scorer = LocalScorer(lm, context_tokens=context_tokens, shorten=shorten)
    report = score_pairs(scorer, read_pairs(path)).as_dict()
    if report["dropped_tokens"]:
        cut = sum(bool(one["dropped_tokens"]) for one in report["pairs"])
        talk(f"{report['dropped_tokens']:,} tokens were cut from the left of {cut:,} contexts")
    if as_json:
        answer_json({"model": lm.name, "file": path, **report})
        return
    for one in report["pairs"]:
        greedy = "greedy" if one["is_greedy"] else ""
        answer(f"{one['loglikelihood']:12.4f}  {one['n_tokens']:4d} tokens  {greedy:6s}  {one['where']}")
    answer(
        f"log-likelihood {report['loglikelihood']:.4f} {_range(report['loglikelihood_interval'], 4)} per pair, loss "
        f"{report['loss']:.4f} {_range(report['interval'], 4)} nats per token, greedy "
        f"{100 * report['greedy_fraction']:.1f} % {_range([100 * x for x in report['greedy_interval']], 1)}; "
        f"n = {report['n_pairs']:,} pairs, {report['n_tokens']:,} tokens, 95 % intervals over pairs"
    )


def _show(report: Report) -> None:
    from ratoon.cli.output import answer, talk

    facts = report.as_dict()
    answer(f"loss           {facts['loss']:.4f} nats per token  {_range(facts['interval'], 4)}")
    answer(f"perplexity     {facts['perplexity']:.2f}  {_range(facts['perplexity_interval'], 2)}")
    if facts["bits_per_byte"] is None:
        answer("bits per byte  unknown")
        talk("bits per byte need a tokenizer whose tokens have a length in bytes; this one's do not")
    else:
        answer(f"bits per byte  {facts['bits_per_byte']:.4f}  {_range(facts['bits_per_byte_interval'], 4)}")
    size = "unknown" if facts["n_bytes"] is None else f"{facts['n_bytes']:,}"
    part = "" if facts["n_tokens"] >= facts["n_tokens_in_all"] - 1 else f" of {facts['n_tokens_in_all']:,}"
    answer(f"n              {facts['n_tokens']:,} tokens{part}, {size} bytes, {facts['n_documents']:,} documents")
    talk(
        f"95 % intervals over {facts['interval_of']}; context {facts['context_tokens']:,}, stride "
        f"{facts['stride_tokens']:,}; {facts['signature']}"
    )


def _range(interval: list[float] | None, digits: int) -> str:
    return "[no interval]" if interval is None else f"[{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"


def _progress() -> Callable[[int, int], None]:
    """A line that moves, on a terminal only."""
    moving = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        if moving:
            sys.stderr.write(f"\r{done:,} of {total:,} rows" + ("\n" if done == total else ""))
            sys.stderr.flush()

    return show
