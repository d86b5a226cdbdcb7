"""What ranks in processes of their own check together, in order; ranks.py starts them. T tokens, H hidden.

python -m tests.gpu.together KIND DEVICE PORT LIMIT SIZE RANK. Over gloo it runs on CPUs; over NCCL it has not run yet.
"""

import faulthandler
import functools
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ray_ep
from ray_ep.collective import StagedGroup, gloo
from ray_ep.collective.nccl import nccl
from ray_ep.collective.torch_nccl import torch_nccl
from ray_ep.errors import GroupError
from tests.models import VOCAB, build, even_shards, logits_differ, loss_sum, parallel_pass, placement_of, reference

PATIENCE_S = 30.0
SOON_S = 25.0  # a dead peer, an abort or a limit must be noticed before the patience of a call is over
TOLERANCE = 2e-5  # float32, a GPU's sums being of another order
IDS = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))


@dataclass
class Here:
    """One rank of the job.

    Attributes:
        group: of the sections in which nothing breaks.
    """

    kind: str
    device: torch.device
    rank: int
    size: int
    store: dist.Store
    epoch: int = 0

    def form(self):
        """The group of the next epoch; all ranks call it."""
        self.epoch += 1
        if self.kind in ("gloo", "staged"):
            made = gloo(self.store, self.rank, self.size, self.epoch, host="127.0.0.1", timeout_s=PATIENCE_S)
            return StagedGroup(made) if self.kind == "staged" else made
        make = {"nccl": nccl, "torch_nccl": torch_nccl}[self.kind]
        return make(self.store, self.rank, self.size, self.epoch, self.device, timeout_s=PATIENCE_S, limit_s=60.0)

    def meet(self, name):
        """Wait for all ranks, without a group."""
        self.store.set(f"{name}-{self.rank}", "there")
        self.store.wait([f"{name}-{r}" for r in range(self.size)], timedelta(seconds=60))

    def full(self, value, *shape, dtype=torch.float32):
        return torch.full(shape, value, device=self.device, dtype=dtype)


def rows_of_uneven_numbers(here, group):
    """Each rank knows what all send; some send nothing to some, and one trial moves nothing at all."""
    g, size = torch.Generator().manual_seed(7), here.size
    for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.uint8):
        for most in (1, 3, 300):
            table = torch.randint(0, most, (size, size), generator=g).tolist()  # rows from source to target
            rows = [[torch.randint(0, 200, (n, 64), generator=g).to(dtype) for n in line] for line in table]
            mine = torch.cat(rows[here.rank]).to(here.device)
            took = [table[source][here.rank] for source in range(size)]
            out = torch.zeros(sum(took), 64, dtype=dtype, device=here.device)
            group.all_to_all(out, mine, took, table[here.rank])
            group.wait()
            want = torch.cat([rows[source][here.rank] for source in range(size)])
            assert torch.equal(out.cpu(), want), (dtype, table)


def loans(here, group):
    """Begun, followed by another call, and ended."""
    message = group.take(2 * here.size, 16, like=here.full(0, 1, dtype=torch.uint8))
    message.copy_(here.full(here.rank + 1, 2 * here.size, 16))
    end = group.begin_loan(message, [2] * here.size, [2] * here.size)
    total = here.full(1.0, 3)
    group.all_reduce(total)
    blocks = end()
    group.wait()
    assert [b.flatten().tolist() for b in blocks] == [[r + 1] * 32 for r in range(here.size)]


def messages(here, group):
    """Around a ring, one after the other."""
    x, came = here.full(here.rank, 1000), here.full(-1, 1000)
    for source in range(here.size):
        target = (source + 1) % here.size
        if here.rank == source:
            group.send(x, target, 20.0)
        elif here.rank == target:
            group.receive(came, source, 20.0)
    group.wait()
    assert came.eq((here.rank - 1) % here.size).all()


def sums_and_broadcasts(here, group):
    total = here.full(here.rank + 1.0, 1000)
    group.all_reduce(total)
    most = here.full(here.rank, 5, dtype=torch.int64)
    group.all_reduce(most, "max")
    every = group.all_gather(here.full(here.rank, 2, 3))
    sources = [here.full(here.rank, 4) for _ in range(here.size)]
    for source, x in enumerate(sources):
        group.broadcast(x, source)
    group.barrier()
    group.wait()
    assert total.eq(sum(range(1, here.size + 1))).all()
    assert most.eq(here.size - 1).all()
    assert [part.flatten().tolist() for part in every] == [[r] * 6 for r in range(here.size)]
    assert all(x.eq(source).all() for source, x in enumerate(sources))


