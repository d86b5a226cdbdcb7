"""Run directories for the page: written as the driver writes them, of any size, the same each time."""

import json
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone

import numpy as np
import yaml

from ray_ep.placement import Placement, RoutingStatistics, Topology, contiguous

BEGAN = datetime(2026, 11, 30, 8, 0, 0, tzinfo=timezone.utc)
PHASES = {
    "data": 0.01, "forward": 0.16, "dispatch_forward": 0.05, "exchange_forward": 0.1, "experts_forward": 0.12,
    "backward": 0.2, "dispatch_backward": 0.05, "exchange_backward": 0.08, "experts_backward": 0.16, "reduce": 0.03,
    "norm": 0.005, "update": 0.02, "publish": 0.005, "rest": 0.005, "driver": 0.005,
}  # fmt: skip


@dataclass
class Size:
    layers: int = 4
    experts: int = 16
    nodes: int = 2
    per_node: int = 2
    slots: int = 5
    steps: int = 240
    versions: int = 4
    moves: int = 6  # experts that move from one version to the next

    @property
    def ranks(self):
        return self.nodes * self.per_node


BIG = Size(layers=58, experts=256, nodes=8, per_node=8, slots=5, steps=2000, versions=40, moves=300)


def write_run(folder, size=None, seed=0, outcome="done"):
    """A run of that size in `folder`, which has ended, or with outcome="" goes on; returns its placements."""
    size, rng = size or Size(), np.random.default_rng(seed)
    for part in ("", "placements", "statistics"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    placements = _placements(size, rng)
    for placement in placements:
        (folder / "placements" / f"{placement.version:04d}.json").write_text(placement.to_json())
    load = _statistics(folder / "statistics", size, rng, placements[-1])
    (folder / "config.yaml").write_text(yaml.safe_dump(_config(size)))
    (folder / "topology.json").write_text(_topology(size, rng).to_json())
    timings = [
        {"kind": k, "transport": "gloo", "seconds": s, "rounds": 9} for k, s in (("flat", 2e-3), ("two_level", 1.4e-3))
    ]
    exchange = {
        "kind": "two_level",
        "transport": "gloo",
        "words": "two_level over gloo, by 9 rounds",
        "timings": timings,
    }
    (folder / "exchange.json").write_text(json.dumps(exchange))
    at = _changes(size)
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(_step(s, size, at, rng, load)) + "\n" for s in range(1, size.steps + 1))
    )
    events = [_line(*event) for event in _events(size, at, outcome)]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    return placements


def _changes(size):
    """After which step each version came."""
    return [0, *(round((v + 0.5) * size.steps / size.versions) for v in range(1, size.versions))]


def _placements(size, rng):
    made = [contiguous(size.layers, size.experts, size.ranks, size.slots)]
    for version in range(1, size.versions):
        slots, primary = made[-1].slots.copy(), made[-1].owner.copy()
        for _ in range(size.moves):
            layer, (a, b) = rng.integers(size.layers), rng.choice(size.ranks, 2, replace=False)
            i, j = rng.integers(size.slots, size=2)
            x, y = slots[layer, a, i], slots[layer, b, j]
            if (slots[layer, a] == y).any() or (slots[layer, b] == x).any():
                continue
            slots[layer, a, i], slots[layer, b, j] = y, x
        for layer in range(size.layers):
            for expert in range(size.experts):
                if expert not in slots[layer, primary[layer, expert]]:
                    primary[layer, expert] = int(np.nonzero((slots[layer] == expert).any(1))[0][0])
        made.append(Placement(slots, size.experts, version, primary))
    free = made[-1].slots.copy()  # empty slots take replicas of the first experts
    for layer, rank, slot in np.argwhere(free < 0):
        lacking = [e for e in range(size.experts) if e not in free[layer, rank]]
        free[layer, rank, slot] = lacking[int(rng.integers(min(4, len(lacking))))]
    made[-1] = replace(made[-1], slots=free)
    return made


def _statistics(folder, size, rng, placement):
    """Hot experts, and some that like the company of their rank's others; returns load [L, E]."""
    layers, experts = size.layers, size.experts
    load = (rng.gamma(2.0, 1.0, (layers, experts)) * 4e5 / experts).astype(np.int64) + 1
    base = load[:, :, None] * load[:, None, :] / load.sum(1)[:, None, None]
    owner = placement.owner
    together = owner[:, :, None] == owner[:, None, :]
    noise = rng.lognormal(0.0, 0.35, (layers, experts, experts))
    pairs = base * (noise + noise.transpose(0, 2, 1)) / 2 * np.where(together, 2.6, 0.85)
    pairs[:, np.eye(experts, dtype=bool)] = load
    near = owner[:-1, :, None] // size.per_node == owner[1:, None, :] // size.per_node
    flow = load[:-1, :, None] * load[1:, None, :] / load[:-1].sum(1)[:, None, None] * np.where(near, 1.8, 0.5)
    flow *= rng.lognormal(0.0, 1.0, flow.shape)
    RoutingStatistics(load, pairs.astype(np.int64), flow.astype(np.int64), None).save(folder / "routing.npz")
    held = np.array([np.bincount(row[row >= 0], minlength=experts) for row in placement.slots.reshape(layers, -1)])
    each = np.take_along_axis(load / held, np.maximum(placement.slots, 0).reshape(layers, -1), 1).reshape(
        placement.slots.shape
    )
    ranks = np.where(placement.slots >= 0, each, 0.0).sum(2)
    node = np.arange(size.ranks) // size.per_node
    sent = (
        rng.uniform(0.5, 1.5, (size.ranks, size.ranks))
        * np.where(node[:, None] == node, 4e6, 1e6)
        * (1 - np.eye(size.ranks))
    )
    np.savez(
        folder / f"load-{placement.version:04d}.npz", load=load * 20, recent=load, ranks=ranks, sent=sent * 10,
        steps=[1, size.steps], recent_steps=[size.steps - 9, size.steps], recent_seconds=5.0,
    )  # fmt: skip
    return load


