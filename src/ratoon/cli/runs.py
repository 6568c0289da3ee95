"""`ratoon runs`: the runs of this place, or one of them: status, figures, where things are, what to type next."""

from __future__ import annotations

import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from ratoon.cli.noun import Noun

if TYPE_CHECKING:
    from ratoon.store.runs import Run


@click.group(cls=Noun)
def command() -> None:
    """List the runs below runs/, or show one: `ratoon runs`, `ratoon runs NAME`."""


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
def list_(as_json: bool) -> None:
    """List the runs, oldest first."""
    from ratoon.cli.output import aligned, answer, answer_json, talk
    from ratoon.store.runs import RUNS, Run

    found = [facts(run) for run in Run.all()]
    if as_json:
        answer_json({"runs": found})
        return
    if not found:
        talk(f"no runs yet below {RUNS}/: `ratoon quickstart` makes one")
        return
    rows: list[tuple[str, ...]] = [
        ("name", "status", "steps", "held-out loss", "bits/byte", "task's measure", "minutes", "written")
    ]
    for one in found:
        held = one["evaluation"] or {}
        rows.append(
            (
                one["name"],
                one["status"],
                f"{one['step']:,}" if one["step"] is not None else "-",
                f"{held['loss']:.4f}" if held.get("loss") is not None else "-",
                f"{held['bits_per_byte']:.4f}" if held.get("bits_per_byte") is not None else "-",
                " ".join(_main(held)),
                f"{one['seconds'] / 60:.1f}" if one["seconds"] is not None else "-",
                one["written"].replace("T", " "),
            )
        )
    answer("\n".join(aligned(rows, left=2)))


@command.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def show(name: str, as_json: bool) -> None:
    """Show the run NAME: status, figures, where things are, and the next commands."""
    from ratoon.cli.output import answer, answer_json
    from ratoon.store.runs import Run

    run = Run.find(name)
    found = facts(run)
    if as_json:
        answer_json({**found, "state": run.read_state()})
    else:
        answer("\n".join(_page(found)))


def facts(run: Run) -> dict[str, Any]:
    """A run as plain values: its state, its last records, and what of it is on the disk."""
    state = run.read_state()
    last: dict[str, dict[str, Any]] = {record["kind"]: record for record in run.read_metrics() if "kind" in record}
    trained, measured = last.get("train", {}), last.get("eval", {})
    written = max(
        (path.stat().st_mtime for path in (run.state_path, run.metrics_path) if path.is_file()), default=time.time()
    )
    status = str(state.get("status", "unknown"))
    commands = list(state.get("next_commands") or [])
    if status != "done":
        verb = "finetune" if state.get("task") else "pretrain"
        commands = [f"ratoon {verb} {run.recipe_path} --resume"] if run.recipe_path.is_file() else []
    model = state.get("model") or {}
    places = {
        "recipe": run.recipe_path,
        "model": run.model,
        "page": run.report,
        "metrics": run.metrics_path,
        "checkpoints": run.checkpoints,
        "log": run.folder / "log.txt",
        "ledger": run.folder / "ledger.json",
    }
    return {
        "name": run.name,
        "folder": str(run.folder),
        "status": status,
        "reason": state.get("reason"),
        "written": datetime.fromtimestamp(written).isoformat(timespec="minutes"),
        "written_seconds_ago": round(max(0.0, time.time() - written)),
        "step": state.get("steps") or trained.get("step"),
        "tokens": state.get("tokens") or trained.get("tokens"),
        "seconds": state.get("seconds") or trained.get("time_seconds"),
        "train_loss": trained.get("loss"),
        "tokens_per_second": trained.get("tokens_per_second"),
        "memory_bytes": trained.get("memory_bytes"),
        "evaluation": state.get("evaluation") or ({k: v for k, v in measured.items() if k != "kind"} or None),
        "model": {key: model[key] for key in ("family", "parameters", "layers", "width") if key in model},
        "task": (state.get("task") or {}).get("kind"),
        "method": (state.get("method") or {}).get("kind"),
        "base": state.get("base"),
        "data": state.get("data") or {},
        "init": state.get("init"),
        "model_hash": state.get("model_hash"),
        "places": {what: str(path) for what, path in places.items() if path.exists()},
        "next_commands": commands,
    }


