"""Groups made through ray.util.collective by real actors: right answers, and what a killed member does to others."""

import os
import signal
import time

import pytest
import ray
import ray.experimental.internal_kv as kv
import torch
from ray.util import collective

from ray_ep.collective.ray_backend import join, leave
from ray_ep.errors import GroupError


@ray.remote(num_cpus=0.1, concurrency_groups={"control": 1})
class Member:
    """One member of a group."""

    def __init__(self):
        torch.set_num_threads(1)

    def join(self, name, rank, size, epoch=0):
        """Join; returns what the group says of itself."""
        self.name, self.group = name, join(name, rank, size, epoch, timeout_s=60)
        return self.group.rank, self.group.size, self.group.epoch

    def try_to_join(self, name, rank, size, limit_s):
        """Join, to which somebody does not come; returns the error and the seconds."""
        began = time.monotonic()
        try:
            join(name, rank, size, limit_s=limit_s)
        except GroupError as e:
            return str(e), time.monotonic() - began

    def leave(self):
        """Leave; returns whether Ray still knows the group here."""
        leave(self.name)
        return collective.is_group_initialized(self.name)

    def exchange(self):
        """Send rank r's rows (r, d) to rank d, d + 1 of them, none of one's own; returns what came."""
        rank, size = self.group.rank, self.group.size
        sizes = [0 if d == rank else d + 1 for d in range(size)]
        rows = [[rank, d] for d in range(size) for _ in range(sizes[d])]
        come = [0 if s == rank else rank + 1 for s in range(size)]
        output = torch.full((sum(come), 2), -1)
        self.group.all_to_all(output, torch.tensor(rows), come, sizes)
        return output.tolist()

    def exchange_until_it_fails(self):
        """Returns the error, and exchanges that had worked."""
        for count in range(10**9):
            try:
                self.exchange()
            except GroupError as e:
                return str(e), count

    def call_by_name(self):
        """Every call of ray.util.collective on our group, by its name."""
        name, rank, size = self.name, self.group.rank, self.group.size
        mine = torch.full((2,), float(rank + 1))
        out = {}
        out["allreduce"] = mine.clone()
        collective.allreduce(out["allreduce"], name)
        out["max"] = mine.clone()
        collective.allreduce(out["max"], name, collective.types.ReduceOp.MAX)
        out["broadcast"] = mine.clone()
        collective.broadcast(out["broadcast"], src_rank=1, group_name=name)
        parts = [torch.zeros(2) for _ in range(size)]
        collective.allgather(parts, mine, name)
        out["allgather"] = torch.stack(parts)
        out["reducescatter"] = torch.zeros(2)
        collective.reducescatter(out["reducescatter"], [mine * 10**r for r in range(size)], name)
        out["reduce"] = mine.clone()
        collective.reduce(out["reduce"], dst_rank=2, group_name=name)
        out["received"] = torch.zeros(2)
        if rank == 0:
            collective.send(mine * 7, 2, name)
        if rank == 2:
            collective.recv(out["received"], 0, name)
        collective.barrier(name)
        out["rank"] = torch.tensor([collective.get_rank(name), collective.get_collective_group_size(name)])
        return {k: v.tolist() for k, v in out.items()}

    def wait(self):
        """A barrier to which the others do not come; returns the error."""
        try:
            self.group.barrier()
        except GroupError as e:
            return str(e)

    @ray.method(concurrency_group="control")
    def abort(self):
        """Release the waiting call."""
        self.group.abort()

    @ray.method(concurrency_group="control")
    def pid(self):
        """Process id."""
        return os.getpid()


