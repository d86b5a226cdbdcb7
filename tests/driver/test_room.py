"""How many more ranks a cluster has room for, and what a local Ray can never give."""

import pytest
import ray

from ray_ep.config import load_config
from ray_ep.driver.elastic.room import EVERY_S, Room, bundle_of, check_growth, room_by_node
from ray_ep.errors import ClusterError
from tests.driver.scenes import Clock, Shelf

FREE = {"a": {"CPU": 3.0, "GPU": 1.0}, "b": {"CPU": 0.9999999}, "c": {"CPU": 8.0, "GPU": 4.0}, "d": {"GPU": 2.0}}


def test_the_scarcest_resource_of_each_node_says_how_many_fit():
    assert room_by_node(FREE, {"CPU": 1.0}) == {"a": 3, "b": 1, "c": 8}
    assert room_by_node(FREE, {"CPU": 2.0, "GPU": 1.0}) == {"a": 1, "c": 4}
    assert room_by_node(FREE, {"CPU": 0.3}, avoid=["c"]) == {"a": 10, "b": 3}


def test_a_rank_takes_its_cpus_and_a_gpu_of_its_own():
    cfg = load_config(None, ["cluster.cpus_per_rank=0.5"])
    assert bundle_of(cfg, cuda=True) == {"CPU": 0.5, "GPU": 1.0}
    assert bundle_of(cfg, cuda=False) == {"CPU": 0.5}


def test_more_than_a_local_ray_will_ever_have_is_refused_and_a_cluster_may_grow():
    cfg = load_config(None, ["elastic.max_ranks=5", "cluster.cpus_per_rank=0.5"])
    with pytest.raises(ClusterError, match=r"elastic\.max_ranks=5 of 0\.5 CPUs need 2\.5 .* allowed is up to 4"):
        check_growth(cfg, local=True, cpus=2.0)
    check_growth(cfg, local=True, cpus=2.5)
    check_growth(cfg, local=False, cpus=2.0)
    check_growth(load_config(), local=True, cpus=1.0)


def test_ray_is_asked_beside_the_steps_from_time_to_time_and_what_it_said_is_known_meanwhile():
    clock, shelf = Clock(), Shelf()
    room = Room({"CPU": 1.0}, lambda: FREE, clock, shelf)
    assert room() is None
    shelf.make()
    assert room()["c"] == 8
    assert "c" not in room(["c"])
    assert shelf.waiting == []
    clock.now += EVERY_S
    assert room()["c"] == 8
    assert len(shelf.waiting) == 1


def test_what_was_heard_is_forgotten_also_what_is_still_being_asked():
    clock, shelf = Clock(), Shelf()
    room = Room({"CPU": 1.0}, lambda: FREE, clock, shelf)
    room()
    room.forget()
    shelf.make()
    assert room() is None
    clock.now += EVERY_S
    room()
    shelf.make()
    assert room()["a"] == 3


def test_while_ray_does_not_answer_nothing_is_known():
    clock, shelf = Clock(), Shelf()
    room = Room({"CPU": 1.0}, lambda: 1 / 0, clock, shelf)
    room()
    shelf.make()
    assert room() is None


@pytest.mark.slow
def test_what_a_real_ray_has_free_shrinks_by_what_is_taken(cluster):
    with ray.init(address=cluster.driver, namespace="room", logging_level="ERROR", log_to_driver=False):
        clock = Clock()
        room = Room({"CPU": 0.5}, clock=clock)

        def heard():
            while (found := room()) is None:
                pass
            return found

        (before,) = heard().values()
        group = ray.util.placement_group([{"CPU": 0.5}])
        assert group.wait(10)
        clock.now += EVERY_S
        room()
        while room._asking is not None:
            room()
        assert sum(room().values()) == before - 1
        ray.util.remove_placement_group(group)
