"""Driver of test_cluster.py, inside a lab: an actor on each host, one all_to_all among them; prints a JSON line."""

import json
import os
from pathlib import Path

import ray
import torch

from ray_ep.collective.ray_backend import join, leave

ROWS = 250_000
"""Rows [int32] that each member sends to each other one: 1 MB."""


@ray.remote(num_cpus=1)
class Member:
    """A member of the group, alone on its host: the host has one CPU."""

    def join(self, rank, size):
        self.group = join("lab", rank, size, timeout_s=60)

    def exchange(self):
        """Send row values 10 * rank + d to rank d; (address, values that came by source, bytes this host sent)."""
        rank, size = self.group.rank, self.group.size
        before = sent()
        rows = torch.tensor([10 * rank + d for d in range(size)], dtype=torch.int32).repeat_interleave(ROWS)
        output = torch.empty_like(rows)
        self.group.all_to_all(output, rows, [ROWS] * size, [ROWS] * size)
        self.group.barrier()  # the other has it all: nothing waits in a socket here any more
        values = [part.unique().tolist() for part in output.chunk(size)]
        return ray.util.get_node_ip_address(), values, sent() - before

    def leave(self):
        leave("lab")


def sent():
    """Bytes that went out of this host's one interface."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if "eth0:" in x)
    return int(line.split(":")[1].split()[8])


if __name__ == "__main__":
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
    members = [Member.remote() for _ in range(2)]
    ray.get([m.join.remote(r, 2) for r, m in enumerate(members)])
    results = ray.get([m.exchange.remote() for m in members])
    ray.get([m.leave.remote() for m in members])
    print(json.dumps(results), flush=True)
