"""What is asked of a run between two steps, on fake ranks: pauses, checkpoints, placements, and losses meanwhile."""

from dataclasses import replace

import numpy as np
import pytest

from ray_ep.driver.requests import Request, RequestKind, Why
from ray_ep.driver.states import State
from ray_ep.errors import LostError, PlacementError
from ray_ep.placement import contiguous
from tests.driver.fakes import driven
from tests.driver.scenes import EXPERTS, LAYERS, RANKS

KIND = RequestKind


@pytest.fixture
def it(tmp_path):
    """A run of five steps; what `asks` has is put when the step of that number is made, or the pause is that old."""
    made = driven(tmp_path, "eval.every=0", "snapshot.every=1")
    made.asked = []

    def put(call, number, *requests):
        def meanwhile():
            [made.requests.put(r) for r in requests]

        made.ranks.meanwhile[call, number] = meanwhile
        made.asked += requests
        return requests[0]

    made.put = put
    made.whole = lambda: whole(made)
    return made


def whole(it):
    with it.driver.told():
        it.driver.form()
        return it.driver.run()


def ask(kind, **fields):
    return Request(kind, "somebody", fields)


def lose(rank):
    raise LostError(rank, f"rank {rank} died: killed", (rank,))


def planned(it):
    """A rank's call takes as long as the decision that is made beside it."""
    planning = getattr(it.driver, "mover", None) and it.driver.mover.rebalancer._planning
    if planning is not None:
        planning.exception(120)


def steps(it):
    return [m["step"] for m in it.run.metrics()]


def test_a_paused_run_makes_no_step_until_it_is_resumed(it):
    pause = it.put("train_step", 2, ask(KIND.PAUSE))
    again = it.put("beat", 2, ask(KIND.PAUSE))
    resume = it.put("beat", 3, ask(KIND.RESUME))
    states = []
    it.ranks.meanwhile["beat", 1] = lambda: states.append((it.driver.states.now, it.driver.done))
    assert it.whole() == "done"
    assert states == [(State.PAUSED, 2)]
    assert pause.answer.result().words == "paused after step 2, as somebody asked: 2 ranks wait in epoch 0"
    assert again.answer.result().words == pause.answer.result().words
    assert resume.answer.result().words == "the run goes on, as somebody asked"
    assert steps(it) == [1, 2, 3, 4, 5]
    assert (len(it.ear.words("paused")), len(it.ear.words("resumed"))) == (1, 1)


def test_a_paused_run_can_be_asked_to_end_and_saves(it):
    it.put("train_step", 2, ask(KIND.PAUSE))
    stop = it.put("beat", 1, ask(KIND.STOP))
    assert it.whole() == "interrupted"
    assert steps(it) == [1, 2]
    assert stop.answer.result().words == "the run has ended after step 2, which is saved"
    assert it.ranks.calls.count("save") == 1


def test_resume_of_what_is_not_paused_and_rebalance_of_what_is_are_not_now(it):
    early = it.put("train_step", 1, ask(KIND.RESUME))
    it.put("train_step", 2, ask(KIND.PAUSE))
    rebalance = it.put("beat", 1, ask(KIND.REBALANCE), ask(KIND.RESUME))
    assert it.whole() == "done"
    assert early.answer.result().refused is Why.NOT_NOW
    assert rebalance.answer.result().refused is Why.NOT_NOW


def test_a_rank_that_is_lost_in_a_pause_is_recovered_from_and_the_pause_goes_on(it):
    it.put("train_step", 2, ask(KIND.PAUSE))
    it.ranks.meanwhile["beat", 2] = lambda: lose(1)
    resume = it.put("beat", 4, ask(KIND.RESUME))
    assert it.whole() == "done"
    assert resume.answer.result().refused is None
    assert it.ear.words("paused")[1].startswith("still paused after step 2, as somebody asked: 1 ranks wait in epoch 1")
    assert steps(it) == [1, 2, 3, 4, 5]
    assert [m["world_size"] for m in it.run.metrics()] == [2, 2, 1, 1, 1]


def test_ranks_come_while_a_run_is_paused(tmp_path):
    it = driven(tmp_path, "elastic.max_ranks=4", "optim.steps=4", "eval.every=0")
    it.ranks.newcomers.room = 2
    scale = ask(KIND.SCALE, ranks=4)
    it.ranks.meanwhile["train_step", 2] = lambda: it.requests.put(ask(KIND.PAUSE))
    it.ranks.meanwhile["beat", 1] = lambda: it.requests.put(scale)
    it.ranks.meanwhile["beat", 6] = lambda: it.requests.put(ask(KIND.RESUME))
    assert whole(it) == "done"
    assert scale.answer.result().words == "scale to 4 ranks (somebody): there are 2"
    assert [m["world_size"] for m in it.run.metrics()] == [2, 2, 4, 4]


def test_a_checkpoint_is_written_when_it_is_asked_for_also_in_a_pause(it, tmp_path):
    early = it.put("train_step", 2, ask(KIND.CHECKPOINT), ask(KIND.PAUSE))
    again = it.put("beat", 1, ask(KIND.CHECKPOINT), ask(KIND.RESUME))
    assert it.whole() == "done"
    url = f"{tmp_path}/checkpoints/step-000002"
    for request in (early, again):
        assert (request.answer.result().words, request.answer.result().value) == (
            f"the checkpoint of step 2 is {url}",
            url,
        )
    assert it.ranks.calls.count("save") == 2, "that of step 2 once, and the last one"


