"""Subgroups over real gloo: who is in them, that they work beside each other, and that they go with their parent."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from ray_ep.collective import SoloGroup
from ray_ep.collective.torch_group import TorchGroup
from ray_ep.errors import GroupError


def exchange(group):
    """One row to every member, with the sender's and receiver's rank in it; checks what came."""
    ranks = torch.arange(group.size)
    mine = torch.stack([torch.full_like(ranks, group.rank), ranks], 1)
    came = torch.empty_like(mine)
    group.all_to_all(came, mine, [1] * group.size, [1] * group.size)
    assert came.tolist() == [[r, group.rank] for r in range(group.size)]


@pytest.mark.parametrize(
    ("colors", "members"),
    [
        ([0, 0, 1, 1], [[0, 1], [0, 1], [2, 3], [2, 3]]),
        ([7, -1, 7, -1], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        ([1, 0, 1, 1], [[0, 2, 3], [1], [0, 2, 3], [0, 2, 3]]),
        ([5, 5, 5, 5], [[0, 1, 2, 3]] * 4),
        ([3, 2, 1, 0], [[0], [1], [2], [3]]),
    ],
)
def test_ranks_of_one_color_form_a_group_in_their_order(ranks, colors, members):
    def work(g):
        sub = g.split(colors[g.rank])
        assert sub.members == members[g.rank]
        assert (sub.rank, sub.size, sub.epoch) == (members[g.rank].index(g.rank), len(sub.members), g.epoch)
        exchange(sub)
        total = torch.tensor([g.rank])
        sub.all_reduce(total)
        assert total.item() == sum(sub.members)
        assert sub.all_gather(torch.tensor(g.rank)).tolist() == sub.members
        first = torch.tensor([g.rank])
        sub.broadcast(first, sub.size - 1)
        assert first.item() == sub.members[-1]
        g.barrier()  # nobody goes before the others are through

    ranks(4, work)


def test_subgroups_work_while_the_others_do_something_else(ranks):
    def work(g):
        sub = g.split(g.rank // 2)
        if g.rank < 2:  # many small exchanges here, one late one there
            for _ in range(50):
                exchange(sub)
        else:
            time.sleep(0.2)
            exchange(sub)
        exchange(g)
        return sub.size

    assert ranks(4, work) == [2] * 4


def test_group_and_subgroups_of_two_kinds_are_used_in_turn(ranks):
    def work(g):
        node, across = g.split(g.rank // 2), g.split(g.rank % 2)  # 0 1 | 2 3 and 0 2 | 1 3
        for _ in range(5):
            exchange(across)
            exchange(node)
            exchange(g)
        alone = node.split(node.rank)
        assert (alone.size, alone.members) == (1, [node.rank])
        exchange(alone)
        exchange(node)
        g.barrier()
        return across.members, node.members

    assert ranks(4, work) == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]


def test_abort_of_the_parent_releases_a_rank_that_waits_in_a_subgroup(ranks):
    groups = {}

    def work(g):
        sub = g.split(0).split(1)
        if g.rank == 1:
            time.sleep(1.5)
            return None
        threading.Timer(0.3, g.abort).start()
        start = time.monotonic()
        with pytest.raises(GroupError, match="aborted"):
            sub.barrier()
        with pytest.raises(GroupError, match="aborted"):
            exchange(g)
        return time.monotonic() - start

    assert ranks(2, work, timeout_s=5, groups=groups)[0] < 1.2


def test_abort_of_a_subgroup_leaves_its_parent_usable(ranks):
    def work(g):
        sub = g.split(0)
        sub.abort()
        with pytest.raises(GroupError, match="aborted"):
            sub.barrier()
        exchange(g)
        g.barrier()

    ranks(2, work)


def test_close_of_the_parent_closes_its_subgroups(ranks):
    def work(g):
        sub = g.split(g.rank % 2)
        below = sub.split(0)
        g.barrier()
        return g, sub, below

    for g, sub, below in ranks(3, work):
        g.close()
        for group in (g, sub, below):
            with pytest.raises(GroupError, match="closed"):
                group.barrier()
            with pytest.raises(GroupError, match="closed"):
                group.split(0)


def test_a_peer_that_does_not_come_to_the_split_ends_in_an_error(ranks):
    def work(g):
        if g.rank == 0:
            g.timeout_s = 0.5
            with pytest.raises(GroupError, match="no answer"):
                g.split(0)

    ranks(2, work, timeout_s=5, groups={})


def test_a_solo_group_is_its_own_subgroup():
    group = SoloGroup(3)
    assert group.split(9) is group
    assert group.members == [0]


def test_a_group_over_somebody_elses_process_group_says_that_it_cannot_be_split(ranks):
    def work(g):
        bare = TorchGroup(g._pg, g.rank, g.size)
        with pytest.raises(GroupError, match="cannot be split"):
            bare.split(0)
        g.barrier()

    ranks(2, work)


JOB = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
torch.set_num_threads(1)
from ray_ep.collective import from_torch
from tests.collective.test_split import exchange
group = from_torch()
for colors in ([0, 1, 0], [4, 4, 2], [0, 0, 0]):
    sub = group.split(colors[group.rank])
    assert sub.members == [r for r in range(3) if colors[r] == colors[group.rank]], sub.members
    exchange(sub)
    exchange(group)
group.barrier()
group.close()
dist.barrier()  # the user's own group is as it was
dist.destroy_process_group()
print(f"rank {group.rank} split", flush=True)
"""


@pytest.mark.slow
def test_a_torchrun_job_splits_torchs_default_group(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3", "--standalone", script]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, cwd=root,
        env={"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {r} split" in done.stdout for r in range(3)), done.stdout  # their lines may run into each other
