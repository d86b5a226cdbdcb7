"""How many ranks a run should have now, and why: a pure function of who is there, what is known and elastic.policy.

Nothing is asked, waited for or carried out here. Who goes is decided in leavers.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ray_ep.config.schema import ElasticConfig

BACK = 0.7
"""A rank is given back where it brings less than this share of elastic.efficiency: what one figure added, a figure a
little worse does not take away again."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Who is there and who is on the way.

    Args:
        staying: ranks in the group, but for those that are to leave it.
        waiting, joining, ready: newcomers without room yet, with room, and built.
        target: ranks that the run should have by its configuration, or as somebody asked.
        pinned: somebody asked: the policy is not.
        missing_s: seconds for which there have been fewer than `target`, from the last loss or request on.
        free: more ranks that the cluster has room for now; None: not known.
        step_seconds: predicted, by number of ranks; empty: nothing is known yet.
    """

    staying: int
    target: int
    waiting: int = 0
    joining: int = 0
    ready: int = 0
    pinned: bool = False
    missing_s: float = 0.0
    free: int | None = None
    step_seconds: Mapping[int, float] = field(default_factory=dict)

    @property
    def placed(self) -> int:
        """Ranks that have room and stay: what the run has without asking for more."""
        return self.staying + self.joining + self.ready


@dataclass(frozen=True, slots=True)
class Wish:
    """How many ranks a run should have, and why."""

    ranks: int
    words: str


def wish(cfg: ElasticConfig, least: int, most: int, standing: Standing) -> Wish:
    """How many ranks the run should have: from elastic.min_ranks to `most`.

    Args:
        least: that a run is asked down to; a loss may have left fewer.
    """
    if standing.pinned or cfg.policy == "fixed":
        found = _kept(cfg, standing)
    elif cfg.policy == "available":
        found = _all_room(standing)
    else:
        found = _by_throughput(cfg, standing)
    floor = max(cfg.min_ranks, min(least, standing.staying))
    if found.ranks < floor:
        return replace(found, ranks=floor, words=f"at least {floor} are needed; {found.words}")
    if found.ranks > most:
        return replace(found, ranks=most, words=f"at most {most} are allowed; {found.words}")
    return found


def _kept(cfg: ElasticConfig, s: Standing) -> Wish:
    """The target, for as long as it may be waited for."""
    why = f"{s.target} were asked for" if s.pinned else f"the run has {s.target} (elastic.policy=fixed)"
    missing = s.target - s.placed
    if missing > 0 and s.missing_s >= cfg.wait_s:
        return Wish(s.placed, f"{why}, and {missing} had no room within elastic.wait_s={cfg.wait_s:g} s")
    return Wish(s.target, why)


def _all_room(s: Standing) -> Wish:
    """What the cluster has free, taken."""
    if s.free is None:
        return Wish(s.placed + s.waiting, "what the cluster has free is not known now (elastic.policy=available)")
    return Wish(s.placed + s.free, f"the cluster has room for {s.free} more (elastic.policy=available)")


def _by_throughput(cfg: ElasticConfig, s: Standing) -> Wish:
    """One fewer or one more, as the predicted step says.

    The last rank comes first: where it was measured to bring little, nobody is asked for on a promise.
    """
    n, steps = s.staying, s.step_seconds
    more, last = brings(steps, n + 1), brings(steps, n)
    if last is not None and last < BACK * cfg.efficiency:
        return Wish(
            n - 1,
            f"the last rank {_words(steps, n - 1, n, last)}, less than {BACK:g} times elastic.efficiency="
            f"{cfg.efficiency:g}",
        )
    if more is not None and more >= cfg.efficiency:
        return Wish(n + 1, f"one rank more {_words(steps, n, n + 1, more)}, elastic.efficiency={cfg.efficiency:g}")
    if more is None and last is None:
        return Wish(s.placed + s.waiting, "no step is predicted yet (elastic.policy=throughput)")
    return Wish(n, "neither a rank more nor one fewer should pay (elastic.policy=throughput)")


def brings(step_seconds: Mapping[int, float], ranks: int) -> float | None:
    """What the last of so many ranks brings, as a share of what each of the others does; None: not predicted.

    1: the step gets shorter as if all of it were shared; 0: not at all.
    """
    before, after = step_seconds.get(ranks - 1), step_seconds.get(ranks)
    if before is None or after is None or not after > 0:
        return None
    return (before / after - 1) * (ranks - 1)


def _words(steps: Mapping[int, float], before: int, after: int, share: float) -> str:
    return (
        f"should bring {share:.0%} of what a rank brings (step {1e3 * steps[before]:.3g} -> "
        f"{1e3 * steps[after]:.3g} ms)"
    )
