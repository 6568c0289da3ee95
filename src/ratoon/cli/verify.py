"""`ratoon verify`: equal means equal, on a user's own model.

Decides which model and which text. What is compared, and how far apart is too far, is `evaluate/verify.py`'s.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from torch import Tensor

    from ratoon.data.batch import Batch
    from ratoon.evaluate.verify import Check, Subject
    from ratoon.model.transformer import Transformer


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print every check as JSON.")
def command(model: str, as_json: bool) -> None:
    """Check on MODEL (a run, a folder, a GGUF file, a name of the catalogue) that equal means equal.

    Cached = uncached, batched = single, packed = unpacked, accumulated = at once, saved = loaded, C = torch,
    Transformers = Ratoon, text = text, files = manifests: each with the largest difference that was found. Exits with 1
    if one fails. What cannot be checked here is said, with the reason.
    """
    from ratoon.cli.output import answer, answer_json, talk
    from ratoon.evaluate.verify import verify

    began = time.perf_counter()
    subject, text = _subject(model)
    parameters = sum(parameter.numel() for parameter in subject.lm.model.parameters())
    talk(f"{subject.path}: {parameters:,} parameters in float32; tried on {text}")
    checks = []
    for check in verify(subject, _gradients):
        talk(f"  {check.name}: {_verdict(check)}")
        checks.append(check)
    failed = [check.name for check in checks if check.passed is False]
    skipped = [check.name for check in checks if check.passed is None]
    seconds = time.perf_counter() - began
    if as_json:
        answer_json(
            {
                "model": model,
                "path": str(subject.path),
                "text": text,
                "passed": not failed,
                "seconds": seconds,
                "checks": [check.as_dict() for check in checks],
            }
        )
    else:
        answer("\n".join(_table(checks)))
        passed = len(checks) - len(failed) - len(skipped)
        answer(
            f"{passed} passed, {len(failed)} failed, {len(skipped)} not checked, in {seconds:.0f} s"
            + (f"; failed: {', '.join(failed)}" if failed else "")
        )
    if failed:
        sys.exit(1)


def _subject(name: str) -> tuple[Subject, str]:
    """The model, what it is tried on, and a sentence saying which text that is."""
    from ratoon.base.errors import RatoonError
    from ratoon.evaluate.verify import Subject, passages
    from ratoon.generate.lm import load
    from ratoon.store.runs import Run

    lm = load(name, dtype="float32")
    path = Path(lm.facts["path"])
    sealed, held_out = ([path] if path.is_dir() else []), None
    try:
        run = Run.find(name)
    except RatoonError:
        run = None
    if run is not None and path == run.model:
        held_out = _held_out(run)
        sealed += [held_out.folder] if held_out is not None else []
        sealed += sorted(folder for folder in run.checkpoints.glob("step-*") if folder.is_dir())
    rows, texts, said = passages(lm, held_out)
    return Subject(lm, rows, texts, path, sealed, _known(path)), said


def _known(path: Path) -> dict[Path, str]:
    """The hash that the catalogue has for the file, if it is one of the catalogue's."""
    from ratoon.base.catalog import ENTRIES, folder_of

    found: dict[Path, str] = {}
    for entry in ENTRIES.values() if path.is_file() else ():
        if folder_of(entry.name).resolve() == path.parent.resolve():
            found.update({path: file.sha256 for file in entry.files if file.name == path.name})  # noqa: B035
    return found


def _held_out(run: Any) -> Any:
    """The run's held-out shards, where they still lie."""
    from ratoon.data.shards import Shards

    prepared = run.read_state().get("data", {}).get("prepared")
    for folder in (run.folder / "data", *([Path(prepared)] if prepared else [])):
        if (folder / "held_out" / "ratoon.json").is_file():
            return Shards(folder / "held_out")
    return None


def _gradients(model: Transformer, batches: Sequence[Batch]) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients as the loop makes them: summed over the batches, divided once."""
    from ratoon.train import loss

    device = model.head_weight().device
    model.train()
    model.zero_grad()
    total = weights = 0.0
    for batch in batches:
        one, weight = loss.next_token(model, loss.Inputs.of(batch, device))
        one.backward()  # type: ignore[no-untyped-call]
        total, weights = total + float(one.detach()), weights + float(weight)
    found = {name: p.grad / weights for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.eval()
    return total / weights, found


def _verdict(check: Check) -> str:
    return "not checked" if check.passed is None else "passed" if check.passed else "FAILED"


def _table(checks: list[Check]) -> list[str]:
    from ratoon.cli.output import aligned

    def number(value: float | None, unit: str) -> str:
        if value is None:
            return "-"
        return f"{value:.0f}" if unit in ("texts", "files") else "0" if value == 0 else f"{value:.1e}"

    head = ("check", "compares", "largest difference", "tolerance", "of", "result", "")
    rows = [
        (
            check.name,
            check.compares,
            number(check.difference, check.unit),
            number(check.tolerance, check.unit),
            check.unit or "-",
            _verdict(check),
            check.note.removeprefix("not checked: "),
        )
        for check in checks
    ]
    return aligned([head, *rows], left=2)
