"""Every call of the service on a run that goes: what it answers, and what it does to the run."""

import asyncio
import json
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ray_ep.control import board, service
from ray_ep.control.audit import REFUSED, Audit, Entry
from ray_ep.control.board import Board
from ray_ep.control.client import mutation
from ray_ep.control.messages import placement_message, placement_of
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.driver.records import Event
from ray_ep.driver.requests import Where
from ray_ep.errors import BadInput, ControlError, LostError
from ray_ep.observe.state import RunState
from ray_ep.placement import Placement
from tests.control.scene import change, served
from tests.driver.test_asked import swapped


@pytest.fixture
def it(tmp_path):
    with served(tmp_path, "elastic.max_ranks=4", "snapshot.every=1") as run:
        yield run


def test_status_tells_what_the_run_is_at(it):
    it.alive()
    it.until(lambda: it.status_now().step.step, "a step in the status")
    status = it.status_now()
    assert (status.run, status.run_dir) == (it.path.name, str(it.path))
    assert status.state == pb.RUN_STATE_STEPPING
    assert 0 < status.done <= it.driver.done
    assert (status.steps, status.placement_version, status.outcome) == (1_000_000, 0, "")
    assert (status.membership.epoch, status.membership.active, status.membership.desired) == (0, 2, 2)
    assert [(r.rank, r.member, r.host) for r in status.membership.ranks] == [(0, "m0", "alpha"), (1, "m1", "alpha")]
    assert status.step.loss == 1.0
    assert [e.kind for e in status.events][:1] == ["start"] or status.events


def test_words_that_are_no_unicode_are_told_as_far_as_they_are(it):
    it.driver.publisher.event(Event("page", "shown at \udcff"))
    it.until(lambda: "shown at ?" in [e.message for e in it.status_now().events], "the event")


def test_pause_answers_when_the_run_rests_and_resume_when_it_goes_on(it):
    paused = it.call(change(pb.PauseRequest)).outcome
    assert paused.words.startswith(f"paused after step {paused.step}, as control.json from 127.0.0.1 asked: 2 ranks")
    assert it.driver.done == paused.step
    it.until(lambda: it.status_now().state == pb.RUN_STATE_PAUSED, "the state")
    assert it.driver.done == paused.step
    assert it.call(change(pb.PauseRequest)).outcome.words.startswith("paused")
    it.call(change(pb.ResumeRequest))
    assert it.alive()
    with pytest.raises(BadInput, match="the run is not paused"):
        it.call(change(pb.ResumeRequest))


def test_a_checkpoint_is_whole_when_its_answer_comes(it):
    it.alive()
    done = it.call(change(pb.CheckpointRequest))
    assert done.url == f"{it.path}/checkpoints/step-{done.outcome.step:06d}"
    assert (it.path / "checkpoints" / f"step-{done.outcome.step:06d}" / "manifest.json").is_file()


def test_a_checkpoint_that_fails_is_a_failure_of_the_call_and_not_of_the_run(it):
    def full():
        raise OSError("No space left on device")

    it.ranks.meanwhile["save", 1] = full
    it.alive()
    with pytest.raises(ControlError, match="No space left on device"):
        it.call(change(pb.CheckpointRequest))
    assert it.alive()


def test_scale_and_drain_are_answered_when_they_stand_and_drain_is_taken_back(it):
    it.ranks.newcomers.room = 1
    assert "scale to 3 ranks" in it.call(change(pb.ScaleRequest, ranks=3)).outcome.words
    it.until(lambda: it.ranks.membership.size == 3, "a third rank")
    it.until(lambda: it.status_now().membership.desired == 3, "the number in the status")
    with pytest.raises(BadInput, match=r"9 ranks are too many: allowed are 1 to 4 \(elastic.max_ranks=4\)"):
        it.call(change(pb.ScaleRequest, ranks=9))
    with pytest.raises(BadInput, match="no rank is on a node 'beta': those with ranks are a"):
        it.call(change(pb.DrainRequest, node="beta"))
    with pytest.raises(BadInput, match="no node is to be left by an order"):
        it.call(change(pb.DrainRequest, node="alpha", undo=True))
    assert "elastic.policy=fixed decides again" in it.call(change(pb.ScaleRequest)).outcome.words
    it.until(lambda: it.ranks.membership.size == 2, "the third one gone")
    assert "are to leave node a" in it.call(change(pb.DrainRequest, node="alpha")).outcome.words
    it.until(lambda: list(it.status_now().membership.drained) == ["a"], "the order in the status")
    assert "may be on node a again" in it.call(change(pb.DrainRequest, node="a", undo=True)).outcome.words
    assert not it.status_now().membership.drained


