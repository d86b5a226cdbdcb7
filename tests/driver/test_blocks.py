"""Ranks that share a value of a node label: chosen for, and placed on raylets in two blocks of two nodes."""

import time
from collections import Counter

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from ray_ep.config.schema import ClusterConfig
from ray_ep.driver.actors.blocks import choose, fewest, next_block, room_of
from ray_ep.driver.actors.placing import Places
from ray_ep.errors import ClusterError

ROOM = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5), max_size=8)


def test_room_is_what_the_scarcest_resource_has():
    free = {"a": {"CPU": 1.5, "GPU": 1.0}, "b": {"CPU": 8.0}, "c": {"CPU": 0.3 * 3, "GPU": 4.0}}
    assert room_of(free, {"CPU": 0.3, "GPU": 1.0}) == {"a": 1, "b": 0, "c": 3}


def test_the_smallest_that_holds_all_is_taken_else_the_largest_whole_ones_first():
    room = {"a": 4, "b": 2, "c": 3, "d": 0}
    assert fewest(room, 2) == {"b": 2}
    assert fewest(room, 3) == {"c": 3}
    assert fewest(room, 6) == {"a": 4, "b": 2}
    assert fewest(room, 7) == {"a": 4, "c": 3}
    assert fewest(room, 8) == {"a": 4, "c": 3, "b": 1}
    assert fewest(room, 10) == {} == fewest({"d": 0}, 1) == fewest({}, 1)


@given(ROOM, st.integers(1, 40))
def test_no_fewer_places_hold_the_ranks(room, ranks):
    found = fewest(room, ranks)
    holds = sorted(room.values(), reverse=True)
    if sum(holds) < ranks:
        assert found == {}
        return
    assert sum(found.values()) == ranks
    assert all(0 < count <= room[place] for place, count in found.items())
    assert len(found) == next(n for n in range(len(holds) + 1) if sum(holds[:n]) >= ranks)


@given(ROOM, st.dictionaries(st.sampled_from("abcdefgh"), st.sampled_from("XYZ")), st.integers(1, 20))
def test_ranks_fill_blocks_and_nobody_goes_to_a_node_without_the_label(room, block_of, ranks):
    where = choose(room, block_of, ranks)
    inside = Counter()
    for node, holds in room.items():
        if node in block_of:
            inside[block_of[node]] += holds
    assert bool(where) == (inside.total() >= ranks)
    on = Counter(where)
    assert all(node in block_of and count <= room[node] for node, count in on.items())
    blocks = Counter(block_of[node] for node in where)
    assert blocks == Counter(fewest(inside, ranks))
    for block, count in blocks.items():
        there = {node: holds for node, holds in room.items() if block_of.get(node) == block}
        assert sum(block_of[node] == block for node in on) == len(fewest(there, count))


def test_one_more_rank_goes_to_the_block_with_most_ranks_that_has_room_else_to_the_roomiest():
    block_of = {"a": "X", "b": "X", "c": "Y", "d": "Z"}
    room = {"a": 0, "b": 1, "c": 2, "d": 3, "e": 9}
    assert next_block(room, block_of, {"X": 2, "Y": 1}) == "X"
    assert next_block(room | {"b": 0}, block_of, {"X": 2, "Y": 1}) == "Y"
    assert next_block(room, block_of, {}) == "Z"
    assert next_block({"a": 0, "e": 9}, block_of, {"X": 2}) == ""


LABEL = "ep.block"


@pytest.fixture(scope="module")
def nodes():
    """Blocks A and B of two nodes with 2 CPUs each, and a head with 4 CPUs and no label; {node: block}."""
    it = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    block_of = {it.add_node(num_cpus=2, labels={LABEL: block}).node_id: block for block in "ABAB"}
    ray.init(address=it.address, log_to_driver=False, logging_level="ERROR")
    yield block_of
    ray.shutdown()
    it.shutdown()


def places(request, label=LABEL, wait_s=20.0):
    cfg = ClusterConfig(cpus_per_rank=1.0, device="cpu", wait_s=wait_s, block_label=label)
    return Places(cfg, request.node.name, False, bool)


def settled(room, whole):
    """Wait until Ray has taken back what was given up."""
    limit = time.monotonic() + 60
    while sum(room.room().values()) < whole and time.monotonic() < limit:
        time.sleep(0.05)
    assert sum(room.room().values()) == whole


def there(room, group):
    """The room that was asked for, once it is there."""
    limit = time.monotonic() + 60
    while (place := room.have(group)) is None and time.monotonic() < limit:
        time.sleep(0.05)
    return place


@pytest.mark.slow
def test_ranks_are_placed_in_one_block_where_they_fit_and_newcomers_beside_them(request, nodes):
    room = places(request)
    settled(room, 12)
    held = room.take(3)
    (block,) = {nodes[p.node] for p in held}
    assert len({p.node for p in held}) == 2
    asked = [room.ask() for _ in range(2)]  # together: one more is left in that block
    new = [there(room, group) for group in asked]
    assert nodes[new[0].node] == block
    assert nodes[new[1].node] != block
    for place in (*held, *new):
        room.give_up(place)
    settled(room, 12)


@pytest.mark.slow
def test_a_run_that_fits_in_no_block_fills_one_first_and_leaves_nodes_without_the_label(request, nodes):
    room = places(request)
    settled(room, 12)
    held = room.take(5)
    assert sorted(Counter(nodes[p.node] for p in held).values()) == [1, 4]
    asked = [room.ask() for _ in range(4)]
    assert all(there(room, group).node in nodes for group in asked[:3])
    time.sleep(1)
    assert room.have(asked[3]) is None, "the head has room, and no label"
    with pytest.raises(
        ClusterError, match=r"place 1 ranks of 1 CPUs, on nodes with the label ep.block, within cluster.wait_s=0.5 s"
    ):
        places(request, wait_s=0.5).take(1)
    for group in (*asked, *(p.group for p in held)):
        room.withdraw(group)
    settled(room, 12)


@pytest.mark.slow
def test_a_label_that_no_node_has_is_refused_at_once_with_those_that_exist(request, nodes):
    with pytest.raises(ClusterError) as e:
        places(request, label="ep.blok", wait_s=600.0).take(1)
    assert "cluster.block_label='ep.blok': no node has this label; labels that nodes have: ep.block, " in str(e.value)


@pytest.mark.slow
def test_a_draining_node_gets_no_newcomer(request, nodes):  # the last one: a node cannot be taken back
    room = places(request)
    settled(room, 12)
    held = room.take(3)  # 2 and 1: the block's other node has room for one more
    drained = Counter(p.node for p in held).most_common()[-1][0]
    address = ray.get_runtime_context().gcs_address
    preemption = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, _ = GcsClient(address=address).drain_node(drained, preemption, "spot notice", 0)
    assert accepted
    time.sleep(0.5)
    assert drained not in room.room()
    added = there(room, room.ask())
    assert nodes[added.node] != nodes[drained], "its block has no other room"
    for place in (*held, added):
        room.give_up(place)
