"""Where the records of a run go: `metrics.jsonl` always, and TensorBoard, Weights & Biases or MLflow beside it.

Decides under which names a record appears in a foreign tracker, and that none of them can stop a run. What is recorded,
and when, is decided by the loop. What a tracker keeps lies in the run's folder unless its own environment variables
send it elsewhere.
"""

from __future__ import annotations

import inspect
import json
import os
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, Protocol

from ratoon.base.errors import ConfigError
from ratoon.store.atomic import write_json
from ratoon.store.runs import Run

Record = dict[str, Any]
Status = Literal["done", "failed", "interrupted"]
Talk = Callable[[str], None]

PATIENCE_TRIES, PATIENCE_SECONDS = 3, 10.0
"""A foreign tracker that fails so often in a row, or lets the run wait so long for nothing, is left alone."""

SAMPLE_FIELDS = ("prompt", "text")


class Sink(Protocol):
    """A foreign tracker. `begin` is called before the first record, with the last step that is on record already (a
    resumed run writes the later ones again); its methods may raise whatever they like."""

    def begin(self, kept_step: int) -> None: ...
    def write(self, record: Record) -> None: ...
    def close(self, status: Status) -> None: ...


class Tracker:
    """Takes every record of a run. Made by `trackers`."""

    def __init__(self, run: Run, sinks: Mapping[str, Sink], talk: Talk) -> None:
        self.run, self._sinks, self._talk = run, dict(sinks), talk
        self.lost: Counter[str] = Counter()
        self._tries: Counter[str] = Counter()  # failed ones in a row
        self._waited: dict[str, float] = defaultdict(float)  # seconds in them
        self._told: set[str] = set()
        self._began = False

    def log(self, record: Record) -> None:
        """Write a record to `metrics.jsonl`, then hand it to the foreign trackers.

        Raises `StorageError` when the run's own file cannot be written. A foreign tracker that fails is told of once,
        and what it did not take is counted in `lost`.
        """
        if not self._began:
            self._began, kept = True, _last_step(self.run)
            for name, sink in self._sinks.items():
                self._try(name, "could not begin", partial(sink.begin, kept))
        self.run.append_metrics(record)
        for name, sink in self._sinks.items():
            if not self._try(name, f"did not take the record of step {record['step']}", partial(sink.write, record)):
                self.lost[name] += 1

    def close(self, status: Status = "done") -> None:
        """Tell the foreign trackers how the run ended, and people what was lost, if anything."""
        for name, sink in self._sinks.items():
            self._try(name, "could not end its run", partial(sink.close, status))
        self._sinks = {}
        for name, count in self.lost.items():
            self._talk(f"{name} did not take {count} records; {self.run.metrics_path} has them all")

    def _try(self, name: str, what: str, action: Callable[[], None]) -> bool:
        """Whether `action` was done: not when it fails, nor for a tracker that is left alone."""
        if self._tries[name] >= PATIENCE_TRIES or self._waited[name] > PATIENCE_SECONDS:
            return False
        began = time.monotonic()
        try:
            action()
        except Exception as error:
            self._tries[name] += 1
            self._waited[name] += time.monotonic() - began
            if name not in self._told:
                self._told.add(name)
                self._talk(
                    f"{name} {what} ({type(error).__name__}: {_first_line(error)}); the run goes on, and "
                    f"{self.run.metrics_path} has every record"
                )
            return False
        self._tries[name] = 0
        self._waited[name] = 0
        return True


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def trackers(names: tuple[str, ...], run: Run, recipe: Mapping[str, Any], *, talk: Talk = lambda _: None) -> Tracker:
    """The tracker of a run: `metrics.jsonl`, and those of `names` (tensorboard, wandb, mlflow).

    A resumed run goes on in the same run of each; their ids stand in the run's `trackers.json`. Raises `ConfigError`
    for a name that is unknown, a package that is missing, and a tracker that cannot be opened.
    """
    unknown = [name for name in names if name not in SINKS]
    if unknown:
        raise ConfigError(f"'{unknown[0]}' is no tracker", where="track", expected=f"one of {', '.join(SINKS)}")
    sinks: dict[str, Sink] = {}
    for name in dict.fromkeys(names):
        try:
            sinks[name] = SINKS[name](run, recipe, talk)
        except ImportError as error:
            raise ConfigError(
                f"the tracker '{name}' needs a package that is not installed: {error}",
                where="track",
                fix='pip install "ratoon[track]", or leave it out of track',
            ) from None
        except ConfigError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the tracker '{name}' cannot be opened: {type(error).__name__}: {_first_line(error)}",
                where="track",
                fix=f"{OFFLINE.get(name, 'look at its own settings')}, or leave it out of track",
            ) from error
    return Tracker(run, sinks, talk)


