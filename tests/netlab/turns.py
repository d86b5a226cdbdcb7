"""Trains the same steps under each of several placements on one set of ranks, taking turns; inside a lab.

`turns.py RUN OUT STEPS,STEPS,... [key=value]...`: model, data and routing statistics are those of RUN, a directory of
`ray-ep train`. Links are measured here and placements made for them, since Ray may give ranks to hosts otherwise than
then. A round is a turn of every placement, the model built anew, of so many steps; every second round goes backwards.
OUT gets one JSON object, stdout a table.
"""

import json
import sys
import time
from datetime import datetime
from pathlib import Path
from statistics import median

import numpy as np
import ray

import ray_ep
from ray_ep.driver.actors.cluster import connected
from ray_ep.driver.actors.probe import measured_links
from ray_ep.driver.actors.ranks import Ranks
from ray_ep.driver.measures import step_record
from ray_ep.driver.start import check_run
from ray_ep.observe.state import RunState
from ray_ep.observe.state.case import costs_of
from ray_ep.placement import Placement, StepCosts, contiguous, load_only, plan, predict, random


def placements(recorded, topology, costs):
    """By name: static ones, one of load alone, the planner's at both levels, that in part undone, and by heat."""
    layers, experts = recorded.load.shape
    ranks = topology.num_ranks
    found = {"contiguous": contiguous(layers, experts, ranks)}
    found |= {f"random {seed}": random(layers, experts, ranks, seed=seed) for seed in range(2)}
    found["load-only"] = load_only(recorded.load, ranks, None, topology.node_of)
    for level in ("node", "rank"):
        found[f"plan, {level}"] = plan(recorded, topology, level=level, costs=costs)
    planned, static = found["plan, rank"], found["contiguous"]
    mixed = np.where(np.arange(layers)[:, None, None] % 2, static.slots, planned.slots)
    found["plan, half the layers"] = Placement(mixed, experts)
    found |= {f"{part:.0%} torn": torn(planned, part) for part in (0.5, 1.0)}
    return found | {"hot": hot(recorded.load, topology)}


def torn(planned, part):
    """A part of each rank's experts scattered over the ranks: the n-th of them goes to rank n modulo R."""
    slots = planned.slots.copy()
    count = round(part * slots.shape[2] / planned.num_ranks) * planned.num_ranks
    some = slots[:, :, :count].reshape(planned.num_layers, -1, planned.num_ranks).transpose(0, 2, 1)
    slots[:, :, :count] = some.reshape(planned.num_layers, planned.num_ranks, count)
    return Placement(slots, planned.num_experts)


def hot(load, topology):
    """The hottest experts on the rank whose links are slowest, the next hottest on the next slowest, and so on."""
    slow = np.where(np.eye(topology.num_ranks, dtype=bool), 0.0, 1 / topology.bandwidth)
    order = np.argsort(-load, axis=1, kind="stable").reshape(len(load), topology.num_ranks, -1)
    slots = np.empty_like(order)
    slots[:, np.argsort(-(slow + slow.T).sum(1))] = order
    return Placement(slots, load.shape[1])


def turn(ranks, checked, cfg, placement, topology, steps):
    """Metrics of each step of one turn."""
    ranks.build(cfg, checked.config, checked.corpus, placement, topology)
    ranks.choose_exchange(0)
    lines = []
    for step in range(steps):
        began = time.perf_counter()
        results = ranks.train_step(step)
        lines.append(step_record(step, results, time.perf_counter() - began, topology, placement).line())
    return lines


def figures(placement, turns, recorded, topology, costs):
    """What was predicted, and what came."""
    steps = [line for lines in turns for line in lines]
    names = ("step_seconds", "tokens_per_second", "exchange_seconds", "bytes_inter_node", "balancedness")
    predicted = predict(placement, recorded, topology, costs)
    return {
        **{name: median(line[name] for line in steps) for name in names},
        "predicted_seconds": predicted.step_seconds,
        "predicted_traffic": float(predicted.traffic.sum()),
        "losses": [[line["loss"] for line in lines] for lines in turns],
        "slots": placement.slots.tolist(),
    }


def main(run, out, rounds, overrides):
    """Measure, plan, train in turns, write and print."""
    cfg = ray_ep.load_config(str(run / "config.yaml"), [f"run_dir={out.with_suffix('')}", *overrides])
    checked = check_run(cfg, datetime.now())
    checked.run.release()
    recorded = ray_ep.open_run(run).statistics
    with connected(cfg.cluster) as joined:
        address = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
        ranks = Ranks(cfg.cluster, f"turns-{time.time_ns()}", joined.local, lambda: False)
        try:
            ranks.join(60.0, ["gloo"])
            topology = measured_links(ranks, cfg.topology.budget_s)
            own = costs_of(RunState(run), recorded, topology.num_ranks)
            own["tokens_per_rank"] = cfg.batch.sequences * cfg.batch.length // topology.num_ranks
            costs = StepCosts(**own, two_level=cfg.exchange.kind == "two_level")
            tried = placements(recorded, topology, costs)
            turn(ranks, checked, cfg, tried["contiguous"], topology, 1)  # what is slow once only
            lines = {name: [] for name in tried}
            for number, steps in enumerate(rounds):
                for name in list(tried)[:: -1 if number % 2 else 1]:
                    lines[name].append(turn(ranks, checked, cfg, tried[name], topology, steps))
        finally:
            ranks.kill()
    found = {n: figures(tried[n], lines[n], recorded, topology, costs) for n in tried}
    hosts = [address[w["node"]] for w in ranks.where]
    out.write_text(json.dumps({"placements": found, "hosts": hosts, "topology": json.loads(topology.to_json())}))
    for name, f in found.items():
        print(
            f"{name:21} {f['tokens_per_second']:6.0f} tokens/s, step {f['step_seconds']:.3f} s (exchange "
            f"{f['exchange_seconds']:.3f}), predicted {f['predicted_seconds']:.3f} (traffic "
            f"{f['predicted_traffic']:.3f}); {f['bytes_inter_node'] / 1e6:.1f} MB, balancedness {f['balancedness']:.2f}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), [int(n) for n in sys.argv[3].split(",")], sys.argv[4:])
