"""A group that fails where a test says, and everything that a trainer holds, to be compared. Ranks are threads."""

import threading
import time
from dataclasses import fields, is_dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from ray_ep.collective import Group, gloo
from ray_ep.moe.cpu.pool import Pool
from ray_ep.rank.data.corpus import Corpus


class Fault(Exception):
    """What a scripted rank raises, alone."""


class FailingGroup(Group):
    """Passes calls on to a group that can be replaced; the n-th call of all kinds, from 0, raises on this rank.

    Then all its peers' groups are aborted, as the driver does. Ends of loans are calls, too.
    """

    def __init__(self, inner, peers):
        self.inner, self.peers, self.rank, self.size = inner, peers, inner.rank, inner.size
        self.members = inner.members
        self.script(None)

    def script(self, number, after=False):
        """Fail at a call, or once it is done; None: never. Counts anew."""
        self.number, self.after, self.calls, self.happened, self.log = number, after, 0, 0, []
        self.where = getattr(self, "where", lambda: "")  # what the rank is at

    def fail(self):
        self.happened += 1
        for peer in self.peers:
            peer.inner.abort()
        raise Fault(f"rank {self.rank} at its call {self.number}, {self.log[-1]}")

    @property
    def epoch(self):
        return self.inner.epoch

    def _call(self, name, *args):
        self.log.append((self.where(), name))
        now, self.calls = self.calls == self.number, self.calls + 1
        if now and not self.after:
            self.fail()
        result = getattr(self.inner, name)(*args) if isinstance(name, str) and hasattr(self.inner, name) else args[0]()
        if now:
            limit = time.monotonic() + 1  # peers leave the call, too, and are in the next one, if there is one
            others = [peer for peer in self.peers if peer is not self]
            while any(peer.calls < self.calls + 1 for peer in others) and time.monotonic() < limit:
                time.sleep(0.001)
            self.fail()
        return result

    def all_to_all(self, output, input, output_sizes, input_sizes):
        self._call("all_to_all", output, input, output_sizes, input_sizes)

    def begin_loan(self, message, output_sizes, input_sizes):
        end = self._call("begin_loan", message, output_sizes, input_sizes)
        return lambda: self._call("end of a loan", end)

    def all_gather(self, input):
        return self._call("all_gather", input)

    def all_reduce(self, tensor, op="sum"):
        self._call("all_reduce", tensor, op)

    def broadcast(self, tensor, source):
        self._call("broadcast", tensor, source)

    def send(self, tensor, to, limit_s=None):
        self._call("send", tensor, to, limit_s)

    def receive(self, tensor, source, limit_s=None):
        self._call("receive", tensor, source, limit_s)

    def barrier(self):
        self._call("barrier")

    def split(self, color):
        raise NotImplementedError

    def take(self, *shape, like):
        return self.inner.take(*shape, like=like)

    def wait(self):
        self.inner.wait()

    def abort(self):
        self.inner.abort()

    def close(self):
        self.inner.close()


def together(work, size):
    """[work(r)] of ranks in threads; what one raises stands in its place, as words: (kind, text)."""
    results = [None] * size

    def main(rank):
        try:
            results[rank] = work(rank)
        except Exception as e:  # its traceback would hold the graph
            results[rank] = (type(e).__name__, str(e))

    threads = [threading.Thread(target=main, args=(r,), daemon=True) for r in range(size)]
    [t.start() for t in threads]
    [t.join(60) for t in threads]
    assert not any(t.is_alive() for t in threads), "a rank hangs"
    return results


def form(size, timeout_s=20.0, epoch=0):
    """[rank] gloo groups."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=20))
    return together(lambda r: gloo(store, r, size, epoch, host="127.0.0.1", timeout_s=timeout_s), size)


EXEMPT = {
    "group": "another one is formed after a failure",
    "cfg": "nobody changes it",
    "config": "nobody changes it",
    "_buffers": "a pool's memory is used again; that it is free is looked at",
    "_began": "what had been spent when the last step began: read inside of a step alone",
}


PLAIN = (type(None), bool, int, float, str, bytes, torch.dtype, torch.device, np.generic)


def leaf(x):
    """A copy of what holds no other objects; Ellipsis: it may hold some."""
    if isinstance(x, torch.Tensor):
        return x.detach().clone()
    if isinstance(x, np.random.Generator):
        return str(x.bit_generator.state)
    if isinstance(x, threading.Event):
        return x.is_set()
    return x.copy() if isinstance(x, np.ndarray) else x if isinstance(x, PLAIN) else ...


def held(root):
    """({path: value} of all that an object holds, copied; its pools). Functions, corpora and EXEMPT are left out."""
    found, pools, seen = {}, [], set()

    def visit(path, x):
        if (value := leaf(x)) is not ...:
            found[path] = value
            if isinstance(x, torch.Tensor) and x.is_leaf and x.grad is not None:
                found[f"{path}.grad"] = x.grad.clone()
        elif isinstance(x, (Group, Corpus)) or id(x) in seen:
            return
        elif isinstance(x, (list, tuple, dict)):
            seen.add(id(x))
            found[f"{path}.len"] = len(x)
            for key, value in x.items() if isinstance(x, dict) else enumerate(x):
                visit(f"{path}[{key}]", value)
        elif isinstance(x, torch.nn.Module):
            seen.add(id(x))
            for name, value in (*x.named_parameters(), *x.named_buffers()):
                visit(f"{path}.{name}", value)
            found[f"{path}.training"] = [m.training for m in x.modules()]
        elif type(x).__module__.startswith("ray_ep"):
            seen.add(id(x))
            pools.extend([x] if isinstance(x, Pool) else [])
            names = [f.name for f in fields(x)] if is_dataclass(x) else list(vars(x))
            for name in names:
                if name not in EXEMPT:
                    visit(f"{path}.{name}", getattr(x, name))

    visit("", root)
    return found, pools


def differences(a, b, apart=lambda path: False):
    """Paths where two results of `held` differ, but those that are told apart."""
    keys = [k for k in {**a, **b} if not apart(k)]
    return [k for k in keys if (k in a) != (k in b) or not same(a[k], b[k])]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