def figures(record: Record) -> dict[str, float]:
    """The numbers of a record, named `<kind>/<key>`; both ends of an interval by name."""
    found: dict[str, float] = {}
    for key, value in record.items():
        name = f"{record['kind']}/{key}"
        if key == "step" or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            found[name] = float(value)
        elif isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(x, int | float) for x in value):
            found[f"{name}_low"], found[f"{name}_high"] = map(float, value)
    return found


def texts(record: Record) -> str:
    """What a record says in words: a sample as prompt and text, anything else as its fields of text."""
    if record["kind"] == "sample":
        return " ".join(str(record[key]) for key in SAMPLE_FIELDS if record.get(key))
    return "\n".join(f"{k}: {v}" for k, v in record.items() if isinstance(v, str) and k != "kind")


def _last_step(run: Run) -> int:
    return max((int(record.get("step", -1)) for record in run.read_metrics()), default=-1)


class _Numbers:
    """Numbers the texts of a step, so that several samples of one step stand side by side."""

    def __init__(self) -> None:
        self._step, self._count = -1, 0

    def of(self, step: int) -> int:
        self._count = self._count + 1 if step == self._step else 1
        self._step = step
        return self._count


def _noted(run: Run) -> dict[str, str]:
    """The ids that this run has in foreign trackers."""
    path = run.folder / "trackers.json"
    if not path.is_file():
        return {}
    try:
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"not readable: {error}", where=path, fix="remove the file: new ids are made") from None
    return found


def _note(run: Run, name: str, identity: str) -> None:
    write_json(run.folder / "trackers.json", {**_noted(run), name: identity})


class TensorBoard:
    """Event files in the run's `tensorboard/`. What a resumed run writes again takes the place of what stood there."""

    def __init__(self, run: Run, recipe: Mapping[str, Any], talk: Talk) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._writer: Any = None
        self._folder, self._recipe, self._numbers = run.folder / "tensorboard", recipe, _Numbers()
        talk(f"look at the curves with: tensorboard --logdir {self._folder}")

    def begin(self, kept_step: int) -> None:
        """Open a new event file; TensorBoard drops what earlier files hold of the steps after `kept_step`."""
        old = any(self._folder.glob("events.*"))
        self._writer = self._open(str(self._folder), purge_step=kept_step + 1 if old else None)
        if not old:
            self._writer.add_text("recipe", _as_code(json.dumps(self._recipe, indent=2, default=str)), 0)

    def write(self, record: Record) -> None:
        """Write and flush: a process that is killed loses nothing that a checkpoint stands on."""
        assert self._writer is not None
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, record["step"])
        if words := texts(record):
            name = f"{record['kind']}/{self._numbers.of(record['step'])}"
            self._writer.add_text(name, _as_code(words), record["step"])
        self._writer.flush()

    def close(self, status: Status) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()


def _as_code(text: str) -> str:
    """Indented, so that TensorBoard shows it as it is and not as Markdown."""
    return "".join(f"    {line}\n" for line in text.splitlines())


