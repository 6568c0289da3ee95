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
    rows: list[tuple[str, ...]] = [("name", "status", "steps", "held-out loss", "bits/byte", "minutes", "written")]
    for one in found:
        held = one["evaluation"] or {}
        rows.append(
            (
                one["name"],
                one["status"],
                f"{one['step']:,}" if one["step"] is not None else "-",
                f"{held['loss']:.4f}" if held.get("loss") is not None else "-",
                f"{held['bits_per_byte']:.4f}" if held.get("bits_per_byte") is not None else "-",
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
        commands = [f"ratoon pretrain {run.recipe_path} --resume"] if run.recipe_path.is_file() else []
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
    data = found["data"]
    if data:
        rows.append(("text", ", ".join(map(str, data.get("sources") or ["?"]))))
        rows.append(("tokens there", f"{data['train_tokens']:,} to train on, {data['held_out_tokens']:,} held out"))
    if found["step"] is not None:
        rows.append(("trained", f"{found['step']:,} steps, {found['tokens'] or 0:,} tokens"))
    if found["seconds"] is not None:
        rows.append(("time", f"{found['seconds'] / 60:.1f} minutes"))
    if found["tokens_per_second"]:
        rows.append(("speed", f"{found['tokens_per_second']:,.0f} tokens/s"))
    if found["memory_bytes"]:
        rows.append(("memory", size_words(found["memory_bytes"])))
    if found["train_loss"] is not None:
        rows.append(("last training loss", f"{found['train_loss']:.4f}"))
    held = found["evaluation"]
    if held:
        interval = " [{:.4f}, {:.4f}]".format(*held["interval"]) if held.get("interval") else ""
        rows.append(("held-out loss", f"{held['loss']:.4f}{interval}, n = {held.get('n_tokens', 0):,} tokens"))
        more = [
            f"{held[key]:.4f} {words}"
            for key, words in (("perplexity", "perplexity"), ("bits_per_byte", "bits per byte"))
            if held.get(key) is not None
        ]
        if more:
            rows.append(("", ", ".join(more)))
    rows += [(what, place) for what, place in found["places"].items()]
    lines = aligned(list(rows))
    if found["next_commands"]:
        lines += ["", "next:", *(f"  {one}" for one in found["next_commands"])]
    return lines
