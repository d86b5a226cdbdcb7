"""Ranks leave, die and come while a model trains: at every membership it computes what plain transformers computes."""

import copy
import threading
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ray_ep.collective import EpochGroup, Membership, SoloGroup, gloo
from ray_ep.config.schema import OptimConfig
from ray_ep.errors import ModelError, PlacementError
from ray_ep.moe import Limits, apply_placement, parallelize, regroup
from ray_ep.placement import Placement, Topology, contiguous, random
from ray_ep.rank.step.optimizer import MasterOptimizer
from tests.models import BASE, VOCAB, build, even_shards, gather_gradients, loss_sum

LAYERS, EXPERTS = BASE["num_hidden_layers"], 8
MODEL = build("qwen3_moe")
IDS = [torch.randint(3, VOCAB, (6, 9), generator=torch.Generator().manual_seed(s)) for s in range(12)]
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=0, clip_norm=0.0, weight_decay=0.01, schedule="constant")


class Plain:
    """Plain transformers and torch's AdamW in one process."""

    def __init__(self):
        self.model, self.step = copy.deepcopy(MODEL), 0
        experts = [n for n, _ in self.model.named_parameters() if ".experts." in n]
        of = {True: [], False: []}
        for n, p in self.model.named_parameters():
            of[p.dim() - (n in experts) >= 2].append(p)
        groups = [{"params": of[d], "weight_decay": OPTIM.weight_decay if d else 0.0} for d in (True, False)]
        betas = (OPTIM.beta1, OPTIM.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=OPTIM.learning_rate, betas=betas, eps=OPTIM.eps)
        self.done = []

    def train(self):
        """One step; loss, gradients, and then weights and moments by name."""
        ids = IDS[self.step]
        loss = loss_sum(self.model, ids)[0] / ids[:, 1:].numel()
        self.optimizer.zero_grad()
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in self.model.named_parameters()}
        self.optimizer.step()
        self.step += 1
        state = {
            n: (p.detach().clone(), *(self.optimizer.state[p][k].clone() for k in ("exp_avg", "exp_avg_sq")))
            for n, p in self.model.named_parameters()
        }
        self.done.append((loss.detach(), gradients, state))


PLAIN = Plain()


def plain(step):
    """What plain transformers got in a step."""
    while len(PLAIN.done) <= step:
        PLAIN.train()
    return PLAIN.done[step]


[plain(s) for s in range(len(IDS))]


class Worker:
    """One rank: a model, an optimizer, and the group that both keep."""

    def __init__(self, group, placement=None, balance="off"):
        self.group = EpochGroup.of(group)
        limits = Limits(guest_mb=64)
        self.model = parallelize(copy.deepcopy(MODEL), self.group, placement, balance, limits=limits, sample=30)
        self.ep = self.model.ray_ep
        self.optimizer = MasterOptimizer(self.model, OPTIM)

    def train(self, step, tolerance):
        """One step on this rank's rows of the global batch, compared with plain transformers."""
        ids, group = IDS[step], self.group
        low, high = even_shards(len(ids), group.size)[group.rank :][:2]
        loss = loss_sum(self.model, ids[low:high])[0] / ids[:, 1:].numel()
        loss.backward()
        total = loss.detach().clone()
        group.all_reduce(total)
        want, gradients, state = plain(step)
        assert abs(total - want) <= tolerance, (step, total, want)
        for n, got in gather_gradients(self.model, group).items():
            assert (got - gradients[n]).abs().max() <= tolerance, (step, n)
        self.optimizer.accumulate()
        self.optimizer.reduce()
        self.optimizer.update(step, self.optimizer.norm(torch.zeros(1, dtype=torch.float64)))
        self.optimizer.publish()
        for w in self.optimizer.weights:
            rows = slice(None) if w.layer is None else self.ep.layers[w.layer].experts[: len(w.master)]
            none = torch.zeros_like(w.master.data)  # who owns nothing keeps no moments
            kinds = (w.master.data, *(w.moments.get(k, none) for k in self.optimizer.kinds))
            for got, full in zip(kinds, state[w.name], strict=True):
                assert (got - full[rows]).abs().sum() <= tolerance * max(1, got.numel()), (step, w.name)
        for i, layer in enumerate(self.ep.layers):
            for n, p in self.ep.parameters(i).items():  # replicas, too
                full = state[f"{layer.name}.{n}"][0][layer.experts]
                assert (p.detach() - full).abs().sum() <= tolerance * max(1, p.numel()), (step, n)

    def owned(self):
        """Masters and moments of what this rank owns: a snapshot, by (layer, expert)."""
        return {
            (i, e): {n: torch.stack([t.clone() for t in rows]) for n, rows in self.optimizer.rows(i, e).items()}
            for i, layer in enumerate(self.ep.layers)
            for e in layer.experts[: layer.owned]
        }

    def hand_over(self, source):
        """Dense weights and moments, and buffers, from a rank that has them to one that has just come (collective)."""
        for w in self.optimizer.weights:
            if w.layer is None:
                kinds = {k: w.moments.get(k, torch.zeros_like(w.master.data)) for k in self.optimizer.kinds}
                for tensor in (w.master.data, *kinds.values()):
                    self.group.broadcast(tensor, source)
                w.moments = kinds
                if w.compute is not None:
                    w.compute.copy_(w.master)
        for buffer in self.model.buffers():
            self.group.broadcast(buffer, source)


