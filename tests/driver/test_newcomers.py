"""Newcomers for whom room cannot even be asked: told, given up, and in nobody's way. No Ray."""

from ray_ep.driver.actors.newcomers import Newcomers, Stage
from ray_ep.errors import ClusterError


class NoPlaces:
    """A cluster that refuses to look for room."""

    def __init__(self):
        self.withdrawn = []

    def ask(self):
        raise ClusterError("no node has this label")

    def have(self, group):
        raise AssertionError("there is none")

    def withdraw(self, group):
        self.withdrawn.append(group)


def refused():
    places = NoPlaces()
    newcomers = Newcomers(places, lambda place, member: None, 60.0)
    newcomers.ask(["rank-1"])
    (newcomer,) = newcomers._coming
    assert isinstance(newcomer.group.exception(5), ClusterError)
    return newcomers, places


def test_a_newcomer_whose_room_cannot_be_asked_for_is_told_and_given_up():
    newcomers, places = refused()
    (told,) = newcomers.poll()
    assert told == "rank-1 does not come: no node has this label; none is asked for in 30 s"
    assert newcomers.count(*Stage) == 0
    assert places.withdrawn == []


def test_a_newcomer_whose_room_could_not_be_asked_for_does_not_keep_a_run_from_ending():
    newcomers, _ = refused()
    newcomers.withdraw()
    assert newcomers.count(*Stage) == 0