def _topology(size, rng):
    node = np.arange(size.ranks) // size.per_node
    fast = np.where(node[:, None] == node, 4e9, 2.5e8) * rng.uniform(0.85, 1.1, (size.ranks, size.ranks))
    if size.nodes > 1:
        fast[(node[:, None] == 0) & (node == 1)] /= 3  # a slow link
    np.fill_diagonal(fast, np.inf)
    latency = np.where(node[:, None] == node, 2e-5, 1e-4) * (1 - np.eye(size.ranks))
    return Topology(fast, latency, node)


def _config(size):
    over = {"hidden_size": 128, "num_hidden_layers": size.layers, "num_experts_per_tok": 2}
    model = {"type": "qwen3_moe", "overrides": over, "path": "", "dtype": "float32"}
    data = {"files": ["s3://reader:hunter2@bucket/a.jsonl"], "tokenizer": "bytes"}
    return {"seed": 0, "model": model, "data": data, "optim": {"steps": size.steps}, "router": {"force": "none"}}


def _step(step, size, at, rng, load):
    version = max(v for v, s in enumerate(at) if s < step)
    seconds = 0.3 * (1 - 0.05 * min(version, 6)) * rng.uniform(0.94, 1.06) * (5 if step == 1 else 1)
    line = {
        "step": step, "loss": 1.6 + 4 * np.exp(-6 * step / size.steps) + rng.normal(0, 0.03), "lr": 1e-3,
        "tokens": 4096, "step_seconds": seconds, "tokens_per_second": 4096 / seconds,
        "exchange_seconds": 0.18 * seconds, "expert_seconds": 0.28 * seconds,
        "phase_seconds": {n: s * seconds * rng.uniform(0.9, 1.1) for n, s in PHASES.items()}, "peak_mib": 900,
        "bytes_intra_node": 4_000_000, "bytes_inter_node": 1_000_000, "balancedness": min(0.6 + 0.05 * version, 0.95),
        "world_size": size.ranks, "epoch": 0, "placement_version": version,
        "max_expert_load": (load.max(1) / load.mean(1)).tolist(),
    }  # fmt: skip
    return line | ({"eval_loss": line["loss"] + 0.1} if step % max(size.steps // 8, 1) == 0 else {})


def _events(size, at, outcome):
    """(step, kind, message, fields) in their order."""
    start = {
        "model": "qwen3_moe",
        "layers": size.layers,
        "experts": size.experts,
        "ranks": size.ranks,
        "parameters": 1000,
    }
    yield 0, "state", "4 ranks are formed", {"from": "forming", "to": "stepping"}
    ranks = [
        {"member": f"rank-{r}", "node": r // size.per_node, "node_id": f"{r // size.per_node:04x}", "device": "cpu",
         "host": f"host-{r // size.per_node}", "address": "10.0.0.1", "pid": 100 + r}
        for r in range(size.ranks)
    ]  # fmt: skip
    yield 0, "members", f"{size.ranks} ranks on {size.nodes} node(s) in epoch 0", {"epoch": 0, "ranks": ranks}
    yield 0, "placement", "the run begins with this one", {"placement_version": 0, "cause": "start"}
    yield 0, "start", f"qwen3_moe on {size.ranks} ranks", start
    for version, step in list(enumerate(at))[1:]:
        gain = 0.011 + 0.002 * (version % 3)
        words = f"move {size.moves} experts: predicted step 300 -> {300 - 1e3 * gain:.0f} ms, pays back in 3 steps"
        decided = {"moves": True, "placement_version": version, "gain_predicted": gain, "move_predicted": 0.05}
        yield step, "rebalance", words, {"asked_after": step - 1, "reason": "every 50 steps", **decided}
        yield step, "placement", words, {"placement_version": version, "cause": "rebalance"}
        measured = {"moved_after": step, "gain_measured": 0.9 * gain, "gain_predicted": gain, "move_seconds": 0.06}
        yield step + 10, "rebalance", f"measured after the move of step {step}: {0.9e3 * gain:.3g} ms gained", measured
    third = size.steps // 3
    clocks = {"detect": 0.24, "decide": 0.06, "regroup": 0.07, "restore": 0.56, "first_step": 0.05}
    yield third, "recovered", "rank 2 died; the others go on in epoch 1", {"lost": ["rank-2"], "seconds": clocks}
    yield (
        third + 5,
        "elastic",
        "1 rank comes in epoch 2, switched in 0.2 s",
        {"come": ["rank-9"], "left": [], "seconds": {"regroup": 0.1}},
    )
    yield size.steps // 2, "checkpoint", "checkpoints/step-000120", {"url": "x", "seconds": 0.1}
    yield size.steps // 2 + 3, "routing-collapse", "layer 1: an expert is starved", {"alarm": "starved", "layer": 1}
    if outcome == "done":
        yield size.steps, "checkpoint", "checkpoints/the last", {"url": "x", "seconds": 0.1}
        yield size.steps, "state", "done", {"from": "draining", "to": "stopped"}


def _line(step, kind, message, fields):
    time = (BEGAN + timedelta(seconds=0.3 * step)).isoformat(timespec="seconds")
    return {"time": time, "step": step, "kind": kind, "message": message, "fields": fields}
