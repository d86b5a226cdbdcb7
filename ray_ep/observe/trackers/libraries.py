"""TensorBoard, MLflow and Weights & Biases: figures of each step and the configuration, each by its own library."""

from __future__ import annotations

from typing import Any

from ray_ep.driver.records import Event, StepRecord
from ray_ep.observe.trackers.told import Told, figures, flat


class TensorBoard:
    """Files under `run_dir`/tensorboard; events are among the texts."""

    def __init__(self, told: Told):
        self._dir = told.run_dir / "tensorboard"
        self._writer = self._opened(told.start.step + 1)
        self._last = told.start.step

    def _opened(self, first: int) -> Any:
        """A writer of steps from `first` on: without purge_step, those that are made again would be drawn twice."""
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(self._dir), purge_step=first)
        return writer

    def step(self, record: StepRecord) -> None:
        """Figures of one step."""
        if record.step <= self._last:  # survivors of a loss have gone back
            self._writer.close()
            self._writer = self._opened(record.step)
        self._last = record.step
        for name, value in figures(record).items():
            self._writer.add_scalar(name, value, record.step, record.at.timestamp())

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

        self._metric, self._param, self._client = Metric, Param, MlflowClient()
        self._id = self._known(told) or self._new(told)

    def _known(self, told: Told) -> str | None:
        """The run that this one goes on with; None: it is new, or was deleted there, or that is another server."""
        from mlflow.exceptions import MlflowException

        run_id = told.known("mlflow")
        if run_id is None:
            return None
        try:
            if self._client.get_run(run_id).info.lifecycle_stage != "active":
                return None
        except MlflowException as e:
            if e.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        self._client.update_run(run_id, status="RUNNING")
        return run_id

    def _new(self, told: Told) -> str:
        """A run of the experiment, which is made where there is none."""
        found = self._client.get_experiment_by_name(told.project)
        experiment = found.experiment_id if found else self._client.create_experiment(told.project)
        run_id: str = self._client.create_run(experiment, run_name=told.run_dir.name).info.run_id
        told.keep("mlflow", run_id)
        params = [self._param(key, str(value)[:500]) for key, value in flat(told.config).items()]
        for start in range(0, len(params), 100):  # most that one call may bring
            self._client.log_batch(run_id, params=params[start : start + 100])
        return run_id

    def step(self, record: StepRecord) -> None:
        """Figures of one step."""
        at = int(record.at.timestamp() * 1000)
        metrics = [self._metric(name, value, at, record.step) for name, value in figures(record).items()]
        self._client.log_batch(self._id, metrics)

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

    def step(self, record: StepRecord) -> None:
        """Figures of one step."""
        self._run.log({**figures(record), "step": record.step})

    def event(self, event: Event) -> None:
        """Events are not sent: each would need a table of its own."""

    def close(self, status: str) -> None:
        """The run has ended."""
        self._run.finish(exit_code=int(status == "failed"))