@pytest.fixture(scope="module", autouse=True)
def joined(cluster):
    ray.init(address=cluster.driver, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def every(members, method, *args):
    return ray.get([getattr(m, method).remote(*args) for m in members], timeout=60)


def form(members, name, epoch=0):
    """Join all; returns what the groups say."""
    return ray.get([m.join.remote(name, r, len(members), epoch) for r, m in enumerate(members)], timeout=60)


@pytest.fixture(scope="module")
def pool(joined):
    """Actors for all tests; those that a test has killed are replaced."""
    return []


@pytest.fixture
def trio(pool, request):
    """Three members of a group of the test's own name."""
    pool += [Member.remote() for _ in range(3 - len(pool))]
    assert form(pool, request.node.name) == [(0, 3, 0), (1, 3, 0), (2, 3, 0)]
    yield list(pool)
    gone = {m: m.leave.remote() for m in pool}
    ray.wait(list(gone.values()), num_returns=3, timeout=30)
    for member, left in gone.items():
        try:
            assert ray.get(left, timeout=0) is False
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.kill(member)
            pool.remove(member)


def test_rows_of_uneven_sizes_arrive_in_the_order_of_their_senders(trio):
    assert every(trio, "exchange") == [
        [[1, 0], [2, 0]],
        [[0, 1], [0, 1], [2, 1], [2, 1]],
        [[0, 2], [0, 2], [0, 2], [1, 2], [1, 2], [1, 2]],
    ]


def test_every_call_of_ray_util_collective_works_by_the_groups_name(trio):
    answers = every(trio, "call_by_name")
    for rank, a in enumerate(answers):
        assert a["rank"] == [rank, 3]
        assert a["allreduce"] == [6.0, 6.0]  # 1 + 2 + 3
        assert a["max"] == [3.0, 3.0]
        assert a["broadcast"] == [2.0, 2.0]
        assert a["allgather"] == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
        assert a["reducescatter"] == [6.0 * 10**rank] * 2
        assert a["reduce"] == ([6.0, 6.0] if rank == 2 else [rank + 1.0] * 2)
        assert a["received"] == ([7.0, 7.0] if rank == 2 else [0.0, 0.0])


def test_survivors_of_a_killed_member_fail_within_seconds_and_form_the_next_group_of_two(trio, request):
    members, pids, name = trio, every(trio, "pid"), request.node.name
    calls = [m.exchange_until_it_fails.remote() for m in members]
    time.sleep(0.5)
    os.kill(pids[2], signal.SIGKILL)
    errors = ray.get(calls[:2], timeout=30)
    assert all("epoch 0" in error and f"rank {rank}" in error for rank, (error, _) in enumerate(errors))
    assert all(count > 0 for _, count in errors)  # it did work before
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(calls[2], timeout=10)

    assert every(members[:2], "leave") == [False, False]
    assert form(members[:2], name, epoch=1) == [(0, 2, 1), (1, 2, 1)]
    assert every(members[:2], "exchange") == [[[1, 0]], [[0, 1], [0, 1]]]
    assert every(members[:2], "pid") == pids[:2]  # the same processes


def test_a_name_can_be_used_again_after_its_first_member_was_killed(trio, request):
    members, pids, name = trio, every(trio, "pid"), request.node.name
    calls = [m.exchange_until_it_fails.remote() for m in members]
    time.sleep(0.5)
    os.kill(pids[0], signal.SIGKILL)
    ray.get(calls[1:], timeout=30)
    every(members[1:], "leave")
    second = members[2].join.remote(name, 1, 2, 1)
    time.sleep(0.5)  # it comes first, and must not take the dead member's address for the new one
    first = members[1].join.remote(name, 0, 2, 1)
    assert ray.get([first, second], timeout=10) == [(0, 2, 1), (1, 2, 1)]
    assert every(members[1:], "exchange") == [[[1, 0]], [[0, 1], [0, 1]]]


def test_abort_from_another_concurrency_group_releases_a_waiting_member(trio):
    waiting = trio[0].wait.remote()
    assert ray.wait([waiting], timeout=1) == ([], [waiting])
    began = time.monotonic()
    ray.get(trio[0].abort.remote(), timeout=30)
    assert "aborted" in ray.get(waiting, timeout=30)
    assert time.monotonic() - began < 20


def test_a_join_ends_within_its_limit_and_leaves_no_address_of_a_dead_first_member_behind(trio, request):
    assert kv._internal_kv_get(f"ray_ep/{request.node.name}") is None, "nobody needs it once the group is there"
    key = f"ray_ep/{request.node.name}-1"
    first = trio[0].try_to_join.remote(f"{request.node.name}-1", 0, 3, 30.0)
    second = trio[1].try_to_join.remote(f"{request.node.name}-1", 1, 3, 2.0)  # the third never comes
    for _ in range(100):
        if kv._internal_kv_get(key) is not None:
            break
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(ray.get(trio[0].pid.remote()), signal.SIGKILL)
    error, took = ray.get(second, timeout=40)
    assert "could not join" in error
    assert took < 20, "not the 30 s of the first"
    with pytest.raises(ray.exceptions.RayActorError):
        ray.get(first, timeout=10)
    assert kv._internal_kv_get(key) is None
    every(trio[1:], "leave")
    assert form(trio[1:], f"{request.node.name}-2", epoch=2) == [(0, 2, 2), (1, 2, 2)]
    assert every(trio[1:], "exchange") == [[[1, 0]], [[0, 1], [0, 1]]]
