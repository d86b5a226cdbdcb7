"""`ray-ep bench options`: what options cost a run, or bring it: `ray-ep train` beside itself with other options.

Runs take turns, each in fresh processes, every other round backwards. What counts is the time from one step's record to
the next, so that whatever an option does between two steps or beside them is in it. CPUs and GPUs.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import chain
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ray_ep.bench.own_run import own_run
from ray_ep.config import from_dict, load_config
from ray_ep.config.schema import Config
from ray_ep.driver.start import check_run
from ray_ep.errors import BadInput

WARM = 20
"""First steps that do not count: a run tries there whether balance inside the step pays."""
WINDOW = 10
"""Steps whose mean is one figure: snapshots are taken as often by default."""
AS_IT_IS = "as it is"
"""Name of the run without the options."""

_GIVEN = {"run_dir": "", "resume": "no"}  # the bench's own to set: its runs start anew and leave nothing


@dataclass(frozen=True, slots=True)
class OptionsCase:
    """What is compared.

    Args:
        runs: the configuration of each run by its options; the first is AS_IT_IS. steps: that count, of each run.
        rounds: turns of each.
    """

    runs: dict[str, Config]
    steps: int
    rounds: int


@dataclass(slots=True)
class OptionsResult:
    """Mean seconds of a step in each window of WINDOW steps, [round][window], by the run's options."""

    case: OptionsCase
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)

    def step_seconds(self, name: str) -> float:
        """The median of all windows."""
        return statistics.median(chain(*self.seconds[name]))

    def ratio(self, name: str) -> float:
        """Seconds of a step with these options over those without, by the medians of all windows."""
        return self.step_seconds(name) / self.step_seconds(AS_IT_IS)

    def undisturbed(self, name: str) -> float:
        """The same by their lower quartiles: what else the machine does makes windows longer, never shorter."""
        quartile = [statistics.quantiles([*chain(*self.seconds[n])], n=4)[0] for n in (name, AS_IT_IS)]
        return quartile[0] / quartile[1]

    def ratios(self, name: str) -> list[float]:
        """The ratio of each round."""
        mine, base = ([statistics.median(r) for r in self.seconds[n]] for n in (name, AS_IT_IS))
        return [m / b for m, b in zip(mine, base, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        rows = {
            name: {
                "step_ms": self.step_seconds(name) * 1e3,
                "ratio": self.ratio(name),
                "ratio_quartile": self.undisturbed(name),
                "ratios": self.ratios(name),
                "windows_ms": [[s * 1e3 for s in r] for r in rounds],
            }
            for name, rounds in self.seconds.items()
        }
        return {"steps": self.case.steps, "rounds": self.case.rounds, "runs": rows}

    def lines(self) -> Iterator[str]:
        """The table."""
        wide = max(map(len, self.seconds))
        yield f"{'options':{wide}} {'ms a step':>10} {'ratio':>7} {'quartile':>9}  of each round"
        for name in self.seconds:
            each = " ".join(f"{r:.3f}" for r in self.ratios(name))
            step, ratio, least = self.step_seconds(name) * 1e3, self.ratio(name), self.undisturbed(name)
            yield f"{name:{wide}} {step:10.1f} {ratio:7.3f} {least:9.3f}  {each}"
        yield f"ms a step: medians of windows of {WINDOW} steps, with all between two steps; ratio: over the run"
        yield f"{AS_IT_IS}; quartile: the same by lower quartiles, on which other work of the machine weighs less"


def options_case(
    config: str | None, overrides: Sequence[str], others: Sequence[str], steps: int = 200, rounds: int = 4
) -> OptionsCase:
    """What to compare, checked as far as can be without starting anything.

    Args:
        config, overrides: of the run as it is. others: options of the other runs, each one or several overrides with
            spaces between them, such as "observe.page=false control.enabled=false".

    Raises:
        BadInput: no options, the same ones twice, options of the bench's own, or whatever a run would refuse.
    """
    if not others:
        raise BadInput("bench options: give --try OPTIONS at least once, such as --try snapshot.every=0")
    runs: dict[str, Config] = {}
    for name in (AS_IT_IS, *(" ".join(other.split()) for other in others)):
        if name in runs:
            raise BadInput(f"bench options: --try {name!r} is given twice")
        cfg = load_config(config, [*overrides, *([] if name == AS_IT_IS else name.split())])
        for key, value in _GIVEN.items():
            given = OmegaConf.select(OmegaConf.structured(cfg), key)
            if given != value:
                raise BadInput(f"bench options: {key}={given}: leave it out: its runs start anew and leave nothing")
        runs[name] = cfg
        with tempfile.TemporaryDirectory() as tmp:
            check_run(_timed(cfg, tmp, steps), datetime.now()).run.release()  # it begins elsewhere
    return OptionsCase(runs, steps, rounds)


def run_options(case: OptionsCase, say: Callable[[str], None] = lambda words: None) -> OptionsResult:
    """Measure; blocks for minutes. Leaves nothing behind.

    Args:
        say: told what is under way.

    Raises:
        BadInput, RayEPError: a run was refused, or failed.
    """
    result = OptionsResult(case, {name: [] for name in case.runs})
    for number in range(case.rounds):
        for name in list(case.runs)[:: 1 if number % 2 == 0 else -1]:
            say(f"round {number + 1} of {case.rounds}: {name}")
            with tempfile.TemporaryDirectory(prefix="ray-ep-bench-") as tmp:
                OmegaConf.save(_timed(case.runs[name], tmp, case.steps), f"{tmp}/config.yaml")
                result.seconds[name].append(own_run(Path(tmp, "config.yaml"), "bench options").seconds(WARM, WINDOW))
    return result


def _timed(cfg: Config, tmp: str, steps: int) -> Config:
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.structured(cfg))  # type: ignore[assignment]
    tree["run_dir"] = f"{tmp}/run"
    tree["optim"]["steps"] = WARM + steps
    return from_dict(tree)
