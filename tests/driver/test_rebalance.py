"""When experts are moved, whether, and what is made of it: decisions with a clock of the test's own, no ranks."""

import math
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.config import load_config
from ray_ep.driver.mover import Mover, check_survival, level_of
from ray_ep.driver.rebalance import MOST_CAUTION, WINDOW, Rebalancer, beside
from ray_ep.driver.recent import NOW, Facts, Recent, Step
from ray_ep.driver.rundir import RunDir
from ray_ep.driver.verdict import LEAST, Question, Verdict, decide, room_of
from ray_ep.errors import PlacementError, RankError
from ray_ep.placement import Placement, RoutingStatistics, StepCosts, Topology, contiguous, moves
from ray_ep.rank.rank import StepResult, Usage

LAYERS, EXPERTS, RANKS = 2, 8, 2
FACTS = Facts(tokens_per_rank=512, hidden=32, parameters=1000, item_bytes=4, state_bytes=12, passes=2, kind="flat")
NOWHERE = contiguous(LAYERS, EXPERTS, RANKS)


def topology(bandwidth=1e9, node_of=(0, 0)):
    n = len(node_of)
    return Topology(np.full((n, n), float(bandwidth)), np.full((n, n), 1e-5) * (1 - np.eye(n)), np.array(node_of))


def tokens(skewed, count=512):
    """Sets [L, N, 2]; skewed: half of the tokens choose experts 0 and 1, which contiguous puts on one rank."""
    number = np.arange(count)[:, None] * 2 + np.arange(2)
    sets = number % EXPERTS
    if skewed:
        sets = np.where(np.arange(count)[:, None] % 2 == 0, np.arange(2), sets)
    return np.stack([sets] * LAYERS).astype(np.int32)


def statistics(skewed=True):
    sets = tokens(skewed)
    return RoutingStatistics(np.stack([np.bincount(s.ravel(), minlength=EXPERTS) for s in sets]), sample=sets)


def question(skewed=True, **changes):
    costs = StepCosts(512, 256.0, 2e-5, 2e5, 6e5, None, False)
    given = {
        "statistics": statistics(skewed), "topology": topology(), "current": NOWHERE, "slots": 4, "costs": costs,
        "level": "rank", "step_seconds": 0.2, "moe_seconds": 0.1, "horizon_steps": 1000,
    }  # fmt: skip
    return Question(**given | changes)


def step(experts=(0.03, 0.01), pairs=((900, 900), (300, 300)), seconds=0.2, exchange=(0.01, 0.03), load=None, sent=0):
    load = statistics().load if load is None else np.asarray(load)
    sent = np.full((RANKS, RANKS), sent, np.float64)
    return Step(load, np.array(pairs), np.array(experts), np.array(exchange), sent, seconds)


# --- the verdict


def test_a_move_that_pays_is_made_and_says_what_and_why():
    v = decide(question())
    assert len(moves(NOWHERE, v.placement)) > 0
    assert v.words.startswith(f"move {len(moves(NOWHERE, v.placement))} experts: predicted step 200 -> ")
    assert v.words.endswith(" steps")
    assert "costs" in v.words
    assert v.placement.version == 1
    assert v.step_seconds == pytest.approx(0.2 - v.gain)


def test_even_routing_stays():
    v = decide(question(skewed=False))
    assert (v.placement, v.words) == (None, "stay: no other places are worth a move (step 200 ms)")


def test_a_move_over_links_too_slow_to_pay_back_in_time_stays_and_says_so():
    costs = StepCosts(512, 0.0, 2e-5, 2e10, 6e10, None, False)  # no traffic, but very large experts
    v = decide(question(costs=costs, horizon_steps=100))
    assert v.placement is None
    assert v.words.startswith("stay: ")
    ample = decide(question(costs=costs, horizon_steps=10**7))
    assert ample.placement is not None


def test_no_more_is_promised_than_the_expert_layers_take():
    assert 0 < decide(question(moe_seconds=0.01)).gain < 0.01