def test_rebalance_answers_with_the_decision(it):
    it.alive()
    assert "on demand" in it.call(change(pb.RebalanceRequest)).outcome.words


def test_a_placement_is_read_predicted_and_moved_to(it):
    it.until(lambda: it.driver.done > 3, "steps to predict by")
    now = it.call(pb.GetPlacementRequest())
    assert np.array_equal(placement_of(now.placement).slots, it.driver.mover.placement.slots)
    wanted = placement_message(swapped())
    found = it.call(pb.ProposePlacementRequest(placement=wanted))
    assert (found.moved_slots, found.epoch, found.placement_version) == (4, 0, 0)
    assert found.words
    assert found.step_seconds > 0
    assert it.driver.mover.placement.version == 0, "nothing has moved"
    guarded = change(pb.ApplyPlacementRequest, placement=wanted, epoch=found.epoch, version=found.placement_version)
    moved = it.call(guarded).outcome
    assert (moved.placement_version, it.driver.mover.placement.version) == (1, 1)
    with pytest.raises(ControlError, match="if_placement_version=0: the placement has version 1"):
        it.call(change(pb.ApplyPlacementRequest, placement=wanted, version=0))
    before = it.call(pb.GetPlacementRequest(version=0))
    assert before.placement.slots == now.placement.slots
    with pytest.raises(BadInput, match="version=7: the run has no placement of that version"):
        it.call(pb.GetPlacementRequest(version=7))


def test_the_planners_own_proposal_can_be_moved_to(it):
    it.until(lambda: it.driver.done > 3, "steps to predict by")
    found = it.call(pb.ProposePlacementRequest())
    assert placement_of(found.placement).num_ranks == 2
    assert "planner says" in it.call(change(pb.ApplyPlacementRequest, placement=found.placement)).outcome.words or (
        not found.moved_slots
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (pb.Placement(), "0 slots for 0 layers x 0 ranks x 0 slots"),
        (pb.Placement(layers=1 << 31, ranks=1 << 31, slots_per_rank=9, experts=1), "0 slots for 2147483648 layers"),
        (pb.Placement(layers=1, ranks=1, slots_per_rank=2, experts=2, slots=[0, 9]), "names expert 9"),
        (pb.Placement(layers=1, ranks=1, slots_per_rank=2, experts=2, slots=[0, 0]), "1 of 2 experts have no slot"),
        (pb.Placement(layers=1, ranks=1, slots_per_rank=1, experts=1, slots=[0], primaries=[3]), "does not hold"),
        (pb.Placement(layers=1, ranks=1, slots_per_rank=1, experts=1, slots=[0], shares=[-1.0]), "non-negative"),
        (pb.Placement(layers=1, ranks=1, slots_per_rank=1, experts=1, slots=[0]), "the run has 2 layers x 8 experts"),
    ],
)
def test_a_placement_that_cannot_be_is_refused_with_its_fault(it, wrong, says):
    it.until(lambda: it.driver.done > 1, "a step")
    for request in (pb.ProposePlacementRequest(placement=wrong), change(pb.ApplyPlacementRequest, placement=wrong)):
        with pytest.raises(BadInput, match=says):
            it.call(request)
    assert it.driver.mover.placement.version == 0


def test_stop_answers_when_the_last_checkpoint_is_written_and_later_calls_say_that_it_has_ended(it):
    it.alive()
    with it.client() as client:
        done = client.call(change(pb.StopRequest)).outcome
        assert done.words == f"the run has ended after step {done.step}, which is saved"
        assert (it.path / "checkpoints" / f"step-{done.step:06d}" / "manifest.json").is_file()
        with pytest.raises(ControlError, match="the run has ended"):
            client.call(change(pb.PauseRequest))
    assert it.until(lambda: it.status, "the end") == "interrupted"


def test_a_repeated_request_changes_nothing_and_is_given_the_first_answer(it):
    it.alive()
    request = change(pb.CheckpointRequest)
    first = it.call(request)
    it.alive()
    assert it.call(request) == first
    assert it.ranks.calls.count("save") == 1
    other = pb.PauseRequest(mutation=request.mutation)
    with pytest.raises(BadInput, match="was given to another request"):
        it.call(other)
    assert it.alive()


