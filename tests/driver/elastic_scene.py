"""Members of a run that are no processes, and newcomers that come when the test gives them room."""

from types import SimpleNamespace

from ray_ep.collective import Membership
from ray_ep.config import load_config
from ray_ep.driver.elastic.around import Signs
from ray_ep.driver.elastic.elastic import Elastic
from ray_ep.driver.requests import Request, RequestKind
from tests.driver.fakes import results
from tests.driver.scenes import EXPERTS, Clock, question, statistics

NOW = SimpleNamespace(placement=SimpleNamespace(version=0))


class FakeResizer:
    """Newcomers that have room as `room` says, and are ready one poll after that; the switch is of membership alone."""

    def __init__(self, ranks):
        self.ranks, self.room, self.waiting, self.joining, self.ready = ranks, 0, 0, 0, 0
        self.calls, self.avoided, self.refuse = [], (), None
        self.made, self.took = len(ranks.where), {"regroup": 0.5}

    def ask(self, count):
        self.calls.append(("ask", count))
        self.waiting += count

    def avoid(self, nodes):
        self.avoided = tuple(nodes)

    def withdraw(self, count=None):
        self.calls.append(("withdraw", count))
        for stage in ("waiting", "joining", "ready"):
            some = min(count, getattr(self, stage))
            setattr(self, stage, getattr(self, stage) - some)
            count -= some

    def poll(self):
        self.ready, self.joining = self.ready + self.joining, 0
        some = min(self.room, self.waiting)
        self.room, self.waiting, self.joining = self.room - some, self.waiting - some, some

    def switch(self, now, leave, load):
        if self.refuse is not None:
            raise self.refuse
        self.calls.append(("switch", tuple(leave), self.ready))
        come = [f"m{self.made + n}" for n in range(self.ready)]
        self.made, self.ready = self.made + self.ready, 0
        self.ranks.change(leave, come)
        return ("formed", self.ranks.membership.size)


class Members:
    """Who is there: rank r on node `nodes[r]`."""

    def __init__(self, nodes):
        self.where = [{"node": n, "host": f"host-{n}", "address": "10.0.0.1"} for n in nodes]
        self.membership = Membership(0, tuple(f"m{r}" for r in range(len(nodes))), tuple(map(ord, nodes)))

    def change(self, gone, come=()):
        members = self.membership.members
        self.membership = self.membership.next([members[r] for r in gone], {m: ord("z") for m in come})
        new = [{"node": "z", "host": "host-z", "address": "10.0.0.1"} for _ in come]
        self.where = [w for r, w in enumerate(self.where) if r not in gone] + new


def scene(*overrides, nodes="abcd"):
    """An elastic run of one rank on each of `nodes`, and all that surrounds it, to change between its steps."""
    it = SimpleNamespace(clock=Clock(), said=[], drains={}, free=None, slow=[], step=None)
    cfg = load_config(None, [f"cluster.ranks={len(nodes)}", "elastic.max_ranks=8", "elastic.wait_s=60", *overrides])
    it.ranks = Members(nodes)
    it.resizer = FakeResizer(it.ranks)
    signs = Signs(lambda: it.drains, lambda but: it.free, lambda: None, lambda: it.slow, lambda: question())
    it.counts = SimpleNamespace(failures=0, planned_leaves=0)
    it.elastic = Elastic(cfg, EXPERTS, it.ranks, it.resizer, signs, it.counts, it.said.append, it.clock)
    load, said = statistics().load, results()

    def step(times=1, seconds=1.0):
        for _ in range(times):
            it.clock.now += seconds
            formed = it.elastic.after_step(NOW, load, said, 0.2)
        return formed

    it.step = step
    it.words = lambda: [e.words for e in it.said]
    it.size = lambda: it.ranks.membership.size
    return it


def scale(ranks):
    return Request(RequestKind.SCALE, "somebody", {"ranks": ranks})


def drain(node):
    return Request(RequestKind.DRAIN, "somebody", {"node": node})