def test_a_gain_within_noise_stays():
    v = decide(question(step_seconds=60.0))
    assert v.placement is None
    assert "less than the 1% that a move must promise" in v.words


@settings(max_examples=30, deadline=None)
@given(
    caution=st.floats(1, MOST_CAUTION),
    slower=st.floats(1, 1e6),
    horizon=st.integers(1, 10**5),
    moe=st.floats(1e-4, 10),
    bandwidth=st.floats(1e5, 1e12),
)
def test_whatever_is_adopted_keeps_the_rules(caution, slower, horizon, moe, bandwidth):
    q = question(
        caution=caution, slower=slower, horizon_steps=horizon, moe_seconds=moe, topology=topology(bandwidth)
    )  # fmt: skip
    v = decide(q)
    assert v.words.startswith("move " if v.placement is not None else "stay: ")
    assert v.gain <= moe * (1 + 1e-9)
    if v.placement is not None:
        assert v.gain >= LEAST * caution * q.step_seconds
        assert v.cost * caution <= v.gain * horizon
        assert v.cost == pytest.approx(v.links * slower)
    else:
        assert v.gain < LEAST * caution * q.step_seconds or v.cost * caution > v.gain * horizon


def test_experts_are_put_where_lost_nodes_do_not_take_them_even_if_nothing_is_gained():
    v = decide(question(skewed=False, slots=8, topology=topology(node_of=(0, 1)), survive_nodes=1, horizon_steps=1))
    assert all(len(v.placement.ranks_of(i, e)) == 2 for i in range(LAYERS) for e in range(EXPERTS))
    assert "outlives 1 lost node" in v.words


def test_slots_are_those_configured_or_those_in_use():
    uneven = Placement(np.array([[[0, 1, 2], [3, 4, -1]], [[0, 1, 2], [3, -1, 4]]]), 5)
    assert room_of(uneven, 0) == [3, 2]
    assert room_of(uneven, 5) == 5


# --- figures


def test_costs_are_the_steps_own():
    recent = Recent(50)
    for _ in range(3):
        recent.add(step(experts=(0.036, 0.012)))
    c = recent.costs(FACTS)
    assert c.expert_seconds == pytest.approx(0.036 / 1800)
    assert (c.tokens_per_rank, c.token_bytes, c.expert_bytes, c.optimizer_bytes) == (512, 256.0, 4000.0, 8000.0)
    assert (c.speed, c.two_level) == (None, False)


def test_a_rank_that_takes_twice_as_long_a_pair_is_half_as_fast():
    recent = Recent(50)
    recent.add(step(experts=(0.02, 0.04), pairs=((500, 500), (500, 500))))
    fast, slow = recent.costs(FACTS).speed
    assert fast == pytest.approx(2 * slow)


def test_a_slow_while_of_a_rank_is_not_its_speed():
    recent = Recent(50)
    for seconds in (0.4, 0.02, 0.02, 0.09, 0.02):
        recent.add(step(experts=(0.02, seconds), pairs=((500, 500), (500, 500))))
    assert recent.costs(FACTS).speed is None
    assert recent.costs(FACTS).expert_seconds == pytest.approx(0.02 / 1000)


def test_a_rank_with_hardly_any_pairs_says_nothing_about_its_speed():
    recent = Recent(50)
    recent.add(step(experts=(0.02, 0.01), pairs=((500, 500), (1, 0))))
    assert recent.costs(FACTS).speed is None


def test_loads_halve_in_half_a_life():
    recent = Recent(4)
    first = np.array([[8.0, 0.0]])
    recent.add(step(load=first))
    for _ in range(4):
        recent.add(step(load=np.array([[0.0, 1.0]])))
    assert recent.load[0, 0] == pytest.approx(4.0)
    assert recent.load[0, 1] == pytest.approx(sum(0.5 ** (k / 4) for k in range(4)))