@pytest.mark.parametrize("number", ["", "a b", "x" * 129, "ä"])
def test_a_request_without_a_proper_id_is_refused(it, number):
    with pytest.raises(BadInput, match="expected 1 to 128 characters"):
        it.call(pb.PauseRequest(mutation=pb.Mutation(request_id=number)))
    assert it.alive()


def held(it):
    """The next step takes until the returned event is set."""
    go, ranks = threading.Event(), it.ranks
    while True:
        long = "train_step", ranks.counts["train_step"] + 3
        ranks.meanwhile[long] = lambda: go.wait(120) and None
        it.until(lambda at=long: at not in ranks.meanwhile or ranks.counts["train_step"] > at[1], "the long step")
        if ranks.meanwhile.pop(long, None) is None:  # else it was made before it was known to be long
            return go


def test_what_is_given_up_before_it_was_begun_is_not_carried_out(it):
    go = held(it)
    request = change(pb.PauseRequest)
    audit = it.path / "audit.jsonl"

    def given_up():
        with pytest.raises(ControlError, match=r"no answer within 0\.3 s"):
            it.call(request, 0.3)
        return audit.exists() and '"CANCELLED"' in audit.read_text()  # else it came too late to be noted

    it.until(given_up, "the record")
    go.set()
    assert it.alive()
    assert it.call(request).outcome.words.startswith("paused"), "its id is as new"


def test_one_placement_at_a_time_is_predicted(it):
    it.until(lambda: it.driver.done > 3, "steps to predict by")
    go, answers = held(it), []
    first = threading.Thread(target=lambda: answers.append(it.call(pb.ProposePlacementRequest())))
    first.start()
    it.until(lambda: not it.requests._queue.empty(), "its question")
    with pytest.raises(ControlError, match="another placement is being predicted: ask again soon"):
        it.call(pb.ProposePlacementRequest())
    go.set()
    first.join(120)
    assert answers[0].words
    assert it.call(pb.ProposePlacementRequest()).words


def test_two_callers_with_one_id_are_answered_and_one_that_gives_up_takes_nothing_from_the_other(it):
    go = held(it)
    request, answers = change(pb.PauseRequest), []
    patient = threading.Thread(target=lambda: answers.append(it.call(request)))
    patient.start()
    it.until(lambda: not it.requests._queue.empty(), "its request")
    with pytest.raises(ControlError, match="no answer within"):
        it.call(request, 0.3)
    go.set()
    patient.join(120)
    assert answers[0].outcome.words.startswith("paused")


def test_watchers_see_changes_and_the_end(it):
    seen = []
    with it.client() as client:
        for status in client.watch(0.2):
            seen.append(status)
            if len(seen) == 2:
                it.call(change(pb.PauseRequest))
            if status.state == pb.RUN_STATE_PAUSED:
                it.call(change(pb.StopRequest))
    assert seen[0].state == pb.RUN_STATE_STEPPING
    assert any(s.state == pb.RUN_STATE_PAUSED for s in seen)
    assert seen[-1].outcome == "interrupted"
    done = [s.done for s in seen]
    assert done == sorted(done)


def test_who_watches_leaves_room_for_who_steers(it, monkeypatch):
    monkeypatch.setattr(service, "WATCHERS", 2)
    with it.client() as client:
        watching = [client.watch(0.2) for _ in range(2)]
        assert all(next(w).run for w in watching)
        with pytest.raises(ControlError, match="2 watch already: ask for the status instead"):
            next(client.watch(0.2))
        watching.pop().close()
        it.until(lambda: it.controls[0]._board.watchers == 1, "one has gone")
        assert next(client.watch(0.2)).run


def test_many_watchers_are_sent_less_each_and_are_let_go_with_the_last_status_all_the_same(it, monkeypatch):
    monkeypatch.setattr(board, "SENT", 0.001)
    with it.client() as client:
        watching = client.watch(0.2)
        first = next(watching)
        it.until(lambda: it.status_now().done > first.done + 3, "news")
        it.call(change(pb.StopRequest))
        assert [s.outcome for s in watching] == ["interrupted"]


