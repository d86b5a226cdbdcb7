"""One line of metrics.jsonl from what the ranks say, worked out by hand."""

import json

import numpy as np
import pytest

from ray_ep.driver.measures import step_record
from ray_ep.placement import Topology, contiguous
from ray_ep.rank.results import StepResult, Usage
from ray_ep.rank.step.clock import STEP_PHASES


def result(sent, pairs, exchange=0.1, expert=0.2, load=((3, 1, 2, 2), (2, 2, 2, 2)), spent=0.01, peak=7):
    usage = Usage(
        seconds=0.5, exchange_seconds=exchange, expert_seconds=expert, statistics_seconds=exchange / 10,
        sent=np.array(sent), pairs=np.array(pairs), balance=np.array([2, 3.0, 2.2, 3, 6000, 0.01, 2.0]),
        phases=np.full(len(STEP_PHASES), spent),
    )  # fmt: skip
    return StepResult(
        step=4, epoch=3, loss=2.5, aux_loss=1.25, z_loss=0.5, grad_norm=0.75, lr=1e-3, tokens=64, load=np.array(load),
        usage=usage, peak_mib=peak,
    )  # fmt: skip


def metrics(node_of=(0, 0), pairs=((3, 4), (1, 4))):
    results = [result([0, 20], pairs[0], 0.1, 0.2), result([30, 0], pairs[1], 0.3, 0.6)]
    return step_record(5, results, 0.5, Topology.of_nodes(list(node_of)), contiguous(2, 4, 2)).line()


def test_global_figures_are_those_of_any_rank_and_the_step_is_counted_from_one():
    m = metrics()
    assert (m["step"], m["loss"], m["aux_loss"], m["z_loss"]) == (5, 2.5, 1.25, 0.5)
    assert (m["grad_norm"], m["lr"], m["tokens"]) == (0.75, 1e-3, 64)
    assert (m["world_size"], m["epoch"], m["placement_version"]) == (2, 3, 0)


def test_speed_is_tokens_over_the_time_of_the_whole_step():
    m = metrics()
    assert (m["step_seconds"], m["tokens_per_second"]) == (0.5, 128.0)


def test_seconds_of_exchange_and_experts_are_means_over_ranks():
    m = metrics()
    assert m["exchange_seconds"] == pytest.approx(0.2)
    assert m["expert_seconds"] == pytest.approx(0.4)
    assert m["statistics_seconds"] == pytest.approx(0.02)


def test_phases_are_means_over_ranks_and_add_up_to_the_step_with_what_the_driver_took():
    results = [result([0, 20], [1, 1], spent=0.01, peak=7), result([30, 0], [1, 1], spent=0.03, peak=9)]
    m = step_record(5, results, 0.5, Topology.of_nodes([0, 0]), contiguous(2, 4, 2)).line()
    assert list(m["phase_seconds"]) == [*STEP_PHASES, "driver"]
    assert m["phase_seconds"]["norm"] == pytest.approx(0.02)
    assert sum(m["phase_seconds"].values()) == pytest.approx(m["step_seconds"])
    assert m["peak_mib"] == 9


def test_bytes_between_ranks_of_one_node_are_intra_node():
    m = metrics(node_of=(0, 0))
    assert (m["bytes_intra_node"], m["bytes_inter_node"]) == (50, 0)


def test_bytes_between_ranks_of_two_nodes_are_inter_node():
    m = metrics(node_of=(0, 1))
    assert (m["bytes_intra_node"], m["bytes_inter_node"]) == (0, 50)


def test_bytes_of_three_ranks_on_two_nodes_are_split_by_pair():
    sent = [[0, 1, 10], [2, 0, 20], [100, 200, 0]]  # ranks 0 and 2 share a node
    results = [result(row, [1, 1]) for row in sent]
    m = step_record(1, results, 1.0, Topology.of_nodes([0, 1, 0]), contiguous(2, 4, 3, 2)).line()
    assert (m["bytes_intra_node"], m["bytes_inter_node"]) == (110, 223)


def test_balancedness_is_mean_over_largest_load_of_a_rank_averaged_over_layers():
    m = metrics(pairs=((3, 4), (1, 4)))  # layer 0: 2/3, layer 1: 4/4
    assert m["balancedness"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_rank_without_pairs_halves_the_balancedness_of_two():
    assert metrics(pairs=((6, 6), (0, 0)))["balancedness"] == 0.5


@pytest.mark.parametrize("pairs", [((0, 4), (0, 4)), ((0, 0), (0, 0))])
def test_a_layer_without_pairs_is_even_and_every_figure_is_a_number(pairs):
    results = [result([0, 0], of_rank, 0.0, 0.0, ((0, 0, 0, 0), (0, 0, 0, 0))) for of_rank in pairs]
    for r in results:
        r.usage.balance[:] = 0
    m = step_record(1, results, 0.5, Topology.of_nodes([0, 0]), contiguous(2, 4, 2)).line()
    assert (m["balancedness"], m["imbalance_before"], m["imbalance_after"]) == (1.0, 1.0, 1.0)
    assert (m["balance_saved_measured"], m["max_expert_load"]) == (0.0, [0.0, 0.0])
    json.dumps(m, allow_nan=False)


def test_the_largest_expert_load_is_in_multiples_of_the_mean_of_its_layer():
    assert metrics()["max_expert_load"] == [1.5, 1.0]


def test_the_load_of_each_rank_is_told_by_layer_and_is_not_in_the_line():
    results = [result([0, 0], [3, 4]), result([0, 0], [1, 4])]
    made = step_record(5, results, 0.5, Topology.of_nodes([0, 0]), contiguous(2, 4, 2))
    assert made.rank_load.tolist() == [[3, 1], [4, 4]]
    assert not {"load", "rank_load"} & set(made.line())


def test_a_line_is_plain_json():
    m = metrics()
    assert json.loads(json.dumps(m)) == m


def test_balance_is_a_mean_over_layers_and_its_gain_is_priced_at_the_steps_own_time_a_pair():
    m = metrics()
    assert (m["imbalance_before"], m["imbalance_after"]) == (1.5, 1.1)
    assert (m["guests"], m["guest_bytes"], m["balance_saved_predicted"]) == (3, 6000, 0.01)
    assert m["balance_saved_measured"] == pytest.approx(2.0 * 0.4 / 6)  # 2 pairs, 0.4 s for 6 pairs of a mean rank