def subgroups(here, group):
    """One of all ranks, and one of each rank alone."""
    for color, members in ((0, list(range(here.size))), (here.rank, [here.rank])):
        sub = group.split(color)
        assert sub.members == members
        x = here.full(1.0, 10)
        sub.all_reduce(x)
        sub.wait()
        assert x.eq(len(members)).all()
        group.barrier()


@functools.cache
def plain(name, device):
    """A model on a device, tokens, and what `reference` says of them."""
    model, ids = build(name).to(device), IDS.to(device)
    return model, ids, *reference(model, ids)


def equals_plain_transformers(here, group, name="qwen3_moe", places="replicated", rows=None, free=False, **way):
    """This rank's logits and all gradients are those of plain transformers on the same device; returns the model.

    Args:
        places: kind of placement. rows: [R + 1] bounds of each rank's sequences. free: guests cost nothing.
        way: fields of `Exchange`.
    """
    model, ids, loss, logits, grads = plain(name, here.device)
    shards = rows or even_shards(len(ids), here.size)
    nodes = np.arange(here.size) if way.get("kind") == "two_level" else None
    placement = placement_of(model, places, here.size)

    def before(ours):
        ours.ray_ep.exchange_by(**way)
        if free:
            ours.ray_ep.balancer.assume(seconds_per_pair=1.0, bandwidth=1e18)

    ours, total, mine, got = parallel_pass(model, ids, group, placement, shards, before, nodes)
    assert abs(total - loss) <= TOLERANCE
    if len(mine):
        assert logits_differ(mine, logits[shards[here.rank] : shards[here.rank + 1]]) <= TOLERANCE
    for n, g in grads.items():
        assert (got[n] - (g if g is not None else 0)).abs().max() <= TOLERANCE, n
    return ours


def layers_of_any_placement(here, group):
    for places in ("contiguous", "shuffled", "replicated", "empty_rank"):
        equals_plain_transformers(here, group, places=places)
    equals_plain_transformers(here, group, places="shuffled", rows=[0] * here.size + [len(IDS)])  # ranks without tokens
    equals_plain_transformers(here, group, "gpt_oss")


def layers_of_every_way(here, group):
    for fused in (True, False):
        for way in ({}, {"tokens": 64, "kind": "all_gather"}, {"kind": "all_gather"}, {"kind": "two_level"}):
            equals_plain_transformers(here, group, fused=fused, **way)


def tokens_in_chunks(here, group):
    for fused in (True, False):
        for way in ("flat", "two_level", "all_gather"):
            equals_plain_transformers(here, group, fused=fused, chunks=2, kind=way)
    equals_plain_transformers(here, group, chunks=3, rows=[0] * here.size + [len(IDS)])


def guests_of_a_step(here, group):
    """Experts that a rank borrows for a step, with their gradients on the way back."""
    for way in ({"fused": True}, {"fused": False}, {"chunks": 2}):
        ours = equals_plain_transformers(here, group, places="contiguous", free=True, **way)
        assert ours.ray_ep.balancer.done.guests > 0, way


def low_precision(here, group):
    """bfloat16 over ranks is about as far from float32 as plain transformers in bfloat16 is."""
    ids, shards = IDS.to(here.device), even_shards(len(IDS), here.size)
    exact, low = build("qwen3_moe").to(here.device), build("qwen3_moe", dtype=torch.bfloat16).to(here.device)
    exact.load_state_dict(low.state_dict())  # the same rounded weights, computed with in float32
    part = slice(shards[here.rank], shards[here.rank + 1])
    want, same = (reference(m, ids)[1][part].float() for m in (exact, low))
    model = ray_ep.moe.parallelize(low, group, placement_of(low, "replicated", here.size))
    loss, ours = loss_sum(model, ids[part])
    loss.backward()
    assert (ours.float() - want).norm() <= 1.25 * (same - want).norm()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def waits_of_the_host(here, group):
    """One a layer in forward, for the sizes, and none in backward; none at all with a bound on the tokens."""
    if here.kind not in ("nccl", "torch_nccl") or not has_grouped_kernel(here.device):
        return  # every call over CPU tensors is a wait, and so are products one by one
    model = build("qwen3_moe", dtype=torch.bfloat16, num_hidden_layers=1).to(here.device)
    model = ray_ep.moe.parallelize(model, group, placement_of(model, "contiguous", here.size), "off", sample=64)
    for way, most in (("flat", 1), ("all_gather", 0)):
        model.ray_ep.exchange_by(kind=way, tokens=64)
        forward, backward = host_waits(model, here.device)
        group.barrier()
        assert len(forward) <= most, (way, forward)
        assert backward == [], (way, backward)


