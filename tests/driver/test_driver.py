"""The whole driver on fake ranks: the order of its calls, its events and states, requests, failures, listeners."""

import json
import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from ray_ep.collective import Membership
from ray_ep.driver.requests import Request, RequestKind
from ray_ep.driver.states import State
from ray_ep.errors import LostError, RankError
from ray_ep.placement import Placement, contiguous
from ray_ep.placement.planner.verdict import Verdict
from ray_ep.rank.saved.checkpoint import Directory
from tests.driver.fakes import Ear, driven
from tests.driver.scenes import EXPERTS, LAYERS, RANKS, Shelf

MOVE = Verdict(replace(contiguous(LAYERS, EXPERTS, RANKS, 5), version=1), "move 2 experts", 0.15, 0.05, 1.0, 0.5)


def die():
    raise RankError(1, "rank 1 on beta died: killed")


def lose(rank=1, words="rank 1 on beta died: killed"):
    raise LostError(rank or 0, words, () if rank is None else (rank,))


def whole(it):
    """Form and run to the end."""
    with it.driver.told():
        it.driver.form()
        return it.driver.run()


def moving(it):
    """Let decisions of the formed driver wait until the test has them made."""
    it.driver.form()
    shelf = it.driver.mover.rebalancer.background = Shelf()
    return shelf


def test_a_run_calls_its_ranks_in_this_order_and_tells_what_it_did(tmp_path, caplog):
    it = driven(tmp_path, "optim.steps=3", "checkpoint.every=2", "topology.measure=true")
    with caplog.at_level(logging.INFO, "ray_ep.driver"):
        assert whole(it) == "done"
    assert it.ranks.calls == [
        "reach", "transports", "join", "probe", "gpu_links", "build", "choose_exchange", "snapshot",
        "train_step", "train_step", "evaluate", "statistics", "save", "train_step", "evaluate", "statistics", "save",
    ]  # fmt: skip
    heard = [getattr(x, "kind", "step") for x in it.ear.heard]
    assert heard == [
        "state", "members", "placement", "start", "exchange", "step", "step", "checkpoint", "step",
        "state", "checkpoint", "state",
    ]  # fmt: skip
    assert [r.message for r in caplog.records] == [
        "state from=forming to=stepping why='2 ranks are formed, 0 steps are done'",
        "state from=stepping to=draining why='after step 3'",
        "state from=draining to=stopped why='done'",
    ]


def test_what_ranks_compute_on_is_told_where_it_is_not_what_one_would_expect(tmp_path):
    it = driven(tmp_path)
    it.ranks.note = "GPUs are left"
    it.driver.form()
    it.publisher.flush()
    told = [(e["kind"], e["message"], e["fields"]) for e in it.run.events()]
    assert ("device", "GPUs are left", {"device": "cpu"}) in told


def test_files_hold_every_record_with_its_figures_and_metrics_have_the_keys_that_they_had(tmp_path):
    it = driven(tmp_path, "optim.steps=2")
    whole(it)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    usual = (
        "step loss grad_norm lr tokens step_seconds tokens_per_second exchange_seconds expert_seconds phase_seconds "
        "peak_mib statistics_seconds bytes_intra_node bytes_inter_node balancedness world_size epoch placement_version "
        "aux_loss z_loss imbalance_before imbalance_after guests guest_bytes balance_saved_predicted "
        "balance_saved_measured max_expert_load migration_seconds rebalance_seconds"
    )
    assert [" ".join(m) for m in lines] == [usual, f"{usual} eval_loss eval_seconds"]
    start = next(e for e in it.run.events() if e["kind"] == "start")
    assert list(start) == ["time", "step", "kind", "message", "fields"]
    assert (start["fields"]["ranks"], start["fields"]["experts"]) == (2, 8)
    assert json.loads((tmp_path / "topology.json").read_text())["node_of"] == [0, 0]
    assert [p.name for p in (tmp_path / "placements").iterdir()] == ["0000.json"]