def test_where_all_tokens_go_everywhere_no_place_saves_traffic():
    recent = Recent(50)
    recent.add(step())
    assert recent.costs(Facts(512, 32, 1000, 4, 12, 2, "all_gather")).token_bytes == 0


def test_imbalance_is_of_ranks_or_of_nodes():
    recent = Recent(50)
    recent.add(step(pairs=((900, 600), (300, 600))))
    assert recent.imbalance([0, 1]) == pytest.approx((1.5 + 1.0) / 2)
    assert recent.imbalance([7, 7]) == 1.0


def test_what_a_step_takes_now_is_a_short_median():
    recent = Recent(50)
    for seconds in (9, 9, 9, *[0.1] * (NOW - 1), 5):
        recent.add(step(seconds=seconds))
    assert recent.step_seconds() == 0.1


# --- when, and what became of it


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Shelf:
    """A background in which decisions wait until the test has them made."""

    def __init__(self):
        self.waiting = []

    def __call__(self, work):
        self.waiting.append((future := Future(), work))
        return future

    def make(self, result=None):
        future, work = self.waiting.pop()
        try:
            future.set_result(work() if result is None else result)
        except Exception as e:
            future.set_exception(e)


def rebalancer(*overrides):
    cfg = load_config(None, [f"placement.{o}" for o in overrides]).placement
    clock, shelf = Clock(), Shelf()
    return Rebalancer(cfg, clock, shelf), clock, shelf


def test_off_means_on_demand_only():
    r, _, _ = rebalancer("every=0")
    assert not any(r.due(s, 9.0) for s in range(1, 500))
    assert r.due(500, 1.0, on_demand=True) == "on demand"


def test_regular_times_are_kept_and_one_decision_is_made_at_a_time():
    r, _, shelf = rebalancer("every=10")
    assert [s for s in range(1, 20) if r.due(s, 1.0) and not r.ask(s, question())] == [10]
    assert r.answer() == (None, None)
    assert r.due(20, 1.0) == ""  # the first is not made yet
    shelf.make(Verdict(None, "stay: so", 1.0))
    verdict, said = r.answer()
    assert verdict is None
    assert (said.kind, said.message) == ("rebalance", "stay: so (asked after step 10: every 10 steps)")
    assert r.due(21, 1.0) == "every 10 steps"  # that of step 20 has waited


def test_imbalance_triggers_between_the_regular_times_but_not_on_the_same_figures_again():
    r, _, shelf = rebalancer("every=0", "imbalance=1.5", "decay=20")
    assert r.due(30, 1.4) == ""
    assert r.due(31, 1.62) == "the busiest computes 1.62 times the mean"
    r.ask(31, question())
    shelf.make(Verdict(None, "stay: so", 1.0))
    r.answer()
    assert next(s for s in range(32, 60) if r.due(s, 1.62)) == 51


def test_an_answer_to_links_that_have_changed_meanwhile_is_dropped_and_asked_again():
    r, _, shelf = rebalancer("every=10")
    assert r.due(10, 1.0)
    r.ask(10, question())
    assert r.links_changed() is None
    assert r.due(11, 1.0) == ""
    shelf.make()
    verdict, said = r.answer()
    assert verdict is None
    assert "links have changed meanwhile" in said.message
    assert r.due(12, 1.0) == "links have changed"


def moved(r, shelf, at, gain=0.05, before=0.2):
    """Steps of `before` seconds, then a move."""
    for _ in range(WINDOW):
        r.stepped(before)
    assert r.due(at, 1.0, on_demand=True)
    r.ask(at, question())
    shelf.make(Verdict(contiguous(LAYERS, EXPERTS, RANKS, 5), "move", before - gain, gain, 1.0, 0.5))
    verdict, _ = r.answer()
    r.moved(verdict, at, 2.0)


def test_gains_are_measured_and_told_beside_what_was_predicted():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    said = [s for _ in range(WINDOW + 1) for s in r.stepped(0.16)]
    assert [s.kind for s in said] == ["rebalance"]
    assert said[0].message == (
        "measured after the move of step 40: step 200 -> 160 ms over 10 steps, 40 ms gained where 50 ms were "
        "predicted; the move took 2 s, predicted 1 s"
    )
    assert r.caution == 1
    assert r.slower == 2.0  # the root of 1 x 4