class Run:
    """What a driver knows: the membership, the placement, the links."""

    def __init__(self, size):
        self.store = dist.HashStore()
        self.store.set_timeout(timedelta(seconds=20))
        self.membership = Membership(0, tuple(f"m{r}" for r in range(size)), (0,) * size)
        self.placement = drawn(size, 0)
        self.topology = Topology.of_nodes([0] * size)
        self.workers = {}

    def on_all(self, call):
        """call(rank, worker) on every member at once; worker is None before its first one."""
        results, errors = {}, []

        def one(rank, member):
            try:
                results[rank] = call(rank, self.workers.get(member))
            except BaseException as e:
                errors.append(e)
                if member in self.workers:
                    self.workers[member].group.abort()

        members = enumerate(self.membership.members)
        threads = [threading.Thread(target=one, args=x, daemon=True) for x in members]
        [t.start() for t in threads]
        [t.join(60) for t in threads]
        assert not any(t.is_alive() for t in threads), "a rank hangs"
        if errors:
            raise next((e for e in errors if "GroupError" not in type(e).__name__), errors[0])
        return [results[r] for r in range(len(results))]

    def form(self, group, rank):
        """Form the group of the present membership in place."""
        size, epoch = self.membership.size, self.membership.epoch
        group.form(epoch, {"gloo": lambda: gloo(self.store, rank, size, epoch, "127.0.0.1", 20, 20)}, 20)

    def start(self, balance):
        """The first membership."""

        def one(rank, _):
            group = EpochGroup()
            self.form(group, rank)
            return Worker(group, self.placement, balance)

        made = self.on_all(one)
        self.workers = dict(zip(self.membership.members, made, strict=True))

    def change(self, gone=(), come=(), keepers=None, kept=None, equal=lambda rank: {"step": 1}):
        """The next membership: groups re-formed, models on over them; experts lie where they lay."""
        before, placement = self.membership, self.placement
        self.membership = before.next(gone, dict.fromkeys(come, 0))
        origin = self.membership.origin(before)
        if keepers:
            placement = placement.primaries()
        self.placement = placement.among(origin, keepers)
        self.topology = self.topology.among(origin, self.membership.node_of)
        updates = self.workers[before.members[0]].optimizer.updates

        def one(rank, worker):
            if rank in [self.membership.rank_of(m) for m in come]:
                worker.optimizer.updates = updates
            self.form(worker.group, rank)
            mine = kept if keepers and rank in keepers.values() else None
            regroup(
                worker.model, worker.group, self.placement, self.topology, kept=mine, state=worker.optimizer,
                equal=equal(rank),
            )  # fmt: skip

        self.on_all(one)

    def move(self, placement):
        """Experts move to another placement."""
        self.placement = placement
        self.on_all(lambda rank, w: apply_placement(w.model, placement, state=w.optimizer))

    def train(self, steps, tolerance):
        """Steps, each compared with plain transformers."""
        for step in steps:
            self.on_all(lambda rank, w, step=step: w.train(step, tolerance))

    def close(self):
        [w.group.close() for w in self.workers.values()]