def _page(found: dict[str, Any]) -> list[str]:
    from ratoon.cli.output import aligned, size_words

    ago = found["written_seconds_ago"]
    status = found["status"] + (f": {found['reason']}" if found["reason"] else "")
    if found["status"] == "running":
        status += f"; last written {ago:,} seconds ago"
    rows: list[tuple[str, str]] = [("run", found["name"]), ("status", status), ("written", found["written"])]
    model = found["model"]
    if "parameters" in model:
        shape = [f"{model[key]} {word}" for key, word in (("layers", "layers"), ("width", "wide")) if key in model]
        rows.append(("model", ", ".join([f"{model['parameters']:,} parameters", *shape])))
    if found["init"]:
        rows.append(("goes on from", str(found["init"])))
    if found["task"]:
        rows.append(("task", f"{found['task']}, by {found['method']} on {found['base'] or 'random weights'}"))
    data = found["data"]
    if data:
        rows.append(("text", ", ".join(map(str, data.get("sources") or ["?"]))))
    if "train_tokens" in data:
        rows.append(("tokens there", f"{data['train_tokens']:,} to train on, {data['held_out_tokens']:,} held out"))
    elif "train_examples" in data:
        parts = f"{data['validation_examples']:,} for validation, {data['test_records']:,} to test"
        rows.append(("examples there", f"{data['train_examples']:,} to train on, {parts}"))
    if found["step"] is not None:
        what = "learned places" if found["task"] else "tokens"
        rows.append(("trained", f"{found['step']:,} steps, {found['tokens'] or 0:,} {what}"))
    if found["seconds"] is not None:
        rows.append(("time", f"{found['seconds'] / 60:.1f} minutes"))
    if found["tokens_per_second"]:
        rows.append(("speed", f"{found['tokens_per_second']:,.0f} tokens/s"))
    if found["memory_bytes"]:
        rows.append(("memory", size_words(found["memory_bytes"])))
    if found["train_loss"] is not None:
        rows.append(("last training loss", f"{found['train_loss']:.4f}"))
    rows += _measured(found["evaluation"] or {})
    rows += [(what, place) for what, place in found["places"].items()]
    lines = aligned(list(rows))
    if found["next_commands"]:
        lines += ["", "next:", *(f"  {one}" for one in found["next_commands"])]
    return lines


def _measured(held: dict[str, Any]) -> list[tuple[str, str]]:
    """What was measured: the held-out loss of a language model, or a task's main figure."""
    if values := held.get("values"):
        name, value = _main(held)
        return [(name, f"{value}{_interval(values[0])}, n = {values[0]['n']:,} {values[0]['unit']}s")]
    if held.get("loss") is None:
        return []
    rows = [("held-out loss", f"{held['loss']:.4f}{_interval(held)}, n = {held.get('n_tokens', 0):,} tokens")]
    more = [
        f"{held[key]:.4f} {words}"
        for key, words in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))
        if held.get(key) is not None
    ]
    return [*rows, ("", ", ".join(more))] if more else rows


def _main(held: dict[str, Any]) -> tuple[str, ...]:
    """Name and value of a task's main figure; of what is no task, a dash."""
    main = next(iter(held.get("values") or []), None)
    if main is None:
        return ("-",)
    return main["name"], "undefined" if main["value"] is None else f"{main['value']:.4f}"


def _interval(figures: dict[str, Any]) -> str:
    return " [{:.4f}, {:.4f}]".format(*figures["interval"]) if figures.get("interval") else ""
