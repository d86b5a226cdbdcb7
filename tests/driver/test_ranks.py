"""Rank actors in real processes on a Ray of three nodes: what each kind of fault ends with; where ranks are placed."""

import os
import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.heartbeat import process_of
from ray_ep.driver.actors.newcomers import Stage
from ray_ep.driver.actors.placing import Places
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.hang import asking
from ray_ep.driver.hang.keeping import Hangs
from ray_ep.errors import ClusterError, PlacementError, RankError
from ray_ep.placement import contiguous
from tests.conftest import slow

from .light_rank import LightRank

SILENCE_S, NOBODY = 2.0, -1
NODES = (2, 4, 3)  # CPUs


@pytest.fixture(scope="module", autouse=True)
def cluster():
    soon = {"kill_worker_timeout_milliseconds": 500}  # a stopped process that is killed is gone after, 5 s by default
    head = {"num_cpus": NODES[0], "include_dashboard": False, "_system_config": soon}
    ends = signal.getsignal(signal.SIGTERM)
    nodes = Cluster(initialize_head=True, head_node_args=head)
    for cpus in NODES[1:]:
        nodes.add_node(num_cpus=cpus)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    signal.signal(signal.SIGTERM, ends)  # Ray's own would end a test, not the run
    yield nodes
    ray.shutdown()
    nodes.shutdown()


def config(**changes):
    given = {"ranks": 3, "cpus_per_rank": 0.3, "device": "cpu", "silence_s": SILENCE_S, "wait_s": 30.0}
    return ClusterConfig(**given | changes)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    """What ranks are at is waited for, however slow the machine is."""
    monkeypatch.setattr(asking, "LIMIT_S", 30.0)


@pytest.fixture
def ranks(request):
    made = Ranks(config(), request.node.name, False, bool, LightRank)
    yield made
    pids = [w["pid"] for w in made.where]
    assert made.kill() == []
    assert not any(running(pid) for pid in pids)


def running(pid):
    """Whether a process is there; one that has just died may be seen for a moment."""
    limit = time.monotonic() + 10
    while (there := Path(f"/proc/{pid}").exists()) and time.monotonic() < limit:
        time.sleep(0.02)
    return there


def fails(meanwhile, ranks, call, *args):
    """The error of a call: the fault happens once all ranks are in it."""

    def happen():
        while not all(ray.get([a.begun.remote() for a in ranks.actors], timeout=60)):
            time.sleep(0.02)
        meanwhile()

    fault = threading.Thread(target=happen)
    fault.start()
    with pytest.raises(RankError) as e:
        call(*args)
    fault.join()
    return e.value


def sends(ranks, number):
    return lambda: os.kill(ranks.where[1]["pid"], number)


def aborts(ranks, of):
    return ray.get([ranks.actors[r].aborts_seen.remote() for r in of], timeout=60)


def test_a_rank_that_is_stopped_is_named_once_it_is_told_what_all_are_at_and_the_others_are_released(ranks, tmp_path):
    ranks.hangs = Hangs(tmp_path, lambda: 7)
    e = fails(sends(ranks, signal.SIGSTOP), ranks, ranks.train_step, NOBODY)
    assert e.rank == 1
    assert f"rank 1 on beta (process {ranks.where[1]['pid']}) has not answered for " in str(e)
    kept = tmp_path / "hangs" / "step-000007-epoch-0"
    assert str(e).endswith(f"stacks of 3 ranks: {kept}")
    told = {p.name: p.read_text() for p in kept.iterdir()}
    assert sorted(told) == ["driver.txt", "rank0.txt", "rank1.txt", "rank2.txt"]
    assert "has not answered for " in told["rank1.txt"]
    assert "state T (stopped)" in told["rank1.txt"]
    if "py-spy" not in told["rank1.txt"]:  # it takes the right to trace processes, and a moment
        assert re.search(r"train_step \(.*light_rank\.py", told["rank1.txt"])
    for name in ("rank0.txt", "rank2.txt"):
        assert re.search(r"light_rank\.py\", line \d+, in train_step\n", told[name])
    assert "in train_step" in told["driver.txt"]
    assert "its node answers, so its process is stopped or hangs" in str(e)
    assert aborts(ranks, (0, 2)) == [1, 1]


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_a_call_that_is_not_collective_is_named(ranks):
    e = fails(sends(ranks, signal.SIGSTOP), ranks, ranks.save, "", 1)
    assert e.rank == 1
    assert "has not answered" in str(e)