def test_a_move_that_made_steps_longer_makes_the_next_one_promise_more_and_a_good_one_restores_trust():
    r, _, shelf = rebalancer("every=0")
    for n in range(6):
        moved(r, shelf, 40 + 40 * n)
        said = [s for _ in range(WINDOW + 1) for s in r.stepped(0.25)]
        assert f"must promise {r.caution:g} times as much" in said[-1].message
    assert r.caution == MOST_CAUTION
    q = question(caution=r.caution, step_seconds=1.0)
    assert decide(question(step_seconds=1.0)).placement is not None
    assert decide(q).placement is None
    assert "since a move did not keep its promise" in decide(q).words
    moved(r, shelf, 500)
    [r.stepped(0.15) for _ in range(WINDOW + 1)]
    assert r.caution == MOST_CAUTION / 2


def test_while_a_move_is_judged_only_urgent_reasons_count():
    r, _, shelf = rebalancer("every=1")
    moved(r, shelf, 40)
    waiting = []
    for s in range(41, 41 + WINDOW):
        r.stepped(0.2)
        waiting.append(r.due(s, 1.0))
    assert waiting == [""] * WINDOW
    assert r.due(50, 1.0, on_demand=True) == "on demand"


def test_the_gain_of_a_move_is_not_taken_from_steps_over_other_links():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    [r.stepped(0.4) for _ in range(WINDOW - 1)]  # a link has slowed meanwhile
    assert r.links_changed().message == (
        "the gain of the move of step 40 was not measured: links have changed meanwhile; 50 ms a step were predicted"
    )
    assert r.due(50, 1.0) == "links have changed"
    r.ask(50, question())
    shelf.make(Verdict(contiguous(LAYERS, EXPERTS, RANKS, 5), "move", 0.35, 0.05, 1.0, 0.5))
    r.moved(r.answer()[0], 50, 2.0)
    said = [s for _ in range(WINDOW + 1) for s in r.stepped(0.3)]
    assert "step 400 -> 300 ms" in said[0].message  # no step before the links changed counts: as the verdict has it


def test_a_move_that_disappointed_since_a_link_slowed_is_not_held_against_the_next_one():
    r, _, shelf = rebalancer("every=0")
    moved(r, shelf, 40)
    [r.stepped(0.25) for _ in range(WINDOW + 1)]
    assert r.caution == 2
    r.links_changed()
    assert r.caution == 1


def test_a_decision_that_does_not_come_raises_one_alert_and_the_next_one_another():
    r, clock, shelf = rebalancer("every=1", "alert_s=60")
    for s in (1, 2):
        assert r.due(s, 1.0)
        r.ask(s, question())
        clock.now += 59
        assert r.stepped(0.1) == []
        clock.now += 2
        (alert,) = r.stepped(0.1)
        assert alert.kind == "rebalance-alert"
        assert f"after step {s} (every 1 steps)" in alert.message
        assert r.stepped(0.1) == []
        shelf.make(Verdict(None, "stay: so", 1.0))
        r.answer()
        clock.now += 1000
        assert r.stepped(0.1) == []


def test_failing_again_and_again_is_no_progress():
    r, clock, shelf = rebalancer("every=1", "alert_s=60")
    kinds = []
    for s in range(1, 10):
        assert r.due(s, 1.0)
        r.ask(s, question(slots=1))  # fewer slots than experts
        shelf.make()
        verdict, said = r.answer()
        assert verdict is None
        assert said.message.startswith("no decision: PlacementError: ")
        clock.now += 10
        kinds += [x.kind for x in r.stepped(0.1)]
    assert kinds == ["rebalance-alert"]


