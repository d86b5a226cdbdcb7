"""Ranks that do at once what they are asked, with the methods of `driver.actors.ranks.Ranks`; a listener that keeps."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
from transformers import AutoConfig

from ray_ep.collective import Membership
from ray_ep.config import load_config
from ray_ep.driver.actors.newcomers import Stage
from ray_ep.driver.loop import Driver
from ray_ep.driver.publisher import Publisher
from ray_ep.driver.recovery.decide import Survivor
from ray_ep.driver.requests import Requests
from ray_ep.driver.run.rundir import RunDir
from ray_ep.moe import Choice
from ray_ep.placement import contiguous
from ray_ep.rank.pretrained.reading import Read
from ray_ep.rank.results import RankState, StepResult, Usage
from ray_ep.rank.snapshot.copies import Key
from ray_ep.rank.snapshot.snapshots import Held
from ray_ep.rank.step.clock import STEP_PHASES
from tests.driver.scenes import EXPERTS, LAYERS, RANKS, statistics, step, tokens, topology

CHOICE = Choice("flat", "gloo", True, 0, 512, True, 0.0, [])


def results(load=None, sent=0, exchange=(0.01, 0.03), size=RANKS):
    """Of each rank what it says of a step."""
    s = step(load=load, sent=sent)
    usage = [
        Usage(
            0.2,
            exchange[r % 2],
            s.experts[r % 2],
            0.0,
            np.resize(s.sent[r % 2], size),
            s.pairs[r % 2],
            np.zeros(7),
            np.zeros(len(STEP_PHASES)),
        )
        for r in range(size)
    ]
    return [StepResult(0, 0, 1.0, 0.0, 0.0, 0.0, 0.0, 1024, s.load, u) for u in usage]


class FakeNewcomers:
    """Ranks that are ready at the next poll once there is room, on the node with the number `node`."""

    def __init__(self):
        self.coming, self.room, self.prepare, self.node = [], 0, None, 0

    def count(self, *stages):
        ready = min(self.room, len(self.coming))
        return ready * (Stage.READY in stages) + (len(self.coming) - ready) * (Stage.WAITING in stages)

    def withdraw(self, count=None):
        left = len(self.coming) - (len(self.coming) if count is None else count)
        self.coming = self.coming[:left]

    def poll(self):
        return []

    def take(self):
        ready, self.coming = self.coming[: self.room], self.coming[self.room :]
        return [SimpleNamespace(member=m, where={"node": "a", "host": "alpha"}) for m in ready]


class FakeRanks:
    """Ranks on one host.

    Attributes:
        calls: names of what was called, in order.
        meanwhile: {(name, n-th time): function} of what happens while that call is under way; what it returns that is
            not None is the call's answer.
        look: called in every call, as a wait does between its slices.
    """

    device, note, name = "cpu", "", "fake"

    def __init__(self, links=None, look=bool, size=RANKS):
        self.calls, self.meanwhile, self.links, self.look = [], {}, links or topology(node_of=(0,) * size), look
        self.counts = Counter()
        self.membership = Membership(0, tuple(f"m{r}" for r in range(size)), tuple(self.links.node_of.tolist()))
        self.where = [{"node": "a", "host": "alpha"} for _ in range(size)]
        self.newcomers, self.made = FakeNewcomers(), size
        self.updates = 0
        self.kept = []  # keys of the snapshots that were taken

    def _answer(self, method, answer=None):
        self.calls.append(method)
        self.counts[method] += 1
        said = self.meanwhile.pop((method, self.counts[method]), lambda: None)()
        self.look()
        return answer if said is None else said

    def topology(self):
        return self.links

    def lose(self, lost, come=()):
        self._answer("lose")
        nodes = {n.member: self.newcomers.node for n in come}
        self.membership = self.membership.next([self.membership.members[r] for r in lost], nodes)
        self.where = [w for r, w in enumerate(self.where) if r not in lost] + [n.where for n in come]

    def ask(self, count):
        self._answer("ask")
        self.newcomers.coming += [f"m{self.made + i}" for i in range(count)]
        self.made += count

    def avoid(self, nodes):
        self._answer("avoid")

    def room(self):
        return {}

    def bequeath(self, leave, heir):
        self._answer("bequeath")

    def end_snapshot(self):
        self._answer("end_snapshot")

    def states(self):
        """As of ranks that keep one another's snapshots."""
        held = Held(tuple(self.kept), {r: tuple(self.kept) for r in range(8)})
        state = RankState(self.updates, None, False, False)
        return self._answer("states", {m: Survivor(state, held) for m in self.membership.members})

    def settle(self, finish):
        self._answer("settle")

    def publish(self):
        self._answer("publish")

    def regroup(self, placement, topology, fresh=()):
        self._answer("regroup")

    def restore(self, to):
        self.updates = to.key.step
        self._answer("restore")

    def snapshot(self, step, shelf):
        self.kept.append(Key(self.membership.epoch, step))
        return self._answer("snapshot", "")

    def reach(self, trial):
        return self._answer("reach", [trial.on_rank(r) for r in range(RANKS)])

    def transports(self):
        return self._answer("transports", [["gloo"]] * RANKS)

    def join(self, timeout_s, transports, snapshots=False, limit_s=60.0):
        assert self.membership.size == 1 or "memory" not in transports, "a rank's own memory carries nothing to others"
        self._answer("join")

    def probe(self, node_of, budget_s):
        return self._answer("probe", self.links)

    def probe_links(self, known, pairs, budget_s):
        return self._answer("probe_links", self.links)

    def gpu_links(self):
        return self._answer("gpu_links", [None] * RANKS)

    def build(self, cfg, config, corpus, placement, topology):
        self._answer("build")

    def reads(self):
        return [Read(8_000_000, 8_000_000, 2.0) for _ in range(2)]

    def load(self, url, step):
        self._answer("load")

    def choose_exchange(self, step):
        return self._answer("choose_exchange", CHOICE)

    def train_step(self, step):
        answer = self._answer("train_step", results(size=self.membership.size))
        self.updates += answer != "left"
        return None if answer == "left" else answer

    def evaluate(self):
        answer = self._answer("evaluate", (2.0, [[], []]))
        return None if answer == "left" else answer

    def save(self, url, step):
        return self._answer("save", [{}] * RANKS)

    def statistics(self):
        return self._answer("statistics", [statistics()] * RANKS)

    def sample(self):
        return self._answer("sample", tokens(True))

    def migrate(self, placement, buffer_mb):
        self._answer("migrate")

    def beat(self):
        self._answer("beat")

    def stop(self):
        self.calls.append("stop")