def test_a_rank_that_is_stopped_while_it_starts_is_named_with_its_node_and_nothing_is_left(request):
    stopped = []

    def stop():
        while not stopped:
            time.sleep(0.1)
            try:
                process = process_of(ray.get_actor(f"ep/{request.node.name}/rank1"))
            except ValueError:  # not placed yet
                continue
            if process and process.pid:  # Ray may know the address first; 0 would stop all that runs this test
                os.kill(process.pid, signal.SIGSTOP)
                stopped.append(process.pid)

    fault = threading.Thread(target=stop)
    fault.start()
    with pytest.raises(RankError, match=r"rank 1 on \S+ \(process \d+\) has not answered .* is stopped or hangs") as e:
        Ranks(config(cpus_per_rank=2.0, ranks=2), request.node.name, False, bool, LightRank)
    fault.join()
    (pid,) = stopped
    assert str(pid) in str(e.value)
    assert not running(pid)


def test_a_killed_rank_is_named_as_dead_and_the_others_are_released(ranks, tmp_path):
    ranks.hangs = Hangs(tmp_path, lambda: 7)
    e = fails(sends(ranks, signal.SIGKILL), ranks, ranks.train_step, NOBODY)
    assert e.rank == 1
    assert str(e).startswith("rank 1 on beta died: ")
    assert aborts(ranks, (0, 2)) == [1, 1]
    assert list(tmp_path.iterdir()) == []  # nobody hung, nobody was asked


def test_a_rank_that_raises_alone_is_named_with_its_traceback_and_the_others_are_released(ranks):
    with pytest.raises(RankError, match="rank 1 raised") as e:
        ranks.train_step(1)
    assert "ValueError: boom" in str(e.value)
    assert "did not come back" not in str(e.value)
    assert aborts(ranks, (0, 1, 2)) == [1, 0, 1]


def test_a_rank_that_answers_but_does_not_come_back_is_named_not_those_that_wait_for_it(ranks, tmp_path):
    ranks.hangs = Hangs(tmp_path, lambda: 7)
    with pytest.raises(RankError, match=r"rank 2 on beta .* did not come back, while rank 0 raised") as e:
        ranks.load(str(tmp_path), 2)
    assert e.value.rank == 2
    told = {p.name: p.read_text() for p in (tmp_path / "hangs" / "step-000007-epoch-0").iterdir()}
    for name in ("rank1.txt", "rank2.txt"):  # before anybody was released; on which line they are is not certain
        assert re.search(r"light_rank\.py\", line \d+, in load\n", told[name])
    assert re.search(r"It raised:\n.*in load\n.*no answer from the peers", told["rank0.txt"], re.S)


def test_ranks_of_a_node_that_does_not_answer_are_killed_without_waiting_for_it_and_that_is_said(request, cluster):
    made = Ranks(config(), request.node.name, False, bool, LightRank)
    pids, there = [w["pid"] for w in made.where], {p.node for p in made._places}
    made.where = [{**w, "port": 1} for w in made.where]  # nobody listens: so is a machine that is cut off
    raylets = [n.all_processes["raylet"][0].process.pid for n in cluster.list_all_nodes() if n.node_id in there]
    assert raylets
    try:
        for raylet in raylets:
            os.kill(raylet, signal.SIGSTOP)  # it reports no death
        left = made.kill()
        assert [words.partition(" (")[0] for words in left] == ["rank 0", "rank 1", "rank 2"]
        assert all("its node does not answer: whether it is gone is not known" in words for words in left)
    finally:
        for raylet in raylets:
            os.kill(raylet, signal.SIGCONT)
    assert not any(running(pid) for pid in pids)


def test_what_every_rank_refuses_ends_nobodys_group(ranks):
    with pytest.raises(PlacementError, match="does not fit"):
        ranks.migrate(contiguous(1, 2, 2), 1)
    assert aborts(ranks, (0, 1, 2)) == [0, 0, 0]
    assert ranks.save("", NOBODY) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def packing(nodes):
    """How many ranks each used node has."""
    return sorted(Counter(nodes).values())


def free():
    """CPUs once Ray has taken back what was given up."""
    limit = time.monotonic() + 60
    while ray.available_resources().get("CPU", 0) < sum(NODES) and time.monotonic() < limit:
        time.sleep(0.05)
    return ray.available_resources()["CPU"]


@pytest.mark.parametrize("count", [5, *slow(3, 6)])
def test_groups_of_one_are_packed_as_one_group_of_all_is_and_numbered_by_host(count):
    free()
    one = placement_group([{"CPU": 1.0}] * count, strategy="PACK")
    ray.get(one.ready(), timeout=60)
    expected = packing(placement_group_table(one)["bundles_to_node_id"].values())
    remove_placement_group(one)
    assert free() == sum(NODES)
    room = Places(config(cpus_per_rank=1.0), f"packed-{count}", False, bool)
    places = room.take(count)
    assert packing(p.node for p in places) == expected
    assert [p.node for p in places] == sorted(p.node for p in places)  # one address here
    for place in places:
        room.give_up(place)
    assert free() == sum(NODES)


def awaited(room, group):
    """The room that was asked for, once it is there."""
    limit = time.monotonic() + 60
    while (place := room.have(group)) is None and time.monotonic() < limit:
        time.sleep(0.05)
    return place


