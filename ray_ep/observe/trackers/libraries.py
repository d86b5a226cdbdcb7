"""TensorBoard, MLflow and Weights & Biases: figures of each step and the configuration, each by its own library.

A tracker is a listener of the run (driver/publisher.py). Its library is an extra of the package, looked for before
anything starts and loaded when the run has begun. Where it sends to is set as that library says, by its own variables.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf

from ray_ep.config.schema import Config
from ray_ep.driver.ending import STATUS
from ray_ep.driver.records import Event, StepRecord
from ray_ep.errors import BadInput

IDS = "tracking.json"
"""File of the run directory: what the run is called there, so that it goes on with the same one after `resume=auto`."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a tracker is made with.

    Args:
        project: experiment or project that the run belongs to.
        run_dir: the run's; its last part is its name. config: plain, as config.yaml has it.
        first: the first step that will be told.
    """

    project: str
    run_dir: Path
    config: dict[str, Any]
    first: int

    def known(self, tracker: str) -> str | None:
        """The id of this run at a tracker, if it has one."""
        return self._ids().get(tracker)

    def keep(self, tracker: str, run_id: str) -> None:
        """Remember the id."""
        (self.run_dir / IDS).write_text(json.dumps({**self._ids(), tracker: run_id}), encoding="utf-8")

    def _ids(self) -> dict[str, str]:
        try:
            ids: dict[str, str] = json.loads((self.run_dir / IDS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return ids


class TensorBoard:
    """Files under `run_dir`/tensorboard; events are among the texts."""

    def __init__(self, told: Told):
        from torch.utils.tensorboard import SummaryWriter

        # without purge_step, steps that are made again would be drawn twice
        self._writer: Any = SummaryWriter(str(told.run_dir / "tensorboard"), purge_step=told.first)

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of one step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def event(self, event: Event) -> None:
        """One event."""
        self._writer.add_text(f"events/{event.kind}", event.words, event.step)

    def close(self, status: str) -> None:
        """The run has ended."""
        self._writer.close()


class MLflow:
    """A run of the experiment `project`, where MLFLOW_TRACKING_URI says; parameters are the configuration's keys."""

    def __init__(self, told: Told):
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric, self._client = Metric, MlflowClient()
        run_id = told.known("mlflow")
        if run_id is None:
            found = self._client.get_experiment_by_name(told.project)
            experiment = found.experiment_id if found else self._client.create_experiment(told.project)
            run_id = self._client.create_run(experiment, run_name=told.run_dir.name).info.run_id
            told.keep("mlflow", run_id)
            params = [Param(key, str(value)[:500]) for key, value in flat(told.config).items()]
            for start in range(0, len(params), 100):  # most that one call may bring
                self._client.log_batch(run_id, params=params[start : start + 100])
        else:
            self._client.update_run(run_id, status="RUNNING")
        self._id = run_id

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of one step."""
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [self._metric(name, value, now, step) for name, value in figures.items()])

    def event(self, event: Event) -> None:
        """MLflow has no place for events."""

    def close(self, status: str) -> None:
        """The run has ended."""
        ends = {"done": "FINISHED", "interrupted": "KILLED"}
        self._client.set_terminated(self._id, ends.get(status, "FAILED"))


class WandB:
    """A run of the project, where WANDB_MODE and the login say; files of the library lie in the run directory."""

    def __init__(self, told: Told):
        import wandb

        run_id = told.known("wandb")
        self._run: Any = wandb.init(
            project=told.project, name=told.run_dir.name, id=run_id, config=told.config, dir=str(told.run_dir),
            resume="allow" if run_id else None,
        )  # fmt: skip
        told.keep("wandb", self._run.id)
        self._run.define_metric("*", step_metric="step")  # its own count refuses a step that is made again

    def step(self, step: int, figures: dict[str, float]) -> None:
        """Figures of one step."""
        self._run.log({**figures, "step": step})

    def event(self, event: Event) -> None:
        """Events are not sent: each would need a table of its own."""

    def close(self, status: str) -> None:
        """The run has ended."""
        self._run.finish(exit_code=int(status == "failed"))


TRACKERS: dict[str, tuple[str, Callable[[Told], Any]]] = {
    "tensorboard": ("tensorboard", TensorBoard),
    "mlflow": ("mlflow", MLflow),
    "wandb": ("wandb", WandB),
}
"""{name, which is that of the extra, too: (module that must be there, tracker)}."""


class Tracked:
    """A listener that hands what it hears to one tracker, from the start of the run on."""

    def __init__(self, name: str, cfg: Config, run_dir: Path):
        self._name, self._cfg, self._run_dir = name, cfg, run_dir
        self._tracker: Any = None
        self._status = ""  # as an event says how it ended

    def __enter__(self) -> Tracked:
        """Nothing is loaded yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """What is left is written."""
        if self._tracker is not None:
            self._tracker.close(self._status or ("failed" if kind else "done"))

    def start(self, event: Event) -> None:
        """The run begins, or goes on."""
        config: Any = OmegaConf.to_container(self._cfg)
        told = Told(self._cfg.tracking.project, self._run_dir, config, event.step + 1)
        self._tracker = TRACKERS[self._name][1](told)

    def step(self, record: StepRecord) -> None:
        """One step is done."""
        if self._tracker is not None:
            self._tracker.step(record.step, figures(record))

    def event(self, event: Event) -> None:
        """Something happened."""
        self._status = STATUS.get(event.kind, self._status)
        if self._tracker is not None:
            self._tracker.event(event)


def check_trackers(cfg: Config) -> None:
    """Whether each library is there; raises BadInput."""
    for name in cfg.tracking.to:
        if name not in TRACKERS:
            raise BadInput(f"tracking.to={name}: expected {', '.join(TRACKERS)}")
        if find_spec(TRACKERS[name][0]) is None:
            raise BadInput(f"tracking.to={name}: it is not installed: pip install 'ray_ep[{name}]'")


@contextmanager
def trackers(cfg: Config, run_dir: Path) -> Iterator[list[Tracked]]:
    """Listeners for all that `tracking.to` names; closed at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(Tracked(name, cfg, run_dir)) for name in dict.fromkeys(cfg.tracking.to)]


def figures(record: StepRecord) -> dict[str, float]:
    """Numbers of a step by name, as metrics.jsonl has them; those of a list by its place, of a mapping by its key."""
    line = record.line()
    del line["step"]
    return {name: float(value) for name, value in flat(line, "/").items() if isinstance(value, int | float)}


def flat(tree: dict[str, Any], between: str = ".") -> dict[str, Any]:
    """{path: value} of what is in mappings and lists of mappings' values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{key}{between}{k}": v for k, v in flat(value, between).items()}
        elif isinstance(value, list) and between == "/":
            found |= {f"{key}{between}{place}": v for place, v in enumerate(value)}
        else:
            found[key] = value
    return found
