"""Between two steps: what the mover asks of the ranks, does and leaves behind."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from ray_ep.config import load_config
from ray_ep.driver.rebalance.links import Links
from ray_ep.driver.rebalance.mover import Mover, Scope, check_survival, level_of, look_every
from ray_ep.driver.run.rundir import RunDir
from ray_ep.driver.states import State, States
from ray_ep.errors import PlacementError, RankError
from ray_ep.placement import Placement, Topology
from tests.driver.fakes import Ear, FakeRanks, results
from tests.driver.scenes import FACTS, NOWHERE, Shelf, statistics, tokens, topology


def mover(tmp_path, *overrides, refuse=None, links=None, measure=False):
    """A mover on ranks that answer at once, over `links` that were measured whole and fast."""
    cfg = load_config(None, ["optim.steps=1000", f"topology.measure={measure}", "balance.in_step=off", *overrides])
    run, ear, ranks, states = RunDir(tmp_path), Ear(), FakeRanks(links), States()
    run.create(cfg)
    states.to(State.STEPPING, "formed")
    if refuse:
        ranks.meanwhile["migrate", 1] = lambda: throw(refuse)
    watched = Links(ranks, topology(node_of=ranks.links.node_of), 5.0, look_every(cfg), run.topology, ear.event)
    it = Mover(Scope.of(cfg), ranks, watched, NOWHERE, FACTS, states, run.placement, ear.event)
    shelf = it.rebalancer.background = Shelf()
    return SimpleNamespace(it=it, run=run, said=ear.heard, ranks=ranks, shelf=shelf, states=states)


def throw(e):
    raise e


def test_a_step_asks_the_next_ones_go_on_and_a_later_one_moves(tmp_path):
    m = mover(tmp_path, "placement.every=3")
    for n in range(1, 6):
        assert m.it.after_step(n, results(), 0.2)[0] == 0
    assert m.ranks.calls == ["sample"]
    m.shelf.make()
    moved_s, stood_s = m.it.after_step(6, results(), 0.2)
    assert 0 < moved_s <= stood_s
    assert m.ranks.calls[:2] == ["sample", "migrate"]
    assert m.it.placement.version == 1
    assert Placement.load(tmp_path / "placements" / "0001.json").slots.tolist() == m.it.placement.slots.tolist()
    assert m.said[0].kind == "rebalance"
    assert m.said[0].words.startswith("move ")
    assert m.said[0].fields["placement_version"] == 1
    assert m.said[0].fields["gain_predicted"] > 0


def test_a_rank_that_is_slow_gets_fewer_tokens_and_no_replica_that_would_hold_the_others_up(tmp_path):
    m = mover(tmp_path, "placement.every=5", "placement.slots_per_rank=6")
    said = results(load=statistics(False).load)
    said = [
        replace(r, usage=replace(r.usage, expert_seconds=s, pairs=np.array([512, 512])))
        for r, s in zip(said, (0.02, 0.08), strict=True)
    ]
    m.ranks.meanwhile["sample", 1] = lambda: tokens(False)
    for n in range(1, 6):
        m.it.after_step(n, said, 0.2)
    m.shelf.make()
    m.it.after_step(6, said, 0.2)
    held = (m.it.placement.slots >= 0).sum(2)  # [L, R]
    assert (held == [[6, 2], [6, 2]]).all(), m.said
    assert m.said[0].fields["gain_predicted"] > 0.02


def test_a_refused_move_keeps_the_placement_and_the_run_goes_on(tmp_path):
    no = PlacementError("rank 1 has no memory for the experts that arrive")
    m = mover(tmp_path, "placement.every=1", refuse=no)
    m.it.after_step(1, results(), 0.2)
    m.shelf.make()
    m.it.after_step(2, results(), 0.2)
    assert m.it.placement is NOWHERE
    assert not (tmp_path / "placements" / "0001.json").exists()
    assert "the move failed: rank 1 has no memory" in m.said[-1].words
    assert "the placement stays" in m.said[-1].words
    assert m.it.after_step(3, results(), 0.2)[0] == 0


def test_a_rank_lost_during_a_move_ends_the_run_as_in_a_step_and_it_goes_on_with_the_old_placement(tmp_path):
    m = mover(tmp_path, "placement.every=1", refuse=RankError(1, "rank 1 died: killed\nits own words"))
    m.run.placement(NOWHERE)
    m.it.after_step(1, results(), 0.2)
    m.shelf.make()
    with pytest.raises(RankError, match="rank 1 died"):
        m.it.after_step(2, results(), 0.2)
    assert m.states.now is State.MIGRATING  # for whoever recovers from there
    assert m.it.placement is NOWHERE
    assert m.run.newest_placement().slots.tolist() == NOWHERE.slots.tolist()
    assert m.said[-1].words.startswith("the move was broken off: rank 1 died: killed; the placement stays (asked")


def test_statistics_that_cannot_be_are_told_and_the_run_goes_on(tmp_path):
    m = mover(tmp_path, "placement.every=1")
    bad = statistics().load.astype(float)
    bad[0, 0] = math.nan
    m.it.after_step(1, results(load=bad), 0.2)
    assert m.said[-1].kind == "rebalance"
    assert "no decision: statistics: load has shape (2, 8): expected finite counts" in m.said[-1].words
    assert m.shelf.waiting == []


def test_steps_in_which_nothing_was_computed_are_a_reason_to_stay(tmp_path):
    m = mover(tmp_path, "placement.every=2", "placement.imbalance=1.1", "placement.level=rank")
    nothing = results(load=np.zeros((2, 8)), exchange=(0.0, 0.0))
    for r in nothing:
        r.usage.pairs[:] = 0
    for n in (1, 2):
        m.it.after_step(n, nothing, 0.2)
    assert m.it.recent.imbalance([0, 1]) == 1.0
    m.shelf.make()
    m.it.after_step(3, nothing, 0.2)
    assert m.it.placement is NOWHERE
    (event,) = m.said
    assert event.kind == "rebalance"
    assert event.words.startswith("stay: ")


def test_a_decision_that_is_asked_for_is_made_once_after_the_next_step(tmp_path):
    m = mover(tmp_path, "placement.every=0")
    m.it.after_step(1, results(), 0.2)
    assert m.shelf.waiting == []
    m.it.asked = True
    m.it.after_step(2, results(), 0.2)
    assert len(m.shelf.waiting) == 1
    m.shelf.make()
    m.it.after_step(3, results(), 0.2)
    assert "(asked after step 2: on demand)" in m.said[0].words


def test_after_the_last_step_nothing_is_asked(tmp_path):
    m = mover(tmp_path, "placement.every=1", "optim.steps=3")
    m.it.after_step(3, results(), 0.2)
    assert m.shelf.waiting == []


@pytest.mark.parametrize("degraded", [True, False])
def test_slow_exchanges_have_the_links_measured_again_and_what_is_found_is_planned_for(tmp_path, degraded):
    links = topology(1e9, node_of=(0, 1))
    if degraded:
        links.bandwidth[0, 1] = 1e8
    m = mover(tmp_path, "placement.every=1000", links=links, measure=True)
    for n in range(1, 9):
        m.it.after_step(n, results(sent=1e7, exchange=(0.03, 0.05)), 0.2)
    assert m.ranks.calls == []
    n = 8
    while not m.ranks.calls and n < 20:
        n += 1
        m.it.after_step(n, results(sent=1e7, exchange=(0.3, 0.32)), 0.2)
    assert m.ranks.calls[0] == "probe"
    assert m.said[0].kind == "topology"
    assert Topology.from_json((tmp_path / "topology.json").read_text()).bandwidth[0, 1] == links.bandwidth[0, 1]
    if degraded:
        assert "the link from rank 0 to rank 1 is 10.0 times slower: 100 MB/s instead of 1 GB/s" in m.said[0].words
        assert len(m.shelf.waiting) == 1
        assert m.it.topology.bandwidth[0, 1] == 1e8
    else:
        assert "found as before" in m.said[0].words
        assert m.shelf.waiting == []


def test_plans_leave_to_the_balance_inside_the_step_what_it_does():
    def level(balanced, *overrides):
        return level_of(Scope.of(load_config(None, overrides)), balanced)

    assert level(True, "balance.in_step=off") == "rank"
    assert level(True, "balance.in_step=auto") == "node"
    assert level(False, "balance.in_step=auto") == "rank", "it does not pay, and is off"
    assert level(True, "balance.in_step=auto", "placement.level=rank") == "rank"


def test_more_nodes_to_survive_than_there_are_is_refused_at_the_start():
    cfg = load_config(None, ["placement.survive_nodes=1"]).placement
    with pytest.raises(PlacementError, match="survive_nodes=1 of 1 nodes"):
        check_survival(cfg, topology(), NOWHERE)
    with pytest.raises(PlacementError, match="8 slots a rank"):
        check_survival(cfg, topology(node_of=(0, 1)), NOWHERE)