class Ear:
    """A listener that keeps what it hears, in order."""

    def __init__(self):
        self.heard = []

    def start(self, event):
        self.heard.append(event)

    def step(self, record):
        self.heard.append(record)

    def event(self, event):
        self.heard.append(event)

    def steps(self):
        """Records of the steps."""
        return [x for x in self.heard if hasattr(x, "loss")]

    def words(self, kind):
        """What was said of one kind."""
        return [x.words for x in self.heard if getattr(x, "kind", "") == kind]


def driven(path, *overrides, listeners=(), look=bool, links=None, size=RANKS, control=None):
    """A driver of a run in `path` on fake ranks that have not formed, with all that it was made of.

    Args:
        control: makes a listener of the configuration, the run, its requests and who tells an operator.
    """
    own = ["optim.steps=5", "eval.every=2", "topology.measure=false", "balance.in_step=off", f"cluster.ranks={size}"]
    cfg = load_config(None, [f"run_dir={path}", *own, *overrides])
    run, ear, ranks = RunDir(path), Ear(), FakeRanks(links, look, size)
    plan = SimpleNamespace(
        run=run, corpus=SimpleNamespace(source="a text", held_out=[1]), config=AutoConfig.for_model("qwen3_moe"),
        placement=contiguous(LAYERS, EXPERTS, size), signature={"w": [4]}, checkpoint=None, expert_parameters=1000,
        frozen=(), base=frozenset(), notes=(),
    )  # fmt: skip
    requests = Requests(look)
    if control is not None:
        listeners = (*listeners, control(cfg, run, requests, lambda event: publisher.event(event)))
    publisher = Publisher([run, ear, *listeners])
    driver = Driver(cfg, plan, ranks, publisher, requests)
    return SimpleNamespace(
        driver=driver, ranks=ranks, ear=ear, run=run, publisher=publisher, requests=requests, path=path
    )