def test_who_watches_as_often_is_sent_a_status_on_the_same_beat_and_not_sooner_than_asked_for(tmp_path):
    async def main():
        made, now = Board(RunState(tmp_path), lambda: Where(0, 0, 0)), 1000.0
        made._loop = SimpleNamespace(time=lambda: now)
        for since in (1000.0, 1000.2, 1000.6):
            due, beats = since, []
            for _ in range(3):
                due = made._together(due, 0.7)
                beats.append(round(due / 0.7, 6))
            assert due >= since + 3 * 0.7 - 1e-6
            assert beats == [math.ceil((since + 0.7) / 0.7 - 1e-6) + n for n in range(3)]
        now = 1100.05
        assert made._together(1000.0, 0.5) == pytest.approx(1100.5), "who was late is not sent all that was missed"

    asyncio.run(main())


def test_a_watcher_that_asks_too_often_is_refused(it):
    with it.client() as client, pytest.raises(BadInput, match=r"every_seconds=0\.01: allowed are 0\.2 to 3600, or 0"):
        list(client.watch(0.01))


def test_a_rank_that_is_lost_in_a_move_aborts_the_call(it):
    def lose():
        raise LostError(1, "rank 1 died: killed", (1,))

    it.until(lambda: it.driver.done > 3, "steps")
    it.ranks.meanwhile["migrate", 1] = lose
    with pytest.raises(ControlError, match="a rank was lost meanwhile: rank 1 died"):
        it.call(change(pb.ApplyPlacementRequest, placement=placement_message(swapped())))
    assert it.alive()


def test_every_change_is_in_the_audit_with_who_what_from_where_and_its_result(it):
    it.call(pb.PauseRequest(mutation=pb.Mutation(request_id="one")))
    with pytest.raises(ControlError):
        it.call(pb.ResumeRequest(mutation=mutation(epoch=5)))
    it.call(change(pb.ResumeRequest))
    lines = [json.loads(x) for x in (it.path / "audit.jsonl").read_text().splitlines()]
    assert [(e["what"], e["result"]) for e in lines[::2]] == [(e["what"], "ASKED") for e in lines[1::2]]
    paused, aborted, resumed = lines[1::2]
    assert (paused["who"], paused["role"], paused["what"], paused["id"]) == ("control.json", "operator", "Pause", "one")
    assert paused["where"].startswith("ipv4:127.0.0.1:")
    assert (paused["result"], aborted["result"], resumed["result"]) == ("OK", "ABORTED", "OK")
    assert "if_epoch=5" in aborted["words"]
    assert (it.path / "audit.jsonl").stat().st_mode & 0o777 == 0o600
    assert paused["time"] <= aborted["time"]


def test_a_change_that_cannot_be_recorded_is_not_made(it):
    audit = it.path / "audit.jsonl"
    audit.mkdir()
    for _ in range(2):
        with pytest.raises(BadInput, match=r"no change is made without its record: .*audit.jsonl cannot be written"):
            it.call(change(pb.PauseRequest))
    assert it.alive()
    assert it.until(lambda: it.said("not-written"), "the event") == [
        f"{audit} cannot be written: Is a directory: until it can, nobody is granted a change"
    ]
    audit.rmdir()
    assert it.call(change(pb.PauseRequest)).outcome.words.startswith("paused")


def test_who_has_no_right_to_changes_fills_no_disk(tmp_path):
    now = [0.0]
    audit = Audit(tmp_path, lambda words: None, lambda: now[0])

    def ask(role):
        audit.write(Entry("somebody" if role else "", role, "here", "Pause", "", "", "PERMISSION_DENIED", "", 0.0))
        return [json.loads(x) for x in audit.path.read_text().splitlines()]

    for role in ("viewer", "") * 100:
        left = ask(role)
    assert len(left) == REFUSED
    assert ask("operator")[-1]["left_out_before"] == 200 - REFUSED
    now[0] = 61.0
    assert len(ask("viewer")) == REFUSED + 2


def test_a_placement_that_was_sent_is_the_one_that_arrives():
    shares = np.arange(16, dtype=float).reshape(2, 2, 4) + 1
    sent = Placement(swapped().slots, 8, 3, None, shares)
    got = placement_of(placement_message(sent))
    assert np.array_equal(got.slots, sent.slots)
    assert np.array_equal(got.owner, sent.owner)
    assert np.array_equal(got.shares, shares)