def test_a_request_to_stop_that_is_put_between_steps_ends_the_run_with_a_checkpoint(tmp_path):
    it = driven(tmp_path)
    it.ranks.meanwhile["train_step", 2] = lambda: it.requests.put(Request(RequestKind.STOP, "a client"))
    assert whole(it) == "interrupted"
    assert it.ranks.calls.count("train_step") == 2
    assert it.ear.steps()[-1].rebalance_seconds is None  # experts are not moved any more
    assert Directory(f"{tmp_path}/checkpoints").steps() == [2]


def test_a_request_to_rebalance_is_answered_after_the_next_step_with_the_figures_of_the_verdict(tmp_path):
    it = driven(tmp_path, "placement.every=0")
    shelf = moving(it)

    asked = Request(RequestKind.REBALANCE, "me")
    it.ranks.meanwhile["train_step", 2] = lambda: it.requests.put(asked)
    it.ranks.meanwhile["train_step", 3] = lambda: shelf.make(MOVE)
    it.driver.run()
    (moved,) = [e for e in it.run.events() if e["kind"] == "rebalance"]
    assert moved["message"].endswith("(asked after step 2: on demand)")
    assert (asked.answer.result().words, asked.answer.result().refused) == (moved["message"], None)
    fields = moved["fields"]
    assert (fields["moves"], fields["placement_version"], fields["asked_after"]) == (True, 1, 2)
    assert (fields["step_predicted"], fields["gain_predicted"], fields["move_predicted"]) == (0.15, 0.05, 1.0)
    assert [m["placement_version"] for m in it.run.metrics()] == [0, 0, 0, 1, 1]
    assert it.run.metrics()[2]["migration_seconds"] > 0
    assert it.driver.states.now is State.STOPPED


@pytest.mark.parametrize(
    ("call", "state"),
    [
        (("build", 1), State.FORMING),
        (("train_step", 3), State.STEPPING),
        (("migrate", 1), State.MIGRATING),
        (("evaluate", 1), State.STEPPING),
        (("save", 1), State.STEPPING),
        (("save", 2), State.DRAINING),
    ],
)
def test_a_rank_that_is_lost_in_any_state_ends_the_run_from_that_state_with_one_event(tmp_path, caplog, call, state):
    it = driven(tmp_path, "placement.every=1", "checkpoint.every=3")
    it.ranks.meanwhile["train_step", 2] = lambda: shelf.make(MOVE)
    it.ranks.meanwhile[call] = die

    def told():
        nonlocal shelf
        with it.driver.told():
            shelf = moving(it)
            it.driver.run()

    shelf = None
    with caplog.at_level(logging.INFO, "ray_ep.driver"), pytest.raises(RankError):
        told()
    assert caplog.messages[-1].startswith(f"state from={state.value} to=stopped why='rank 1 on beta died")
    assert it.ranks.counts[call[0]] == call[1]
    failed = [e for e in it.run.events() if e["kind"] == "failed"]
    assert len(failed) == (0 if state is State.FORMING else 1)  # a run that never formed has left no directory
    assert (tmp_path / "config.yaml").exists() == bool(failed)


LOST = [
    ("train_step", 3, [1, 2]),
    ("migrate", 1, [1]),  # step 2 has not been told, and is made again
    ("evaluate", 1, [1]),
    ("save", 1, [1, 2, 3]),
    ("snapshot", 2, [1, 2]),
    ("save", 2, [1, 2, 3, 4, 5]),  # the last one
]


