"""Cases and rows of `ray-ep bench train`: what is measured, and what came out, as figures and as text."""

from __future__ import annotations

import statistics
import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

from ray_ep.bench.trainers import TRAINERS
from ray_ep.config.schema import Config

TRAIN_PEERS = tuple(TRAINERS)
"""Names of the contenders of `bench train` beside ours."""

OURS = "ray_ep"
"""Name of our contender in figures and tables."""


@dataclass(frozen=True, slots=True)
class TrainCase:
    """One row: what to train, and how often."""

    model: str  # of train.MODELS, or train.OWN_MODEL
    cfg: Config  # with dtype and ranks of the case
    peers: tuple[str, ...]
    steps: int  # that count, of each contender in each round
    rounds: int
    malloc: str  # of peers; tuned: as ranks have it

    @property
    def dtype(self) -> str:
        """Of the weights."""
        return self.cfg.model.dtype

    @property
    def ranks(self) -> int:
        """Processes of a contender, each with one thread; plain is one process with as many threads."""
        return self.cfg.cluster.ranks


@dataclass(slots=True)
class TrainResult:
    """What the rounds of one case gave. Contenders that failed are in `failed` alone.

    Attributes:
        seconds: of each counted step, [round][step], by contender.
        losses: of all steps of the first round; ray_ep's without its router losses.
        peak_mib: of the largest process, the largest of the rounds; ray_ep: of the largest rank.
        phases: seconds of ray_ep's counted steps by phase, as its metrics name them.
        failed: why, by contender.
    """

    case: TrainCase
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    peak_mib: dict[str, int] = field(default_factory=dict)
    phases: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Of one step, over all ranks."""
        return int(self.case.cfg.batch.sequences * self.case.cfg.batch.length)

    @property
    def step_seconds(self) -> dict[str, float]:
        """Medians over steps, then over rounds, by contender."""
        return {name: statistics.median(rounds) for name, rounds in self._medians().items()}

    @property
    def tokens_per_second(self) -> dict[str, float]:
        """By contender."""
        return {name: self.tokens / s for name, s in self.step_seconds.items()}

    @property
    def best(self) -> str | None:
        """The fastest peer."""
        peers = {n: s for n, s in self.step_seconds.items() if n != OURS}
        return min(peers, key=lambda n: peers[n]) if peers else None

    def ratio(self, peer: str | None) -> float | None:
        """Our tokens/s over a peer's: the median of the ratios within a round."""
        medians = self._medians()
        if peer is None or peer not in medians:
            return None
        return statistics.median(p / o for p, o in zip(medians[peer], medians[OURS], strict=True))

    @property
    def phase_ms(self) -> dict[str, float]:
        """Median milliseconds of ray_ep's phases."""
        return {name: statistics.median(s) * 1e3 for name, s in self.phases.items()}

    def to_dict(self) -> dict[str, Any]:
        """For --json."""
        case, own = self.case, asdict(self)
        for key in ("case", "seconds", "phases"):
            del own[key]
        settings = {k: getattr(case, k) for k in ("model", "dtype", "ranks", "steps", "rounds", "malloc")}
        return {
            **settings,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "best": self.best,
            "ratio_best": self.ratio(self.best),
            "ratio_transformers": self.ratio("transformers"),
            "step_ms": {n: s * 1e3 for n, s in self.step_seconds.items()},
            "rounds_ms": {n: [[s * 1e3 for s in r] for r in rounds] for n, rounds in self.seconds.items()},
            "phase_ms": self.phase_ms,
            **own,
        }

    def lines(self) -> str:
        """The case in the table: speeds and ratios, peak memory, the phases of our step, and why a peer is missing."""
        case, speed = self.case, self.tokens_per_second
        what = f"{case.model:6} {case.dtype:8} {case.ranks:5}"
        ratios = (self.ratio(self.best), self.ratio("transformers"))
        lines = [
            f"{what}  tokens/s {_cells(speed)} {' '.join(f'{_number(r, 2):>9}' for r in ratios)}",
            f"{'':{len(what)}}  peak MiB {_cells(self.peak_mib)}",
        ]
        if self.phases:
            whole = self.step_seconds[OURS] * 1e3
            spent = ", ".join(f"{name} {ms:.1f} ({ms / whole:.1%})" for name, ms in self.phase_ms.items())
            lines.append(
                textwrap.fill(f"a step of ray_ep, ms: {spent}", 118, initial_indent="  ", subsequent_indent="    ")
            )
        lines += [f"  {name}: {why}" for name, why in self.failed.items()]
        return "\n".join(lines)

    def _medians(self) -> dict[str, list[float]]:
        return {n: [statistics.median(r) for r in rounds] for n, rounds in self.seconds.items()}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _cells(figures: dict[str, Any]) -> str:
    return " ".join(f"{_number(figures.get(n), 0):>12}" for n in (OURS, *TRAIN_PEERS))


TITLE = (
    f"{'model':6} {'dtype':8} {'ranks':>5}  {'':8} {' '.join(f'{n:>12}' for n in ('ray_ep', *TRAIN_PEERS))} "
    f"{'/ best':>9} {'/ transf.':>9}\n"
    "/ best: ray_ep's tokens/s over the fastest peer's, / transf.: over transformers'; medians over rounds"
)
"""Head of the table."""