def has_grouped_kernel(device):
    """Whether torch has its grouped product for bfloat16 there: elsewhere it reads the sizes on the host."""
    return torch.cuda.get_device_capability(device)[0] in (9, 10)


def host_waits(model, device):
    """Where the host waited for the device in a layer's forward, and in its backward: lists of `file:line`."""
    layer, module = model.ray_ep.layers[0], model.ray_ep.modules[0]
    model.ray_ep.counters.enabled = True
    hidden = torch.randn(64, 32, device=device, dtype=torch.bfloat16, requires_grad=True)
    weights, index = torch.rand(64, 8, device=device).topk(3)
    grad = torch.ones_like(hidden)
    for _ in range(3):  # the first ones compile and allocate
        with caught_waits() as forward:
            out = layer.forward(module, hidden, index, weights.to(torch.bfloat16))
        with caught_waits() as backward:
            out.backward(grad)
    return forward, backward


class caught_waits:
    """Context: `file:line` of each wait of the host that torch knows of; a list of them."""

    def __enter__(self):
        self.found = []
        self.catching = warnings.catch_warnings(record=True)
        self.caught = self.catching.__enter__()
        warnings.simplefilter("always")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn")
        return self.found

    def __exit__(self, *error):
        torch.cuda.set_sync_debug_mode("default")
        self.catching.__exit__(*error)
        waits = [w for w in self.caught if "synchronizing" in str(w.message)]
        self.found += [f"{Path(w.filename).name}:{w.lineno}" for w in waits]


def fails_soon(group, call):
    """A call that a peer does not answer ends in a GroupError, when it is made or waited for."""
    began = time.monotonic()

    def ended():
        call()
        group.wait()

    with pytest.raises(GroupError):
        ended()
    took = time.monotonic() - began
    assert took < SOON_S, f"{took:.1f} s"


def limit_of_a_message(here, group):
    """A message that does not come ends in an error within its limit."""
    if here.rank == 0:
        fails_soon(group, lambda: group.receive(here.full(0.0, 10), 1, 2.0))
    here.meet("limit")  # leaving earlier would be noticed, too
    group.abort()


def abort_by_another_thread(here, group):
    """It releases who waits for a peer that does not call, and the device goes on."""
    if here.rank == 0:
        threading.Timer(1.0, group.abort).start()
        fails_soon(group, lambda: group.all_reduce(here.full(1.0, 10)))
    here.meet("abort")
    group.abort()
    assert here.full(1.0, 10).sum().item() == 10


def a_peer_that_died(here, group):
    """The others hear of it. The last section: the last rank is no more after it."""
    here.meet("dead")
    if here.rank == here.size - 1:
        print(f"rank {here.rank}: {a_peer_that_died.__name__} ok", flush=True)
        os._exit(0)
    fails_soon(group, lambda: group.all_reduce(here.full(1.0, 10)))
    assert here.full(1.0, 10).sum().item() == 10


HEALTHY = (
    rows_of_uneven_numbers, loans, messages, sums_and_broadcasts, subgroups, layers_of_any_placement,
    layers_of_every_way, tokens_in_chunks, guests_of_a_step, low_precision, waits_of_the_host,
)  # fmt: skip
BROKEN = (limit_of_a_message, abort_by_another_thread, a_peer_that_died)
"""Each in a group of its own, which is formed by the same processes after the one before broke."""
SECTIONS = [section.__name__ for section in (*HEALTHY, *BROKEN)]


def main(kind, device, port, limit_s, size, rank):
    faulthandler.dump_traceback_later(max(5.0, float(limit_s) - 5.0), exit=True)  # says where it hangs
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, timeout=timedelta(seconds=60))
    where = torch.device("cuda", 0) if device == "cuda" else torch.device("cpu")
    here = Here(kind, where, int(rank), int(size), store)
    group = here.form()
    for section in (*HEALTHY, *BROKEN):
        began = time.monotonic()
        if section in BROKEN:
            group = here.form()
        section(here, group)
        print(f"rank {rank}: {section.__name__} ok, {time.monotonic() - began:.1f} s", flush=True)
    os._exit(0)  # a broken group may keep the interpreter from ending


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        faulthandler.cancel_dump_traceback_later()
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