@pytest.mark.parametrize(("call", "number", "told"), LOST)
def test_who_is_left_goes_on_from_the_newest_snapshot_wherever_a_rank_is_lost(tmp_path, caplog, call, number, told):
    it = driven(tmp_path, "checkpoint.every=3", "snapshot.every=2", "placement.every=1")
    it.ranks.meanwhile["train_step", 2] = lambda: shelf.make(MOVE) if call == "migrate" else None
    it.ranks.meanwhile[call, number] = lose
    shelf = moving(it)
    before = it.driver.mover
    with caplog.at_level(logging.INFO, "ray_ep.driver"):
        assert it.driver.run() == "done"
    steps = [r.step for r in it.ear.steps()]
    back = {"train_step": 2, "migrate": 0, "evaluate": 0, "snapshot": 0}.get(call, 2 if number == 1 else 4)
    assert steps == [*told, *range(back + 1, 6)]
    (words,) = it.ear.words("recovered")
    again = {"train_step": 2, "migrate": 2, "evaluate": 2, "snapshot": 2}.get(call, 3 if number == 1 else 5) - back
    assert words.startswith(
        "rank 1 on beta died: killed; 1 rank goes on in epoch 1: all go back to the snapshot of step"
    )
    assert (f"{again} step" in words) == (again > 0)
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert set(event["fields"]["seconds"]) == {"detect", "decide", "regroup", "restore", "first_step"}
    assert (event["fields"]["lost"], event["fields"]["done"], event["fields"]["repeated"]) == (["m1"], back, again)
    assert it.driver.mover is not before
    assert it.driver.mover.placement.num_ranks == it.driver.mover.topology.num_ranks == 1
    path = [m.split()[2].removeprefix("to=") for m in caplog.messages if m.startswith("state ")]
    assert path.count("recovering") == 1
    assert path[path.index("recovering") + 1] == "stepping"
    assert path[-2:] == ["draining", "stopped"]
    left = it.ranks.calls[it.ranks.calls.index("lose") :]
    assert left[:5] == ["lose", "states", "settle", "join", "restore"]
    assert "snapshot" not in left, "one rank alone has nobody to keep its state"


@pytest.mark.parametrize(
    ("call", "number"), [("states", 1), ("settle", 1), ("join", 2), ("restore", 1), ("migrate", 1)]
)
def test_a_rank_that_is_lost_while_others_recover_begins_the_recovery_anew(tmp_path, call, number):
    it = driven(tmp_path, size=4)
    it.ranks.meanwhile["train_step", 3] = lose
    it.ranks.meanwhile[call, number] = lambda: lose(2, "rank 2 on gamma died: killed")
    assert whole(it) == "done"
    assert it.ranks.membership == Membership(2, ("m0", "m2"), (0, 0))
    assert [r.step for r in it.ear.steps()] == [1, 2, *range(1, 6)]
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert event["fields"]["lost"] == ["m1", "m3"]


@pytest.mark.parametrize("saved", [True, False])
def test_a_rank_that_is_lost_with_its_keeper_costs_the_steps_since_the_checkpoint_or_the_run(tmp_path, saved):
    it = driven(tmp_path, f"checkpoint.every={2 * saved}", "checkpoint.every_minutes=0", size=4)
    it.ranks.meanwhile["train_step", 4] = lambda: lose(1)
    it.ranks.meanwhile["join", 2] = lambda: lose(0, "rank 0 on alpha died: killed")
    if not saved:
        with pytest.raises(
            RankError, match=r"(?s)rank 1 on beta.*what m0, m1 owned is held by nobody else.*would have"
        ):
            whole(it)
        return
    assert whole(it) == "done"
    assert [r.step for r in it.ear.steps()] == [1, 2, 3, 3, 4, 5]
    (event,) = [e for e in it.run.events() if e["kind"] == "recovered"]
    assert "what m0, m1 owned is held by nobody else" in event["message"]
    assert "all go back to the checkpoint of step 2; 1 step is made again" in event["message"]
    after = it.ranks.calls[-it.ranks.calls[::-1].index("lose") :]
    assert after[:6] == ["states", "settle", "join", "build", "load", "choose_exchange"]


