"""Who should be a member: what is asked, withdrawn and switched after each step, and what is said, once."""

import pytest

from ray_ep.driver.requests import Why
from ray_ep.errors import LostError, PlacementError
from tests.driver.elastic_scene import drain, scale, scene


def test_a_run_that_has_what_it_should_does_and_says_nothing():
    it = scene()
    assert it.step(5) is None
    assert (it.resizer.calls, it.said) == ([], [])


def test_a_lost_rank_is_asked_for_while_steps_go_on_and_taken_in_when_it_is_ready():
    it = scene()
    it.ranks.change([1])
    assert it.step(3) is None
    assert it.resizer.calls == [("ask", 1)]
    assert it.words() == ["asks for 1 more: the run has 4 (elastic.policy=fixed)"]
    it.resizer.room = 1
    assert it.step() is None  # it builds
    assert it.step() == ("formed", 4)
    last = it.said[-1]
    assert last.kind == "elastic"
    assert last.words == "3 -> 4 ranks in epoch 2, switched in 0.50 s: the run has 4 (elastic.policy=fixed)"
    assert {k: last.fields[k] for k in ("desired", "active", "allocated", "waiting", "joining", "ready")} == {
        "desired": 4, "active": 4, "allocated": 4, "waiting": 0, "joining": 0, "ready": 0,
    }  # fmt: skip
    assert (last.fields["come"], last.fields["planned_leaves"]) == (["m4"], 0)
    assert it.step(3) is None
    assert len(it.said) == 2


def test_without_room_within_wait_s_the_run_goes_on_with_fewer_and_the_next_loss_is_asked_for_anew():
    it = scene()
    it.ranks.change([3])
    it.step(62)
    assert it.resizer.calls == [("ask", 1), ("withdraw", 1)]
    assert "gives up 1 that were to come: the run has 4" in it.words()[-1]
    assert "1 had no room within elastic.wait_s=60 s" in it.words()[-1]
    it.step(100)
    assert len(it.said) == 2
    it.ranks.change([2])
    it.step()
    assert it.resizer.calls[-1] == ("ask", 2)


def test_whoever_asks_after_that_has_the_cluster_asked_anew():
    it = scene()
    it.ranks.change([3])
    it.step(62)
    it.elastic.orders.put(scale(4))
    it.step()
    assert it.resizer.calls == [("ask", 1), ("withdraw", 1), ("ask", 1)]


def test_one_that_has_room_by_then_is_taken_in_and_the_other_is_given_up():
    it = scene()
    it.ranks.change([2, 3])
    it.step(59)
    it.resizer.room = 1
    assert [formed for _ in range(5) if (formed := it.step())] == [("formed", 3)]
    assert ("withdraw", 1) in it.resizer.calls


def test_newcomers_that_get_ready_one_after_another_come_in_by_one_switch():
    it = scene()
    it.elastic.orders.put(scale(6))
    it.step()
    it.resizer.room = 1
    it.step()
    it.resizer.room = 1
    it.step()  # the first is ready, the second builds
    assert it.size() == 4
    assert it.step() == ("formed", 6)


def test_scale_is_carried_out_kept_and_handed_back_to_the_policy():
    it = scene("elastic.min_ranks=2")
    it.elastic.orders.put(scale(2))
    assert it.step() == ("formed", 2)
    assert it.resizer.calls == [("switch", (2, 3), 0)]
    assert it.words()[0] == "scale to 2 ranks (somebody): there are 4"
    assert it.said[0].fields["desired"] == 2
    assert it.counts.planned_leaves == it.said[-1].fields["planned_leaves"] == 2
    assert it.step(5) is None
    assert it.size() == 2
    it.elastic.orders.put(scale(0))
    it.step()
    assert it.resizer.calls[-1] == ("ask", 2)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (scale(1), "scale to 1 rank (somebody) is refused: 1 ranks are too few: allowed are 2 to 8 (elastic.min"),
        (scale(9), "scale to 9 ranks (somebody) is refused: 9 ranks are too many: allowed are 2 to 8 (elastic.max"),
        (scale("x"), "scale to x ranks (somebody) is refused: ranks='x': expected a number"),
        (drain("q"), "drain of 'q' (somebody) is refused: no rank is on a node 'q': those with ranks are a (host hos"),
    ],
)
def test_what_cannot_be_is_said_and_the_run_goes_on(request_, says):
    it = scene("elastic.min_ranks=2")
    it.elastic.orders.put(request_)
    assert it.step(3) is None
    assert it.resizer.calls == []
    (words,) = it.words()
    assert words.startswith(says)