def drawn(size, seed):
    """A random placement with replicas."""
    return random(LAYERS, EXPERTS, size, -(-EXPERTS // size) + 2, seed=seed)


def without(size, rank):
    """A placement in which a rank holds nothing."""
    rest = drawn(size - 1, 5)
    slots = np.insert(rest.slots, rank, -1, axis=1)
    primary = rest.owner + (rest.owner >= rank)
    return Placement(slots, EXPERTS, 1, primary)


@pytest.mark.parametrize(("balance", "tolerance"), [("off", 2e-6), ("always", 1e-5)])
def test_training_goes_on_as_in_one_process_while_ranks_leave_come_and_die(balance, tolerance):
    run = Run(3)
    run.start(balance)
    run.train([0, 1], tolerance)

    run.move(without(3, 1))  # m1 leaves: it hands over first
    run.change(gone=["m1"])
    assert [w.group.size for w in run.workers.values()][::2] == [2, 2]
    run.train([2, 3], tolerance)

    run.workers["m3"] = Worker(SoloGroup(), contiguous(LAYERS, EXPERTS, 1), balance)  # m3 comes, made alone
    run.change(come=["m3"])
    run.on_all(lambda rank, w: w.hand_over(source=0))
    run.move(drawn(3, 7))
    run.train([4, 5], tolerance)

    snapshot = run.workers["m0"].owned()  # m0 dies: m3 keeps what it owned
    run.change(gone=["m0"], keepers={0: 1}, kept=snapshot)
    run.move(drawn(2, 8))
    run.train([6, 7], tolerance)
    for member in ("m2", "m3"):
        worker = run.workers[member]
        ep, group = worker.ep, worker.group
        assert (group.epoch, group.size, ep.meter.sent.shape, ep.placement.num_ranks) == (3, 2, (2,), 2)
        holders = (ep, ep.balancer, ep.traffic, worker.optimizer, *ep.replicas, *ep.layers)
        assert all(x.group is group for x in holders)
        assert ep.counters.capacity == {"m2": 45, "m3": 15}[member]
        assert ep.balancer.nodes.num_ranks == 2
    if balance == "always":
        assert run.workers["m2"].ep.balancer.done.layers > 0
    run.close()


def test_all_ranks_go_back_to_their_snapshots_and_repeat_the_steps_since():
    run = Run(2)
    run.start("off")
    run.train([0, 1], 2e-6)
    workers = list(run.workers.values())
    owned = [w.owned() for w in workers]
    dense = [
        [(t, t.clone()) for x in w.optimizer.weights if x.layer is None for t in (x.master.data, *x.moments.values())]
        for w in workers
    ]
    run.train([2, 3], 2e-6)
    run.membership, run.placement = run.membership.next(), run.placement.primaries()  # replicas are of later steps

    def back(rank, worker):
        run.form(worker.group, rank)
        worker.optimizer.updates = 2
        regroup(worker.model, worker.group, run.placement, kept=owned[rank], state=worker.optimizer)
        for tensor, then in dense[rank]:
            tensor.copy_(then)

    run.on_all(back)
    run.move(drawn(2, 9))
    run.train([2, 3], 2e-6)
    run.close()


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (lambda w: w.ep.exchange_by(kind="all_gather"), PlacementError, "ranks 0 and 1 of epoch 1 differ in exchange"),
        (
            lambda w: setattr(w.ep.balancer, "guest_mb", 3),
            PlacementError,
            "ranks 0 and 1 of epoch 1 differ in balance",
        ),
        (lambda w: setattr(w.optimizer, "updates", 7), PlacementError, "differ in kept state, updates:"),
        (lambda w: w.optimizer.accumulate(), ModelError, "gradients are present"),
    ],
)
def test_ranks_that_differ_after_a_regroup_are_told_in_what_and_none_hangs(spoil, error, says):
    run = Run(2)
    run.start("off")
    spoil(run.workers["m1"])
    if error is PlacementError:
        updates = lambda rank: {"updates": run.workers[f"m{rank}"].optimizer.updates}  # noqa: E731
        with pytest.raises(error, match=says):
            run.change(equal=updates)
    else:
        with pytest.raises((error, PlacementError), match=f"{says}|rank 1 cannot go on in epoch 1"):
            run.change()
    assert run.workers["m0"].ep.placement.num_ranks == 2
    run.close()


