"""Trains the same steps under each of several placements on one set of ranks, taking turns; inside a lab.

`turns.py RUN OUT ROUNDS STEPS`: the model, data and statistics are those of RUN, which `ray-ep train` made; links are
measured here, since Ray may give ranks to hosts otherwise than then. Each turn builds the model anew under a placement
and makes STEPS steps, the first of which is not timed; OUT gets one JSON object.
"""

import json
import statistics
import sys
import time
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

import ray_ep
from ray_ep.cli.plan_inputs import read_recorded, run_costs
from ray_ep.driver.cluster import Ranks, connected
from ray_ep.driver.loop import check, step_metrics
from ray_ep.driver.probe import measured
from ray_ep.placement import StepCosts, contiguous, load_only, plan, predict, random
from ray_ep.placement.placement import Placement

RANDOM = 4


def placements(recorded, topology, costs):
    """By name: static ones, one of load alone, the planner's at both levels, and one on half of the ranks."""
    layers, experts = recorded.load.shape
    ranks = topology.num_ranks
    found = {"contiguous": contiguous(layers, experts, ranks)}
    found |= {f"random {seed}": random(layers, experts, ranks, seed=seed) for seed in range(RANDOM)}
    found["load-only"] = load_only(recorded.load, ranks, None, topology.node_of)
    for level in ("node", "rank"):
        found[f"plan, {level}"] = plan(recorded, topology, level=level, costs=costs)
    return found | {"worst": worst(found["plan, rank"])}


def worst(planned):
    """The planned groups torn apart: the n-th expert of each rank goes to rank n modulo R."""
    slots = planned.slots.reshape(planned.num_layers, -1)
    torn = slots.reshape(planned.num_layers, -1, planned.num_ranks).transpose(0, 2, 1)
    return Placement(torn.copy(), planned.num_experts)


def turn(ranks, checked, tree, placement, topology, steps):
    """Metrics of each step of one turn."""
    ranks.call("build", tree, checked.config, ranks.share(checked.corpus), placement, topology.node_of)
    ranks.call("choose_exchange", 0)
    lines = []
    for step in range(steps):
        began = time.perf_counter()
        results = ranks.call("train_step", step)
        lines.append(step_metrics(step, results, time.perf_counter() - began, topology, placement))
    return lines


def main(run, out, rounds, steps):
    """Measure, plan, train in turns, write."""
    cfg = ray_ep.load_config(str(run / "config.yaml"), [f"run_dir={out.with_suffix('')}"])
    checked = check(cfg, datetime.now())
    recorded = read_recorded(run, None)
    with connected(cfg.cluster) as local:
        ranks = Ranks(cfg.cluster, f"turns-{time.time_ns()}", local, lambda: False)
        try:
            ranks.call("join", ranks.name, 0, 60.0, ["gloo"])
            topology = measured(ranks, cfg.topology.budget_s)
            costs = run_costs(run, recorded, topology.num_ranks)
            costs = StepCosts(**{**costs, "tokens_per_rank": round(costs["tokens_per_rank"])}, two_level=False)
            candidates = placements(recorded.statistics, topology, costs)
            lines = {name: [] for name in candidates}
            tree = OmegaConf.to_container(cfg)
            for _ in range(rounds):
                for name, placement in candidates.items():
                    lines[name].append(turn(ranks, checked, tree, placement, topology, steps))
        finally:
            ranks.kill()
    found = {"topology": json.loads(topology.to_json()), "hosts": [w["ip"] for w in ranks.where if "ip" in w]}
    found["placements"] = {n: figures(candidates[n], lines[n], recorded, topology, costs) for n in candidates}
    found["slots"] = {n: p.slots.tolist() for n, p in candidates.items()}
    out.write_text(json.dumps(found))


def figures(placement, turns, recorded, topology, costs):
    """What was predicted and what came."""
    predicted = predict(placement, recorded.statistics, topology, costs)
    timed = [line for lines in turns for line in lines[1:]]
    return {
        "predicted": predicted.step_seconds,
        "predicted_traffic": float(predicted.traffic.sum()),
        "seconds": statistics.median(line["step_seconds"] for line in timed),
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in timed),
        "all_seconds": [line["step_seconds"] for line in timed],
        "exchange_seconds": statistics.median(line["exchange_seconds"] for line in timed),
        "expert_seconds": statistics.median(line["expert_seconds"] for line in timed),
        "bytes": statistics.median(line["bytes_inter_node"] for line in timed),
        "losses": [[line["loss"] for line in lines] for lines in turns],
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