def test_a_scale_under_what_the_experts_need_in_slots_is_refused():
    it = scene("placement.slots_per_rank=4")  # of 8 experts
    it.elastic.orders.put(scale(1))
    it.step()
    assert "allowed are 2 to 8 (placement.slots_per_rank=4, for 8 experts)" in it.words()[0]


def test_a_second_request_waits_for_the_change_that_is_under_way_and_says_so_once():
    it = scene()
    it.elastic.orders.put(scale(6))
    it.elastic.orders.put(scale(3))
    it.step(3)
    assert it.resizer.calls == [("ask", 2)]
    assert it.words()[2:] == ["scale to 3 ranks (somebody) waits: another change is under way"]
    it.resizer.room = 2
    it.step(2)
    assert it.size() == 6
    it.step()
    assert it.size() == 3


def test_a_request_that_cannot_be_is_refused_at_once_also_while_a_change_is_under_way():
    it = scene()
    it.elastic.orders.put(scale(6))
    it.elastic.orders.put(scale(99))
    it.elastic.orders.put(scale(3))
    it.step(3)
    assert "scale to 99 ranks (somebody) is refused: 99 ranks are too many" in it.words()[2]
    assert it.words()[3] == "scale to 3 ranks (somebody) waits: another change is under way"


def test_a_change_that_finds_no_room_makes_way_for_the_next_request():
    it = scene()
    it.elastic.orders.put(scale(8))
    it.elastic.orders.put(scale(5))
    it.step(12)
    assert it.resizer.calls == [("ask", 4), ("withdraw", 3)]


def test_a_request_during_a_recovery_is_queued_and_said():
    it = scene()
    it.elastic.orders.put(scale(3), recovering=True)
    assert it.words() == ["scale to 3 ranks (somebody) waits: the run goes on from a loss first"]
    it.step()
    assert it.size() == 3


def test_all_ranks_of_a_drained_node_leave_together_and_others_are_asked_for_elsewhere():
    it = scene(nodes="aabb")
    it.elastic.orders.put(drain("host-b"))
    assert it.step() == ("formed", 2)
    assert it.resizer.avoided == ("b",)
    assert it.resizer.calls == [("ask", 2), ("switch", (2, 3), 0)]
    assert it.counts.planned_leaves == 2
    assert it.words()[0] == "drain of 'host-b' (somebody): ranks 2, 3 are to leave node b"


def test_a_drain_is_taken_back_also_when_no_rank_is_there_any_more():
    it = scene(nodes="aabb")
    it.elastic.orders.put(drain("host-b"))
    it.step()
    unknown, undo = drain("host-a"), drain("host-b")
    unknown.fields["undo"] = undo.fields["undo"] = True
    it.elastic.orders.put(unknown)
    it.elastic.orders.put(undo)
    it.step(2)
    assert unknown.answer.result().refused is Why.UNKNOWN
    assert unknown.answer.result().words.startswith("no order is to leave a node 'host-a': those to be left are b (")
    assert undo.answer.result().words == "drain of 'host-b', taken back (somebody): ranks may be on node b again"
    assert it.resizer.avoided == ()
    assert not it.elastic.orders.drained