class WandB:
    """A run of Weights & Biases, below `wandb/` in the run's folder; offline unless there is a key or WANDB_MODE says.

    Steps that an earlier process of this run handed over are not handed over again.
    """

    def __init__(self, run: Run, recipe: Mapping[str, Any], talk: Talk) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        if mode is None and not _has_key(wandb):
            mode = "offline"
            talk("wandb writes offline: there is no API key (WANDB_API_KEY, or `wandb login`)")
        noted = _noted(run).get("wandb")
        identity = noted or uuid.uuid4().hex[:16]
        self._sent = -1 if noted is None else _last_step(run)
        self._numbers = _Numbers()
        self._run = wandb.init(
            dir=str(run.folder),
            mode=mode,
            id=identity,
            # Offline there is nobody to ask for the earlier part: each process writes a file of its own.
            resume="allow" if mode not in ("offline", "disabled") else None,
            project=os.environ.get("WANDB_PROJECT", "ratoon"),
            name=os.environ.get("WANDB_NAME", run.name),
            config=dict(recipe),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        _note(run, "wandb", identity)
        if mode == "offline":
            talk(f"send it later with: wandb sync {run.folder / 'wandb'}/offline-run-*-{identity}")

    def begin(self, kept_step: int) -> None:
        """Nothing: the run was opened when the tracker was made."""

    def write(self, record: Record) -> None:
        """Hand over the numbers and texts of a step."""
        if record["step"] < self._sent:
            return
        entry: dict[str, Any] = dict(figures(record))
        if words := texts(record):
            entry[f"{record['kind']}/{self._numbers.of(record['step'])}"] = words
        self._run.log(entry, step=record["step"])

    def close(self, status: Status) -> None:
        """End the run with the exit code of its end."""
        self._run.finish(exit_code={"done": 0, "failed": 1, "interrupted": 130}[status])


def _has_key(wandb: Any) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    if "prompt" in inspect.signature(wandb.login).parameters:
        return bool(wandb.login(prompt=False, verify=False))
    return bool(wandb.api.api_key)


class MLflow:
    """A run of MLflow in the experiment MLFLOW_EXPERIMENT_NAME, else `ratoon`; in files below `mlflow/` in the run's
    folder unless MLFLOW_TRACKING_URI names a server.

    What the store holds already is not written again.
    """

    def __init__(self, run: Run, recipe: Mapping[str, Any], talk: Talk) -> None:
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            folder = (run.folder / "mlflow").resolve()
            uri = folder.as_uri()
            # MLflow 3 wants this to be said before it writes files; a database would need packages of its own.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            talk(f"look at MLflow's page with: MLFLOW_ALLOW_FILE_STORE=true mlflow ui --backend-store-uri {uri}")
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self._metric, self._client, self._numbers = Metric, MlflowClient(tracking_uri=uri), _Numbers()
        self._held: set[tuple[str, int]] = set()
        noted = _noted(run).get("mlflow")
        self._id = self._found(noted) or self._new(run, recipe)
        if noted not in (None, self._id):
            talk(f"mlflow: the run {noted} is not in {uri}; a new one begins there")
        _note(run, "mlflow", self._id)

    def _found(self, noted: str | None) -> str | None:
        """The noted run, taken up again, if the store has it."""
        from mlflow.exceptions import MlflowException

        if noted is None:
            return None
        try:
            run = self._client.get_run(noted)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        for key in run.data.metrics:
            self._held |= {(key, metric.step) for metric in self._client.get_metric_history(noted, key)}
        self._client.update_run(noted, status="RUNNING")
        return noted

    def _new(self, run: Run, recipe: Mapping[str, Any]) -> str:
        """A new run in the store, with the recipe as a file and its training settings as parameters."""
        from mlflow.entities import Param

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "ratoon")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(name)
        identity = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        settings = recipe.get("train")
        if isinstance(settings, Mapping) and settings:
            self._client.log_batch(identity, params=[Param(f"train.{k}", str(v)[:250]) for k, v in settings.items()])
        self._client.log_dict(identity, json.loads(json.dumps(dict(recipe), default=str)), "recipe.json")
        return identity

    def begin(self, kept_step: int) -> None:
        """Nothing: the run was opened when the tracker was made."""

    def write(self, record: Record) -> None:
        """The numbers as metrics, the texts as files."""
        step, now = int(record["step"]), int(time.time() * 1000)
        metrics = [
            self._metric(name, value, now, step)
            for name, value in figures(record).items()
            if (name, step) not in self._held
        ]
        if metrics:
            self._client.log_batch(self._id, metrics=metrics)
        if words := texts(record):
            name = f"{record['kind']}s/step-{step:08d}-{self._numbers.of(step)}.txt"
            self._client.log_text(self._id, words, name)

    def close(self, status: Status) -> None:
        """Set how the run ended."""
        ends = {"done": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, ends[status])


SINKS: dict[str, Callable[[Run, Mapping[str, Any], Talk], Sink]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
OFFLINE = {
    "wandb": "WANDB_MODE=offline writes to the run's folder",
    "mlflow": "without MLFLOW_TRACKING_URI it writes to the run's folder",
}
