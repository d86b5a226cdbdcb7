"""The driver on fake ranks while ranks come and go: the order of its calls, and what a loss in a switch leaves."""

from dataclasses import replace

import pytest

from ray_ep.collective import Membership
from ray_ep.driver.requests import Request, RequestKind
from ray_ep.driver.states import State
from ray_ep.errors import LostError, PlacementError
from ray_ep.moe.exchange.choose import Timing
from tests.driver.fakes import CHOICE, driven

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
    assert calls(it, "ask") == ["ask", "end_snapshot", "lose", "join", "regroup", "migrate", "snapshot"]
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
    handing_over = ["end_snapshot", "migrate", "bequeath", "lose", "join", "regroup"]
    assert calls(it, "end_snapshot")[:6] == handing_over
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
    assert any(words.startswith("a change from 2 ranks was cut short: rank ") for words in it.ear.words("elastic"))
    assert lost not in it.ranks.membership.members
    assert "m2" in it.ranks.membership.members
    assert [m["step"] for m in it.run.metrics()][-1] == 6
    assert it.driver.mover.placement.num_ranks == it.ranks.membership.size


@pytest.mark.parametrize("call", ["end_snapshot", "migrate", "bequeath"])
def test_a_rank_that_is_lost_while_leavers_hand_over_costs_what_any_loss_does(tmp_path, call):
    it = driven(tmp_path, *ELASTIC, size=4)
    asked(it, 2, ranks=3)
    it.ranks.meanwhile[call, 1] = lambda: lose(0)
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


def test_ranks_that_do_not_fit_one_another_recover_with_nobody_lost(tmp_path):
    it = growing(tmp_path)

    def refuse():
        raise PlacementError("ranks 0 and 2 differ in updates")

    it.ranks.meanwhile["regroup", 1] = refuse
    assert whole(it) == "done"
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert event["fields"]["lost"] == []
    assert "differ in updates" in event["message"]
    assert it.ranks.membership.size == it.driver.mover.placement.num_ranks == 4
    assert sizes(it)[-1] == 4


@pytest.mark.parametrize("call", ["join", "regroup", "migrate"])
def test_a_run_on_one_rank_that_loses_a_newcomer_in_the_switch_chooses_how_to_exchange_with_the_others(tmp_path, call):
    it = driven(tmp_path, *ELASTIC, size=1)
    it.ranks.meanwhile["choose_exchange", 1] = lambda: replace(CHOICE, transport="memory")
    asked(it, 2, ranks=3)
    it.ranks.newcomers.room = 2
    number = {"join": 2, "regroup": 1, "migrate": 1}[call]
    it.ranks.meanwhile[call, number] = lambda: lose(2)
    assert whole(it) == "done"
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert (event["fields"]["lost"], event["fields"]["ranks"]) == (["m2"], 2)
    assert it.driver.formed.choice == CHOICE


@pytest.mark.parametrize(("kind", "node", "again"), [("auto", 1, 1), ("auto", 0, 0), ("flat", 1, 0)])
def test_ranks_choose_how_to_exchange_again_when_a_second_node_comes(tmp_path, kind, node, again):
    it = driven(tmp_path, *ELASTIC, f"exchange.kind={kind}", "elastic.max_ranks=6")
    for step in (2, 4):
        asked(it, step, ranks=step + 2)
    it.ranks.newcomers.room, it.ranks.newcomers.node = 2, node
    levels = replace(CHOICE, timings=[Timing("two_level", "gloo", 0.1, 3)])
    it.ranks.meanwhile["choose_exchange", 2] = lambda: levels
    assert whole(it) == "done"
    assert it.ranks.counts["choose_exchange"] == 1 + again, "once more, and not at each switch"
    assert it.driver.formed.choice == (levels if again else CHOICE)


def test_newcomers_without_room_for_the_experts_planned_for_them_stay_and_hold_none(tmp_path):
    it = growing(tmp_path)

    def refuse():
        raise PlacementError("no memory")

    it.ranks.meanwhile["migrate", 1] = refuse
    assert whole(it) == "done"
    assert sizes(it) == [2, 2, 4, 4, 4, 4]
    assert it.driver.mover.placement.num_ranks == 4
    assert any("no memory" in words for words in it.ear.words("newcomer"))
    assert not [e for e in it.run.events() if e["kind"] == "recovered"]
    assert set(it.driver.mover.placement.owner.ravel().tolist()) == {0, 1}
