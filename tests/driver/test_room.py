"""How many more ranks a cluster has room for, and what a local Ray can never give."""

import pytest

from ray_ep.config import load_config
from ray_ep.driver.elastic.room import EVERY_S, Room, check_growth
from ray_ep.errors import ClusterError
from tests.driver.scenes import Clock, Shelf

FREE = {"a": 3, "b": 0, "c": 8}


def room(ask=lambda: FREE):
    clock, shelf = Clock(), Shelf()
    return Room(ask, clock, shelf), clock, shelf


def test_more_than_a_local_ray_will_ever_have_is_refused_and_a_cluster_may_grow():
    cfg = load_config(None, ["elastic.max_ranks=5", "cluster.cpus_per_rank=0.5"])
    with pytest.raises(ClusterError, match=r"elastic\.max_ranks=5 of 0\.5 CPUs need 2\.5 .* allowed is up to 4"):
        check_growth(cfg, local=True, cpus=2.0)
    check_growth(cfg, local=True, cpus=2.5)
    check_growth(cfg, local=False, cpus=2.0)
    check_growth(load_config(), local=True, cpus=1.0)


def test_it_is_asked_beside_the_steps_from_time_to_time_and_what_was_heard_is_known_meanwhile():
    free, clock, shelf = room()
    assert free() is None
    shelf.make()
    assert free() == {"a": 3, "c": 8}
    assert free(["c"]) == {"a": 3}
    assert shelf.waiting == []
    clock.now += EVERY_S
    assert free() == {"a": 3, "c": 8}
    assert len(shelf.waiting) == 1


def test_what_was_heard_is_forgotten_also_what_is_still_being_asked():
    free, clock, shelf = room()
    free()
    free.forget()
    shelf.make()
    assert free() is None
    clock.now += EVERY_S
    free()
    shelf.make()
    assert free()["a"] == 3


def test_while_there_is_no_answer_nothing_is_known():
    free, clock, shelf = room(lambda: 1 / 0)
    free()
    shelf.make()
    assert free() is None
    clock.now += EVERY_S
    free()
    assert free() is None  # the next question is still open
