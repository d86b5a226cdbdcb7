"""The driver of a checked run: form the ranks, step, evaluate, save, stop. Draws nothing itself."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite
from typing import Any, Protocol

import numpy as np

from ray_ep.config.schema import Config
from ray_ep.driver.alarm import WINDOW, collapse
from ray_ep.driver.cluster import connected, starting, transports
from ray_ep.driver.interrupt import Interrupt, farewell
from ray_ep.driver.probe import measured
from ray_ep.driver.ranks import Ranks
from ray_ep.driver.reach import in_job_copy, try_nodes
from ray_ep.driver.rebalance.mover import Mover, check_survival, facts_of
from ray_ep.driver.saving import Saver, cause_of, what_is_lost, when
from ray_ep.driver.start import Plan
from ray_ep.errors import DivergedError
from ray_ep.moe import Balance, Choice
from ray_ep.placement import Placement, RoutingStatistics, Topology
from ray_ep.placement.links.groups import contradictions
from ray_ep.rank.clock import STEP_PHASES
from ray_ep.rank.results import StepResult
from ray_ep.rank.saved.directory import MANIFEST

JOB_COPY = (
    "lies in the job's own copy of its working directory, which Ray deletes with the job's files: give run_dir=/a/path "
    "that outlives the job"
)


class Listener(Protocol):
    """Who wants to know: the run directory, the progress display."""

    def start(self, description: str) -> None:
        """The ranks are ready."""

    def step(self, metrics: dict[str, Any]) -> None:
        """One step is done."""

    def event(self, kind: str, message: str) -> None:
        """Something happened that an operator should see."""


def drive(
    cfg: Config,
    plan: Plan,
    listeners: list[Listener],
    interrupt: Interrupt,
    phase: Callable[[str], None] = lambda name: None,
) -> str:
    """Run to the end or to an interruption; returns done or interrupted.

    Args:
        phase: told what a start is at; empty: it has ended.

    Raises:
        ClusterError: the cluster has no room, or its nodes cannot reach what the run needs; nothing was written.
        RankError: a rank failed; every process that was started is gone.
        DivergedError: a loss, gradient or weight is not finite; what was saved before stays the newest.
        SaveError: the last checkpoint could not be written.
    """
    interrupt.hold()
    plan.run.say = lambda message: _tell(listeners, "not-written", message)
    phase(starting(cfg.cluster))
    with connected(cfg.cluster, interrupt) as joined:
        interrupt.hold()
        if interrupt():
            raise KeyboardInterrupt
        phase(f"placing {cfg.cluster.ranks} ranks")
        name = f"ray_ep-{plan.run.path.name}-{time.time_ns() % 10**9}"
        ranks = Ranks(cfg.cluster, name, joined.local, interrupt)
        try:
            driver = Driver(cfg, plan, ranks, [plan.run, *listeners], interrupt, joined.words, phase)
            with driver.told():
                driver.form()
                return driver.run()
        finally:
            ranks.kill()


class Driver:
    """The steps of one run on formed ranks."""

    def __init__(
        self,
        cfg: Config,
        plan: Plan,
        ranks: Ranks,
        listeners: list[Listener],
        interrupt: Interrupt,
        ray: str = "a Ray",
        phase: Callable[[str], None] = lambda name: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.cfg, self.plan, self.ranks, self.listeners, self.interrupt = cfg, plan, ranks, listeners, interrupt
        self.ray, self.phase, self.clock = ray, phase, clock
        self.topology = ranks.topology()
        self.saver = Saver(cfg, plan, ranks, self._event, clock)
        self.done = 0  # optimizer steps behind us
        self.doing, self.began, self.last_s = "", 0.0, None  # what a signal finds; seconds of the last step
        self.earlier = plan.checkpoint.statistics() if plan.checkpoint else None  # counted before a resume
        self.loads: deque[np.ndarray] = deque(maxlen=WINDOW)
        self.alarms: dict[tuple[str, int], int] = {}  # step at which each was last true

    def form(self) -> None:
        """Join the groups, build or load the model, choose the exchange, write what is known now."""
        cfg, plan = self.cfg, self.plan
        reads = (("model.path", cfg.model.path),) if cfg.model.path else ()
        if plan.checkpoint is not None:
            reads = (*reads, ("resume", f"{plan.checkpoint.name}/{MANIFEST}"))
        try_nodes(self.ranks.call, self.ranks.where, self.saver.directory.url, reads)
        self.phase("connecting the ranks")
        ways = transports(cfg.exchange.transport, self.ranks.device, self.ranks.call("transports"))
        self.ranks.call("join", self.ranks.name, 0, cfg.cluster.collective_timeout_s, ways)
        if cfg.topology.measure and cfg.cluster.ranks > 1:
            self.phase("measuring the links")
            self.topology = measured(self.ranks, cfg.topology.budget_s)
        check_survival(cfg, self.topology, plan.placement)
        self.phase("loading the model" if cfg.model.path or plan.checkpoint else "building the model")
        self.ranks.build(cfg, plan.config, plan.corpus, plan.placement, self.topology)
        if plan.checkpoint is not None:
            self.ranks.call("load", plan.checkpoint.directory.url, plan.checkpoint.step)
            self.done = plan.run.done = plan.checkpoint.step
        self.phase("choosing the exchange")
        choice: Choice = self.ranks.call("choose_exchange", self.done)[0]
        facts = facts_of(cfg, plan.config, plan.expert_parameters, choice.kind)
        self.mover = Mover(cfg, plan.run, self.ranks, self.topology, plan.placement, facts, self._event)
        plan.run.create(cfg)
        plan.run.exchange(choice.to_dict())
        plan.run.topology(self.topology)
        plan.run.placement(plan.placement)
        self.phase("")
        for listener in self.listeners:
            listener.start(self._describe())
        for kind, message in plan.notes:
            self._event(kind, message)
        if in_job_copy(plan.run.path):
            self._event("run-dir", f"{plan.run.path.absolute()} {JOB_COPY}")
        for sentence in contradictions(self.topology) if cfg.topology.measure else []:
            self._event("topology", sentence)
        if plan.checkpoint is not None:
            self._event("resume", f"goes on from {plan.checkpoint.name}")
            before = plan.checkpoint.manifest.get("data")
            if before != plan.corpus.source:
                self._event("data-changed", f"trained on {before} until here, on {plan.corpus.source} from here")
        self._event("exchange", choice.words())

    def run(self) -> str:
        """Step until the end or an interruption, then save. Raises SaveError: the last checkpoint failed."""
        self.interrupt.tell = self._farewell
        self.saver.start()
        while self.done < self.cfg.optim.steps and not self.interrupt():
            self.step()
        self.doing = "saving"
        if self.interrupt():
            self._event("interrupted", f"saving after step {self.done}")
        statistics = self.statistics()
        self.plan.run.statistics(statistics)
        self.saver.finish(self.done, statistics)
        return "interrupted" if self.interrupt() else "done"

    def step(self) -> None:
        """One optimizer step on all ranks, and what is due after it; nothing, if a signal had it broken off."""
        self.doing, self.began = "step", self.clock()
        began = time.perf_counter()
        results: list[StepResult | None] = self.ranks.call("train_step", self.done)
        seconds = self.last_s = time.perf_counter() - began
        self.doing = ""
        if any(r is None for r in results):
            return
        self._after_step([r for r in results if r is not None], seconds)

    def _after_step(self, results: list[StepResult], seconds: float) -> None:
        self.done += 1
        if results[0].note:
            self._event("balance", results[0].note)
        if results[0].warning:
            self._event("random-draws", results[0].warning)
        metrics = step_metrics(self.done, results, seconds, self.topology, self.mover.placement)
        if not self.interrupt():
            metrics |= self.mover.after_step(self.done, results, seconds)
        if self._due(self.cfg.eval.every) and len(self.plan.corpus.held_out) and not self.interrupt():
            metrics |= self._evaluate()
        for listener in self.listeners:
            listener.step(metrics)
        self._watch(results[0].load)
        if self.done < self.cfg.optim.steps and self.saver.due(self.done) and not self.interrupt():
            self.doing = "saving"
            statistics = self.statistics()
            self.plan.run.statistics(statistics)
            self.saver.save_and_go_on(self.done, statistics)
            self.doing = ""

    def statistics(self) -> RoutingStatistics:
        """Routing statistics of all ranks, those before a resume included."""
        parts = self.ranks.call("statistics")
        parts = parts if self.earlier is None else [self.earlier, *parts]
        return RoutingStatistics.merge(parts, self.cfg.statistics.sample, self.cfg.seed)

    def _evaluate(self) -> dict[str, float]:
        """eval_loss; nothing if it is not a number, which is told, or if a signal had it broken off."""
        self.doing = "evaluation"
        answers = self.ranks.call("evaluate", True)
        self.doing = ""
        if any(a is None for a in answers):
            return {}
        self.plan.run.provenance(self.done, [trace for _, trace in answers])
        loss = float(answers[0][0])
        if isfinite(loss):
            return {"eval_loss": loss}
        self._event("evaluation", f"step {self.done}: the loss on the held-out split is {loss}: it is not drawn")
        return {}

    def _farewell(self, name: str) -> None:
        """A signal has come: say at once what follows, and have the ranks leave what can be left."""
        self.ranks.stop()
        doing, left, done = "", None, self.done
        if self.doing == "step":
            passes, left = self.cfg.batch.accumulation, self.last_s
            done, doing = done + 1, f"step {done + 1} is finished first"
            if passes > 1:
                done, doing = done - 1, f"step {done} is broken off at its next pass"
            if left is not None:
                left = left / passes if passes > 1 else left - (self.clock() - self.began)
        elif self.doing == "evaluation":
            doing = "the evaluation is broken off at its next part"
        elif self.doing == "saving":
            doing = f"the checkpoint of step {done} is finished first"
        self._event("signal", farewell(name, doing, left, self.saver.ahead(done)))

    @contextmanager
    def told(self) -> Iterator[None]:
        """Inside: an error becomes an event of the run, if it has begun, and names the command that goes on."""
        try:
            yield
        except Exception as e:
            if not self.plan.run.begun:
                raise
            lost = what_is_lost(str(self.plan.run.path), self.saver.saved, self.done)
            kind = "diverged" if isinstance(e, DivergedError) else "failed"
            self.plan.run.event(kind, f"{cause_of(e)}, after step {self.done}; {lost}")
            e.__notes__ = [*getattr(e, "__notes__", ()), lost]  # as add_note of Python 3.11
            raise
        except KeyboardInterrupt:
            if self.plan.run.begun:
                lost = what_is_lost(str(self.plan.run.path), self.saver.saved, self.done)
                self._event("interrupted", f"stopped at once after step {self.done}; {lost}")
            raise

    def _watch(self, load: np.ndarray) -> None:
        """Warn once when routing collapses, and again only after it had recovered for as long as a window."""
        self.loads.append(load)
        if len(self.loads) < WINDOW:
            return
        found = collapse(np.sum(self.loads, axis=0), self.cfg.router)
        for key, message in found.items():
            if key not in self.alarms or self.done - self.alarms[key] > WINDOW:
                self._event("routing-collapse", f"step {self.done}: {message}")
            self.alarms[key] = self.done

    def _due(self, every: int) -> bool:
        return bool(every) and (self.done % every == 0 or self.done == self.cfg.optim.steps)

    def _event(self, kind: str, message: str) -> None:
        self.plan.run.done = self.done
        _tell(self.listeners, kind, message)

    def _describe(self) -> str:
        experts, layers = self.plan.placement.num_experts, self.plan.placement.num_layers
        nodes = len(set(self.topology.node_of.tolist()))
        parameters = sum(int(np.prod(s)) for s in self.plan.signature.values())
        return (
            f"{self.plan.config.model_type}, {parameters / 1e6:.1f}M parameters, {layers} MoE layers x {experts} "
            f"experts on {self.cfg.cluster.ranks} ranks of {nodes} node(s); {self.plan.corpus.source}; "
            f"on {self.ray}; {when(self.cfg.checkpoint)}; run in {self.plan.run.path.absolute()}"
        )


def _tell(listeners: list[Listener], kind: str, message: str) -> None:
    for listener in listeners:
        listener.event(kind, message)


def step_metrics(
    step: int, results: list[StepResult], seconds: float, topology: Topology, placement: Placement
) -> dict[str, Any]:
    """One line of metrics.jsonl. Exchange and expert seconds are means over ranks; waiting for peers is exchange.

    Imbalance is the slowest rank's load over the mean, by layer and pass. What balance saved is predicted net of
    guests' weights, and measured as the tokens that the slowest rank was spared at the step's own time a token.
    """
    first = results[0]
    sent = np.stack([r.usage.sent for r in results])  # [R, R] bytes
    same = topology.node_of[:, None] == topology.node_of[None]
    pairs = np.stack([r.usage.pairs for r in results]).astype(np.float64)  # [R, L]
    mean, most = pairs.mean(0), pairs.max(0)  # [L]; a layer without pairs is even
    balancedness = float(np.divide(mean, most, out=np.ones_like(mean), where=most > 0).mean())
    load = first.load.astype(np.float64)
    experts = float(np.mean([r.usage.expert_seconds for r in results]))
    balance = Balance(*first.usage.balance)
    layers = max(balance.layers, 1)
    return {
        "step": step,
        "loss": first.loss,
        "grad_norm": first.grad_norm,
        "lr": first.lr,
        "tokens": first.tokens,
        "step_seconds": seconds,
        "tokens_per_second": first.tokens / seconds,
        "exchange_seconds": float(np.mean([r.usage.exchange_seconds for r in results])),
        "expert_seconds": experts,
        "phase_seconds": _phases(results, seconds),
        "peak_mib": max(r.peak_mib for r in results),
        "statistics_seconds": float(np.mean([r.usage.statistics_seconds for r in results])),
        "bytes_intra_node": int(sent[same].sum()),
        "bytes_inter_node": int(sent[~same].sum()),
        "balancedness": balancedness,
        "world_size": len(results),
        "epoch": 0,
        "placement_version": placement.version,
        "aux_loss": first.aux_loss,
        "z_loss": first.z_loss,
        "imbalance_before": balance.before / layers if balance.layers else 1 / balancedness,
        "imbalance_after": balance.after / layers if balance.layers else 1 / balancedness,
        "guests": int(balance.guests),
        "guest_bytes": int(balance.guest_bytes),
        "balance_saved_predicted": float(balance.saved_seconds),
        "balance_saved_measured": float(balance.moved_pairs * experts / max(mean.sum(), 1)),
        "max_expert_load": (load.max(1) / np.maximum(load.mean(1), 1e-9)).round(4).tolist(),
    }


def _phases(results: list[StepResult], seconds: float) -> dict[str, float]:
    """Where a step of `seconds` went: means over ranks, and `driver`, what it took beyond them."""
    mean = np.mean([r.usage.phases for r in results], 0).tolist()
    return {**dict(zip(STEP_PHASES, mean, strict=True)), "driver": seconds - sum(mean)}