@pytest.mark.parametrize(("call", "number", "moved"), [("migrate", 1, 1), ("evaluate", 1, 0), ("evaluate", 3, 0)])
def test_what_was_due_after_a_step_that_counts_is_done_by_those_that_are_left(tmp_path, call, number, moved):
    """Whoever is lost owned nothing, so nobody goes back."""
    it = driven(tmp_path, "eval.every=2", "placement.every=1")
    it.driver.plan.placement = Placement(np.tile([[range(8), [-1] * 8]], (LAYERS, 1, 1)), EXPERTS)
    it.ranks.meanwhile["train_step", 2] = lambda: shelf.make(MOVE) if moved else None
    it.ranks.meanwhile[call, number] = lose
    shelf = moving(it)
    assert it.driver.run() == "done"
    records = it.ear.steps()
    assert [r.step for r in records] == [1, 2, 3, 4, 5]
    assert [r.step for r in records if r.eval_loss is not None] == [2, 4, 5]
    assert it.ranks.counts["restore"] == 0
    assert it.ranks.counts["publish"] == it.ranks.counts["regroup"] == 1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["elastic.min_ranks=2"], "1 ranks are left, elastic.min_ranks=2"),
        (["snapshot.every=0"], "snapshot.every=0: a run without snapshots ends with a lost rank"),
    ],
)
def test_a_run_that_cannot_go_on_ends_with_the_loss_and_says_what_keeps_it(tmp_path, overrides, says):
    it = driven(tmp_path, *overrides)
    it.ranks.meanwhile["train_step", 3] = lose
    with pytest.raises(RankError, match="rank 1 on beta died: killed") as e:
        whole(it)
    assert says in str(e.value)
    assert it.ranks.counts["lose"] == 0
    assert [x["kind"] for x in it.run.events()][-1] == "failed"


def test_a_round_that_fails_again_and_again_with_every_rank_there_ends_the_run(tmp_path):
    it = driven(tmp_path)
    for number in range(3, 20):
        it.ranks.meanwhile["train_step", number] = lambda: lose(None, "rank 0 raised: no answer from the peers")
    with pytest.raises(RankError, match="it failed 3 times, with every rank still there"):
        whole(it)
    assert it.ranks.counts["train_step"] == 2 + 4
    assert it.ranks.counts["publish"] == 3


class Slow(Ear):
    """A listener that is handed a step only once the test lets it go on."""

    def __init__(self):
        super().__init__()
        self.go = threading.Event()

    def step(self, record):
        assert self.go.wait(120)
        super().step(record)


def test_steps_do_not_wait_for_a_slow_listener_but_a_checkpoint_does(tmp_path):
    slow = Slow()
    it = driven(tmp_path, "optim.steps=4", "eval.every=0", listeners=[slow])
    steps_made, committed = threading.Event(), []
    it.ranks.meanwhile["save", 1] = steps_made.set
    running = threading.Thread(target=lambda: committed.append(whole(it)))
    running.start()
    assert steps_made.wait(120)  # all steps are made, and no listener behind the slow one knows of the second
    assert slow.steps() == []
    time.sleep(0.05)
    assert Directory(f"{tmp_path}/checkpoints").steps() == []
    slow.go.set()
    running.join(120)
    assert committed == ["done"]
    assert [r.step for r in slow.steps()] == [1, 2, 3, 4]
    assert Directory(f"{tmp_path}/checkpoints").steps() == [4]


def test_the_failed_event_is_on_disk_before_the_error_leaves_however_far_behind_listeners_are(tmp_path):
    slow = Slow()
    it = driven(tmp_path, listeners=[slow])
    it.ranks.meanwhile["train_step", 3] = die
    threading.Timer(0.2, slow.go.set).start()
    with pytest.raises(RankError):
        whole(it)
    assert [e["kind"] for e in it.run.events()] == [
        "state", "members", "placement", "start", "exchange", "state", "failed",
    ]  # fmt: skip
    assert [m["step"] for m in it.run.metrics()] == [1, 2]


def test_a_listener_that_raises_is_told_of_once_and_ends_no_run(tmp_path):
    class Broken(Ear):
        def step(self, record):
            raise ValueError("no room on the screen")

    it = driven(tmp_path, listeners=[Broken()])
    assert whole(it) == "done"
    assert it.ear.words("listener") == ["Broken raised ValueError: no room on the screen; the run goes on"]
    assert len(it.ear.steps()) == 5