def test_room_that_is_asked_for_comes_when_another_place_is_given_up_and_the_rest_stay():
    room = Places(config(cpus_per_rank=1.0), "changing", False, bool)
    places = room.take(sum(NODES))  # all that there is
    asked, second = room.ask(), room.ask()
    time.sleep(0.5)
    assert [room.have(asked) for _ in range(100)] == [None] * 100
    room.withdraw(second)
    room.give_up(places[4])
    added = awaited(room, asked)
    assert (added.node, added.port) == (places[4].node, places[4].port)  # nothing else is free
    for place in (*places[:4], *places[5:], added):
        assert placement_group_table(place.group)["state"] == "CREATED"
        room.give_up(place)
    assert free() == sum(NODES)  # nor does what was withdrawn hold any


def test_room_that_others_take_each_time_is_not_waited_for_beyond_wait_s():
    class Late(Places):
        def _pinned(self, where, limit):  # others have it by then
            time.sleep(max(0, limit - time.monotonic()))
            return []

    with pytest.raises(ClusterError, match=r"could not place 2 ranks .* within cluster.wait_s=0.5 s"):
        Late(config(wait_s=0.5), "taken", False, bool).take(2)


def test_without_room_for_all_ranks_none_is_held():
    with pytest.raises(ClusterError, match=r"could not place 10 ranks .* it has 3 node\(s\) with .* CPUs .* free now"):
        Places(config(cpus_per_rank=1.0, wait_s=0.5), "too-many", False, bool).take(10)
    assert free() == sum(NODES)


def polled(ranks, until):
    """What was told of newcomers until something is so."""
    told, limit = [], time.monotonic() + 120
    while not until() and time.monotonic() < limit:
        told += ranks.newcomers.poll()
        time.sleep(0.02)
    assert until(), told
    return told


def test_a_rank_comes_while_the_others_are_called_and_takes_the_last_place(ranks):
    asked = []

    def prepare(newcomer):
        asked.append((newcomer.member, newcomer.where["host"], newcomer.where["rank"]))
        return newcomer.actor.prepare.remote("")

    ranks.newcomers.prepare = prepare
    ranks.ask(2)
    ranks.newcomers.withdraw(1)
    assert ranks.newcomers.count(*Stage) == 1
    assert polled(ranks, lambda: ranks.newcomers.count(Stage.READY) == 1) == []
    assert asked == [("rank-3", "beta", 3)]
    assert ranks.save("", NOBODY) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]  # it is in no call yet
    gone, (came,) = ranks.where[0]["pid"], ranks.newcomers.take()
    assert ranks.newcomers.take() == []
    ranks.lose((0,), [came])
    assert ranks.membership.members == ("rank-1", "rank-2", "rank-3")
    assert (ranks.membership.epoch, ranks.membership.size) == (1, 3)
    assert [w["rank"] for w in ranks.where] == [0, 1, 2]
    assert ranks.where[2]["pid"] == came.where["pid"] != gone
    assert ranks.save("", NOBODY) == [{"rank": 1}, {"rank": 2}, {"rank": 3}]
    assert not running(gone)
    ranks.ask(1)
    assert polled(ranks, lambda: ranks.newcomers.count(Stage.READY) == 1) == []
    assert asked[1][0] == "rank-5"  # an id is never used twice, that of one who was withdrawn neither


@pytest.mark.parametrize("when", ["while it builds", "when it is ready"])
def test_a_newcomer_that_fails_is_given_up_and_told_and_for_a_while_none_is_asked_for(ranks, when):
    ranks.newcomers.prepare = lambda n: n.actor.prepare.remote("no such file" if when == "while it builds" else "")
    ranks.ask(1)
    if when == "when it is ready":
        assert polled(ranks, lambda: ranks.newcomers.count(Stage.READY) == 1) == []
        (newcomer,) = ranks.newcomers._coming
        os.kill(newcomer.where["pid"], signal.SIGKILL)
    (told,) = polled(ranks, lambda: ranks.newcomers.count(*Stage) == 0)
    assert told.startswith("rank-3 on ")
    assert told.endswith("none is asked for in 30 s")
    assert ("no such file" in told) == (when == "while it builds")
    ranks.ask(1)
    assert ranks.newcomers.count(*Stage) == 0
    assert ranks.save("", NOBODY) == [{"rank": 0}, {"rank": 1}, {"rank": 2}]


def test_newcomers_go_with_the_run(request):
    made = Ranks(config(), request.node.name, False, bool, LightRank)
    made.newcomers.prepare = lambda n: n.actor.prepare.remote("")
    made.ask(2)
    polled(made, lambda: made.newcomers.count(Stage.READY) == 2)
    pids = [n.where["pid"] for n in made.newcomers._coming]
    assert made.kill() == []
    assert not any(running(pid) for pid in pids)
    assert [g["name"] for g in placement_group_table().values() if g["state"] != "REMOVED"] == []