def test_a_checkpoint_that_fails_is_told_and_the_run_goes_on(it):
    def full():
        raise OSError("No space left on device")

    it.ranks.meanwhile["save", 1] = full
    request = it.put("train_step", 2, ask(KIND.CHECKPOINT))
    assert it.whole() == "done"
    assert request.answer.result().refused is Why.FAILED
    assert "No space left on device" in request.answer.result().words
    assert steps(it) == [1, 2, 3, 4, 5]


def swapped():
    """Of contiguous experts the first and the last change places."""
    slots = contiguous(LAYERS, EXPERTS, RANKS).slots.copy()
    slots[:, 0, 0], slots[:, 1, -1] = EXPERTS - 1, 0
    return replace(contiguous(LAYERS, EXPERTS, RANKS), slots=slots, primary=None)


def test_experts_move_to_a_placement_that_somebody_gives(it):
    request = it.put("train_step", 2, ask(KIND.APPLY, placement=swapped()))
    again = it.put("train_step", 4, ask(KIND.APPLY, placement=swapped()))
    assert it.whole() == "done"
    assert request.answer.result().words.startswith("experts have moved to version 1; the planner says: ")
    assert again.answer.result().words == "version 1 is that placement: nothing moves"
    assert it.ranks.calls.count("migrate") == 1
    assert np.array_equal(it.driver.mover.placement.slots, swapped().slots)
    assert [m["placement_version"] for m in it.run.metrics()] == [0, 0, 1, 1, 1]
    assert any(words.startswith("move, as somebody asked") for words in it.ear.words("rebalance"))


def test_the_reason_of_a_pause_is_who_asked_for_it_also_after_a_move_in_it(it):
    it.put("train_step", 2, ask(KIND.PAUSE))
    it.put("beat", 1, ask(KIND.APPLY, placement=swapped()))
    it.put("beat", 2, ask(KIND.STOP))
    assert it.whole() == "interrupted"
    told = [(e["fields"]["to"], e["message"]) for e in it.run.events() if e["kind"] == "state"]
    assert told[-5:] == [
        ("paused", "after step 2, as somebody asked"),
        ("migrating", "placement version 1 after step 2"),
        ("paused", "after step 2, as somebody asked"),
        ("draining", "after step 2, as somebody asked"),
        ("stopped", "interrupted"),
    ]


def test_a_placement_of_other_sizes_or_with_more_slots_is_never(it):
    wide = contiguous(LAYERS, EXPERTS, RANKS, EXPERTS)
    other = it.put("train_step", 1, ask(KIND.APPLY, placement=contiguous(LAYERS, EXPERTS, 4)))
    full = it.put("train_step", 2, ask(KIND.APPLY, placement=wide))
    assert it.whole() == "done"
    assert other.answer.result().refused is full.answer.result().refused is Why.NEVER
    assert "on 4 ranks, the run has 2 layers x 8 experts on 2 ranks" in other.answer.result().words
    assert "fills 8 slots of rank 0, which has 4" in full.answer.result().words
    assert it.ranks.calls.count("migrate") == 0


def test_a_move_that_the_ranks_refuse_leaves_the_placement_as_it_was(it):
    def refuse():
        raise PlacementError("no memory")

    it.ranks.meanwhile["migrate", 1] = refuse
    request = it.put("train_step", 2, ask(KIND.APPLY, placement=swapped()))
    assert it.whole() == "done"
    assert request.answer.result().refused is Why.FAILED
    assert it.driver.mover.placement.version == 0


def test_a_rank_that_is_lost_in_a_move_answers_that_the_run_has_changed(it):
    it.ranks.meanwhile["migrate", 1] = lambda: lose(1)
    request = it.put("train_step", 2, ask(KIND.APPLY, placement=swapped()))
    assert it.whole() == "done"
    assert request.answer.result().refused is Why.CHANGED
    assert steps(it) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("kind", [KIND.PAUSE, KIND.STOP, KIND.CHECKPOINT, KIND.REBALANCE, KIND.SCALE, KIND.APPLY])
@pytest.mark.parametrize("guard", [{"if_epoch": 1}, {"if_version": 3}])
def test_what_is_meant_for_another_epoch_or_placement_is_not_done(it, kind, guard):
    request = it.put("train_step", 2, replace(ask(kind, ranks=2, placement=swapped()), **guard))
    assert it.whole() == "done"
    assert request.answer.result().refused is Why.CHANGED
    assert {"save": it.ranks.calls.count("save"), "migrate": it.ranks.calls.count("migrate")} == {
        "save": 1,
        "migrate": 0,
    }


def test_whoever_asks_for_a_decision_hears_it_and_one_that_comes_too_late_hears_that(it):
    decided = it.put("train_step", 1, ask(KIND.REBALANCE))
    late = it.put("train_step", 5, ask(KIND.REBALANCE))
    it.ranks.look = lambda: planned(it)
    assert it.whole() == "done"
    assert decided.answer.result().refused is None
    assert "(asked after step 1: on demand)" in decided.answer.result().words
    assert late.answer.result().refused is Why.NOT_NOW


def test_who_asks_for_a_decision_hears_it_though_a_rank_is_lost_meanwhile(it):
    decided = it.put("train_step", 1, ask(KIND.REBALANCE))
    it.ranks.meanwhile["train_step", 2] = lambda: lose(1)
    it.ranks.look = lambda: planned(it)
    assert it.whole() == "done"
    assert decided.answer.done()


def test_what_nobody_took_is_answered_at_the_end(it):
    def die():
        raise KeyboardInterrupt

    request = it.put("train_step", 2, ask(KIND.CHECKPOINT))
    it.ranks.meanwhile["train_step", 2] = lambda: (it.requests.put(request), die())
    with pytest.raises(KeyboardInterrupt):
        it.whole()
    assert request.answer.result().refused is Why.ENDED