def test_a_node_that_ray_drains_is_left_at_once_and_nothing_counts_as_a_failure():
    it = scene()
    it.drains = {"c": 0, "elsewhere": 5}
    assert it.step() == ("formed", 3)
    assert it.resizer.calls[-1] == ("switch", (2,), 0)
    assert (it.counts.planned_leaves, it.counts.failures) == (1, 0)


def test_the_nearest_deadline_goes_first_and_who_must_stay_is_said_once_and_goes_when_others_have_come():
    it = scene("elastic.min_ranks=3")
    it.drains = {"a": 9000, "b": 1000, "c": 0}
    assert it.step() == ("formed", 3)
    assert it.resizer.calls == [("ask", 3), ("switch", (1,), 0)]
    it.step(4)
    blocked = [w for w in it.words() if "stay until others come" in w]
    assert blocked == [
        "ranks 0, 2 stay until others come: 1 would be left, elastic.min_ranks=3",
        "ranks 0, 1 stay until others come: 1 would be left, elastic.min_ranks=3",
    ]  # the same two, as they are numbered after the first has gone
    it.resizer.room = 3
    it.step(2)
    assert it.resizer.calls[-1] == ("switch", (0, 1), 3)
    assert it.size() == 4


def test_where_every_node_drains_others_come_first_and_then_all_go():
    it = scene(nodes="aa")
    it.drains = {"a": 0}
    it.step()
    it.resizer.room = 2
    it.step(2)
    assert it.size() == 4
    it.step()
    assert [w["node"] for w in it.ranks.where] == ["z", "z"]


def test_available_takes_what_is_free_and_no_more_than_the_most():
    it = scene("elastic.policy=available")
    it.step(3)
    assert it.resizer.calls == []
    it.free = {"a": 1, "x": 9}
    it.step()
    assert it.resizer.calls == [("ask", 4)]
    assert "at most 8 are allowed; the cluster has room for 10 more" in it.words()[0]


def test_throughput_grows_by_what_is_predicted_and_shows_it():
    it = scene("elastic.policy=throughput")
    it.elastic.forecast.step_seconds = {3: 0.4, 4: 0.3, 5: 0.25}
    it.step()
    assert it.resizer.calls == [("ask", 1)]
    assert it.said[0].fields["predicted"] == {"3": 0.4, "4": 0.3, "5": 0.25}
    it.resizer.room = 1
    it.step(2)
    assert it.size() == 5
    assert it.elastic.forecast.step_seconds != {}
    it.step()
    assert it.elastic.forecast.step_seconds == {}, "of other ranks"


def test_advise_tells_each_decision_once_with_its_reason_and_carries_none_out():
    it = scene("elastic.mode=advise", "elastic.policy=available")
    it.free = {"a": 1}
    assert it.step(4) is None
    assert it.resizer.calls == []
    assert it.words() == [
        "advised, and not carried out (elastic.mode=advise): 4 -> 5 ranks: the cluster has room for 1 more "
        "(elastic.policy=available)"
    ]
    assert it.said[0].fields["desired"] == 5
    it.free = {"a": 2}
    it.step(2)
    it.free = {}
    it.step(2)
    it.free = {"a": 2}
    it.step(2)
    assert [e.fields["desired"] for e in it.said] == [5, 6, 6]


def test_with_advise_what_somebody_asks_for_and_a_drain_are_carried_out():
    it = scene("elastic.mode=advise")
    it.drains = {"d": 0}
    assert it.step() == ("formed", 3)
    assert it.step(3) is None
    assert it.resizer.calls == [("switch", (3,), 0)]
    assert it.words() == [
        "advised, and not carried out (elastic.mode=advise): 3 -> 4 ranks: the run has 4 (elastic.policy=fixed)",
        "4 -> 3 ranks in epoch 1, switched in 0.50 s: node d is drained",
    ]
    it.elastic.orders.put(scale(2))
    assert it.step() == ("formed", 2)