def test_a_decision_that_hangs_in_its_thread_stalls_no_step_and_is_told():
    hold, clock = threading.Event(), Clock()
    cfg = load_config(None, ["placement.every=1", "placement.alert_s=5"]).placement
    r = Rebalancer(cfg, clock, lambda work: beside(lambda: hold.wait(30) and work()))
    assert r.due(1, 1.0)
    r.ask(1, question())
    assert r.answer() == (None, None)
    clock.now += 6
    assert [s.kind for s in r.stepped(0.1)] == ["rebalance-alert"]
    hold.set()
    r._planning.result(30)
    assert r.answer()[0].placement is not None


# --- the hands


class FakeRanks:
    """Ranks that answer at once."""

    def __init__(self, refuse=None, links=None):
        self.calls, self.refuse, self.links = [], refuse, links or topology()

    def topology(self):
        return self.links

    def call(self, method, *args):
        self.calls.append(method)
        if method == "migrate" and self.refuse:
            raise self.refuse
        nothing = [None] * RANKS
        answers = {"sample": np.split(tokens(True), RANKS, axis=1), "migrate": nothing, "gpu_links": nothing}
        return answers[method] if method in answers else [self.links] * RANKS


def results(load=None, sent=0, exchange=(0.01, 0.03)):
    s = step(load=load, sent=sent)
    usage = [Usage(0.2, exchange[r], s.experts[r], 0.0, s.sent[r], s.pairs[r], np.zeros(7)) for r in range(RANKS)]
    return [StepResult(0, 1.0, 0.0, 0.0, 0.0, 0.0, 1024, s.load, u) for u in usage]


def mover(tmp_path, *overrides, ranks=None, measure=False):
    cfg = load_config(None, ["optim.steps=1000", f"topology.measure={measure}", "balance.in_step=off", *overrides])
    run, said, ranks = RunDir(tmp_path), [], ranks or FakeRanks()
    run.create(cfg)
    said_links = topology(node_of=ranks.links.node_of)
    it = Mover(cfg, run, ranks, said_links, NOWHERE, FACTS, lambda kind, message: said.append((kind, message)))
    shelf = it.rebalancer.background = Shelf()
    return SimpleNamespace(it=it, run=run, said=said, ranks=ranks, shelf=shelf, path=tmp_path)


def test_a_step_asks_the_next_ones_go_on_and_a_later_one_moves(tmp_path):
    m = mover(tmp_path, "placement.every=3")
    for n in range(1, 6):
        assert m.it.after_step(n, results(), 0.2)["migration_seconds"] == 0
    assert m.ranks.calls == ["sample"]
    m.shelf.make()
    figures = m.it.after_step(6, results(), 0.2)
    assert 0 < figures["migration_seconds"] <= figures["rebalance_seconds"]
    assert m.ranks.calls[:2] == ["sample", "migrate"]
    assert m.it.placement.version == 1
    assert Placement.load(tmp_path / "placements" / "0001.json").slots.tolist() == m.it.placement.slots.tolist()
    assert m.said[0][0] == "rebalance"
    assert m.said[0][1].startswith("move ")


def test_a_refused_move_keeps_the_placement_and_the_run_goes_on(tmp_path):
    no = PlacementError("rank 1 has no memory for the experts that arrive")
    m = mover(tmp_path, "placement.every=1", ranks=FakeRanks(refuse=no))
    m.it.after_step(1, results(), 0.2)
    m.shelf.make()
    m.it.after_step(2, results(), 0.2)
    assert m.it.placement is NOWHERE
    assert not (tmp_path / "placements" / "0001.json").exists()
    assert "the move failed: rank 1 has no memory" in m.said[-1][1]
    assert "the placement stays" in m.said[-1][1]
    assert m.it.after_step(3, results(), 0.2)["migration_seconds"] == 0