def test_ranks_that_were_told_of_different_links_are_refused():
    run = Run(2)
    run.start("off")
    run.train([0], 2e-6)
    run.membership = run.membership.next()

    def one(rank, worker):
        run.form(worker.group, rank)
        topology = Topology.of_nodes([0, rank])
        with pytest.raises(PlacementError, match="ranks 0 and 1 of epoch 1 differ in topology"):
            regroup(worker.model, worker.group, run.placement, topology, state=worker.optimizer)
        regroup(worker.model, worker.group, run.placement, run.topology, state=worker.optimizer)
        assert worker.ep.routing.logits == [None] * LAYERS, "the old group's memory is kept by the last pass's graph"

    run.on_all(one)
    run.close()


def test_a_rank_that_lacks_what_it_is_to_own_says_so_and_nothing_changes():
    run = Run(3)
    run.placement = Placement(np.tile(np.array([[range(8), range(8), [-1] * 8]]), (LAYERS, 1, 1)), EXPERTS)
    run.start("off")
    run.train([0], 2e-6)
    before = [run.workers[m].ep.placement for m in ("m1", "m2")]
    with pytest.raises(PlacementError, match=r"no masters and moments of expert 0|rank 0 cannot"):
        run.change(gone=["m0"])
    assert [run.workers[m].ep.placement for m in ("m1", "m2")] == before, "one rank went on without the other"
    run.close()


def test_two_levels_become_one_where_one_node_is_left():
    run = Run(3)
    run.membership, run.topology = replace(run.membership, node_of=(0, 0, 1)), Topology.of_nodes([0, 0, 1])
    run.placement = Placement(np.tile(np.array([[range(4), range(4, 8), [-1] * 4]]), (LAYERS, 1, 1)), EXPERTS)
    run.start("off")
    run.on_all(lambda rank, w: w.ep.exchange_by(kind="two_level"))
    run.change(gone=["m2"])
    assert run.on_all(lambda rank, w: w.ep.exchange.kind) == ["flat", "flat"]
    run.train([0], 2e-6)
    run.close()


@pytest.mark.parametrize(("spoil", "says"), [(lambda x: x[:1], r"shape \[1, "), (None, r"shape \[\]")])
def test_rows_handed_over_that_do_not_fit_are_refused_before_anything_changes(spoil, says):
    run = Run(2)
    run.start("off")
    run.train([0], 2e-6)
    kept = run.workers["m0"].owned()
    for rows in kept.values():
        rows.update({n: spoil(x) for n, x in rows.items()}) if spoil else rows.popitem()
    worker = run.workers["m1"]
    before = [p.clone() for p in worker.model.parameters()]
    with pytest.raises(PlacementError, match=says):
        run.change(gone=["m0"], keepers={0: 0}, kept=kept)
    assert all(torch.equal(a, b) for a, b in zip(before, worker.model.parameters(), strict=True))
    run.close()