def test_with_advise_those_that_a_run_cannot_do_without_are_asked_for_all_the_same():
    it = scene("elastic.mode=advise", "elastic.min_ranks=4")
    it.drains = {"d": 0}
    it.step()
    assert it.resizer.calls == [("ask", 1)]
    it.resizer.room = 1
    it.step(2)
    assert it.resizer.calls[-1] == ("switch", (3,), 1)


def test_a_slow_rank_is_replaced_when_another_is_ready():
    it = scene("elastic.evict_stragglers=true")
    it.slow = ["m1", "m2"]
    it.step()
    assert it.resizer.calls == [("ask", 1)]  # one at a time
    assert it.resizer.avoided == ("b",)
    it.resizer.room = 1
    it.step(2)
    assert it.resizer.calls[-1] == ("switch", (1,), 1)
    assert it.counts.planned_leaves == 1
    assert "ranks in epoch 1, switched in 0.50 s: rank 1 is slow; the run has 4" in it.words()[-1]
    it.step()
    assert it.resizer.calls[-1] == ("ask", 1)


def test_a_slow_rank_that_nobody_can_replace_stays_and_is_let_alone():
    it = scene("elastic.evict_stragglers=true")
    it.slow = ["m1"]
    it.step(70)
    assert it.resizer.calls == [("ask", 1), ("withdraw", 1)]
    assert it.words()[-1].startswith("rank 1 is slow and stays: nobody came in its place")
    said = len(it.said)
    it.step(70)
    assert (len(it.resizer.calls), len(it.said)) == (2, said)


def test_with_advise_a_slow_rank_is_told_and_stays():
    it = scene("elastic.evict_stragglers=true", "elastic.mode=advise")
    it.slow = ["m1"]
    assert it.step(3) is None
    assert it.resizer.calls == []
    assert it.words() == [
        "advised, and not carried out (elastic.mode=advise): rank 1 is slow: another in its place "
        "(elastic.evict_stragglers)"
    ]


def test_with_deepep_nobody_comes_or_goes():
    it = scene("exchange.transport=deepep", "elastic.max_ranks=0", "model.dtype=bfloat16")
    it.drains = {"d": 0}
    for request in (scale(3), drain("c")):
        it.elastic.orders.put(request)
    assert it.step(3) is None
    assert it.resizer.calls == []
    assert all("deepep the number of ranks stays as it is" in w for w in it.words())
    assert len(it.said) == 2


def test_stragglers_are_let_alone_unless_they_are_to_be_evicted():
    it = scene()
    it.slow = ["m1"]
    it.step(3)
    assert it.resizer.calls == []


def test_a_switch_that_the_ranks_refuse_is_said_and_not_tried_at_once_again():
    it = scene()
    it.elastic.orders.put(scale(2))
    it.resizer.refuse = PlacementError("no room for the experts of rank 3")
    assert it.step(5) is None
    assert [w for w in it.words() if "nobody comes or goes" in w] == [
        "nobody comes or goes within 30 s: no room for the experts of rank 3"
    ]
    it.resizer.refuse = None
    assert it.step(30) is None
    assert it.size() == 2


def test_a_rank_that_is_lost_in_a_switch_is_the_loops_affair_and_leavers_that_are_gone_count_as_planned():
    it = scene()
    it.elastic.orders.put(scale(3))

    def lost(now, leave, load):
        it.ranks.change(leave)
        raise LostError(0, "rank 0 died", (0,))

    it.resizer.switch = lost
    with pytest.raises(LostError):
        it.step()
    assert it.counts.planned_leaves == 1


def test_newcomers_that_failed_are_asked_for_again_without_a_word_until_some_are_on_their_way():
    it = scene()
    it.ranks.change([0])
    asks, it.resizer.ask = [], lambda count: asks.append(count)  # shortly after a failure nobody is asked for
    it.step(3)
    assert asks == [1, 1, 1]
    assert it.said == []