def test_a_rank_lost_during_a_move_ends_the_run_as_in_a_step_and_it_goes_on_with_the_old_placement(tmp_path):
    m = mover(tmp_path, "placement.every=1", ranks=FakeRanks(refuse=RankError(1, "rank 1 died: killed\nits own words")))
    m.run.placement(NOWHERE)
    m.it.after_step(1, results(), 0.2)
    m.shelf.make()
    with pytest.raises(RankError, match="rank 1 died"):
        m.it.after_step(2, results(), 0.2)
    assert m.it.placement is NOWHERE
    assert m.run.newest_placement().slots.tolist() == NOWHERE.slots.tolist()
    assert m.said[-1][1].startswith("the move was broken off: rank 1 died: killed; the placement stays (asked")


def test_statistics_that_cannot_be_are_told_and_the_run_goes_on(tmp_path):
    m = mover(tmp_path, "placement.every=1")
    bad = statistics().load.astype(float)
    bad[0, 0] = math.nan
    m.it.after_step(1, results(load=bad), 0.2)
    assert m.said[-1][0] == "rebalance"
    assert "no decision: statistics: load has shape (2, 8): expected finite counts" in m.said[-1][1]
    assert m.shelf.waiting == []


def test_a_request_is_taken_once_and_answered(tmp_path):
    m = mover(tmp_path, "placement.every=0")
    m.it.after_step(1, results(), 0.2)
    assert m.shelf.waiting == []
    m.run.request()
    m.it.after_step(2, results(), 0.2)
    assert len(m.shelf.waiting) == 1
    assert not (tmp_path / "rebalance").exists()
    m.shelf.make()
    m.it.after_step(3, results(), 0.2)
    assert "(asked after step 2: on demand)" in m.said[0][1]


def test_after_the_last_step_nothing_is_asked(tmp_path):
    m = mover(tmp_path, "placement.every=1", "optim.steps=3")
    m.it.after_step(3, results(), 0.2)
    assert m.shelf.waiting == []


@pytest.mark.parametrize("degraded", [True, False])
def test_slow_exchanges_have_the_links_measured_again_and_what_is_found_is_planned_for(tmp_path, degraded):
    links = topology(1e9, node_of=(0, 1))
    if degraded:
        links.bandwidth[0, 1] = 1e8
    m = mover(tmp_path, "placement.every=1000", ranks=FakeRanks(links=links), measure=True)
    for n in range(1, 9):
        m.it.after_step(n, results(sent=1e7, exchange=(0.03, 0.05)), 0.2)
    assert m.ranks.calls == []
    n = 8
    while not m.ranks.calls and n < 20:
        n += 1
        m.it.after_step(n, results(sent=1e7, exchange=(0.3, 0.32)), 0.2)
    assert m.ranks.calls[0] == "probe"
    assert m.said[0][0] == "topology"
    assert Topology.from_json((tmp_path / "topology.json").read_text()).bandwidth[0, 1] == links.bandwidth[0, 1]
    if degraded:
        assert "the link from rank 0 to rank 1 is 10.0 times slower: 100 MB/s instead of 1 GB/s" in m.said[0][1]
        assert len(m.shelf.waiting) == 1
        assert m.it.topology.bandwidth[0, 1] == 1e8
    else:
        assert "found as before" in m.said[0][1]
        assert m.shelf.waiting == []


def test_plans_leave_to_the_balance_inside_the_step_what_it_does():
    auto = load_config(None, ["balance.in_step=auto"])
    assert level_of(load_config(None, ["balance.in_step=off"]), True) == "rank"
    assert level_of(auto, True) == "node"
    assert level_of(auto, False) == "rank", "it does not pay, and is off"
    assert level_of(load_config(None, ["balance.in_step=auto", "placement.level=rank"]), True) == "rank"


def test_more_nodes_to_survive_than_there_are_is_refused_at_the_start():
    cfg = load_config(None, ["placement.survive_nodes=1"])
    with pytest.raises(PlacementError, match="survive_nodes=1 of 1 nodes"):
        check_survival(cfg, topology(), NOWHERE)
    with pytest.raises(PlacementError, match="8 slots a rank"):
        check_survival(cfg, topology(node_of=(0, 1)), NOWHERE)
