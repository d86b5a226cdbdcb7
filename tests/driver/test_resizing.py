"""The driver on fake ranks while ranks come and go: the order of its calls, and what a loss in a switch leaves."""

import pytest

from ray_ep.collective import Membership
from ray_ep.driver.requests import Request, RequestKind
from ray_ep.driver.states import State
from ray_ep.errors import LostError, PlacementError
from tests.driver.fakes import driven

ELASTIC = ("elastic.max_ranks=4", "optim.steps=6", "snapshot.every=1", "eval.every=0")


def lose(rank):
    raise LostError(rank, f"rank {rank} died: killed", (rank,))


def whole(it):
    with it.driver.told():
        it.driver.form()
        return it.driver.run()


def asked(it, step, kind=RequestKind.SCALE, **fields):
    """Somebody asks while a step is made."""
    it.ranks.meanwhile["train_step", step] = lambda: it.requests.put(Request(kind, "me", fields))


def growing(tmp_path, room=2):
    it = driven(tmp_path, *ELASTIC)
    asked(it, 2, ranks=4)
    it.ranks.newcomers.room = room
    return it


def sizes(it):
    return [m["world_size"] for m in it.run.metrics()]


def calls(it, first, last="train_step"):
    """What was called from `first` to the next `last`."""
    left = it.ranks.calls[it.ranks.calls.index(first) :]
    return left[: left.index(last)]


def test_ranks_come_in_between_two_steps_and_a_snapshot_of_all_is_taken_at_once(tmp_path):
    it = growing(tmp_path)
    assert whole(it) == "done"
    assert calls(it, "ask") == ["ask", "lose", "join", "regroup", "migrate", "snapshot"]
    assert sizes(it) == [2, 2, 4, 4, 4, 4]
    assert it.ranks.membership == Membership(1, ("m0", "m1", "m2", "m3"), (0, 0, 0, 0))
    (last,) = [
        e for e in it.run.events() if e["kind"] == "elastic" and "->" in e["message"] and "epoch" in e["message"]
    ]
    assert last["message"].startswith("2 -> 4 ranks in epoch 1, switched in ")
    assert set(last["fields"]["seconds"]) == {"hand_over", "regroup", "give", "move"}
    assert last["fields"]["come"] == ["m2", "m3"]
    assert it.driver.mover.placement.num_ranks == it.driver.mover.topology.num_ranks == 4


def test_who_leaves_hands_over_on_the_old_group_first_and_nothing_is_repeated(tmp_path):
    it = driven(tmp_path, *ELASTIC, size=4)
    asked(it, 2, ranks=3)
    moved = []
    it.ranks.meanwhile["migrate", 1] = lambda: moved.append(it.ranks.membership.size)
    assert whole(it) == "done"
    assert calls(it, "migrate")[:5] == ["migrate", "bequeath", "lose", "join", "regroup"]
    assert moved == [4]
    assert sizes(it) == [4, 4, 3, 3, 3, 3]
    assert [m["step"] for m in it.run.metrics()] == [1, 2, 3, 4, 5, 6]
    assert (it.driver.recovery.departures.planned_leaves, it.driver.recovery.departures.failures) == (1, 0)
    kept = sorted(p.name for p in (tmp_path / "placements").iterdir())
    assert len(kept) == len(set(kept)) >= 3  # to begin with, handed over, theirs alone


@pytest.mark.parametrize("call", ["join", "regroup", "migrate"])
@pytest.mark.parametrize("who", ["newcomer", "old"])
def test_a_rank_that_is_lost_in_the_switch_is_a_loss_like_any_other(tmp_path, call, who):
    it = growing(tmp_path)
    number = {"join": 2, "regroup": 1, "migrate": 1}[call]
    it.ranks.meanwhile[call, number] = lambda: lose(3 if who == "newcomer" else 1)
    assert whole(it) == "done"
    lost = "m3" if who == "newcomer" else "m1"
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert event["fields"]["lost"] == [lost]
    assert lost not in it.ranks.membership.members
    assert "m2" in it.ranks.membership.members
    assert [m["step"] for m in it.run.metrics()][-1] == 6
    assert it.driver.mover.placement.num_ranks == it.ranks.membership.size


def test_a_rank_that_is_lost_while_leavers_hand_over_costs_what_any_loss_does(tmp_path):
    it = driven(tmp_path, *ELASTIC, size=4)
    asked(it, 2, ranks=3)
    it.ranks.meanwhile["bequeath", 1] = lambda: lose(0)
    assert whole(it) == "done"
    assert "m0" not in it.ranks.membership.members
    assert it.driver.mover.placement.num_ranks == it.ranks.membership.size


def test_ranks_that_have_no_room_for_what_a_leaver_owns_keep_it(tmp_path):
    it = driven(tmp_path, *ELASTIC, size=4)
    asked(it, 2, ranks=3)

    def refuse():
        raise PlacementError("no memory")

    it.ranks.meanwhile["migrate", 1] = refuse
    assert whole(it) == "done"
    assert sizes(it) == [4] * 6
    assert it.driver.states.now is State.STOPPED
    assert any("no memory" in words for words in it.ear.words("elastic"))
