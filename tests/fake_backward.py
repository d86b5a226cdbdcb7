"""Streams in a backward pass on the CUDA that is not there, as torch's engine has them.

Each node runs on the stream of its forward, after the nodes whose gradients it takes; gradients are added up when all
of them are there; the caller's stream comes after the leaves'. Known by hooks on nodes, for the time of one backward.
"""

from __future__ import annotations

import bisect
import warnings

from tests.fake_device import on_device
from tests.fake_streams import HERE, Stream, memory_of

MISMATCH = "The AccumulateGrad node's stream does not match the stream of the node that produced the incoming gradient."


class Adding(Stream):
    """Where gradients are added up, after all nodes so far; the engine records what it reads there."""


class Backward:
    """One call of backward from nodes `roots`, on this thread."""

    def __init__(self, roots):
        self.caller, self.adding = HERE.stream, Adding()
        self.adding.after(self.caller.clock, self.caller.tickets)
        self.givers = {root: [] for root in roots}  # node -> those whose gradients it takes
        self.due = {root: [(dict(self.caller.clock), list(self.caller.tickets))] for root in roots}
        self.leaf_streams, self.handles = set(), []
        todo = list(self.givers)
        while todo:
            node = todo.pop()
            for following in takers(node):
                if following not in self.givers:
                    self.givers[following] = []
                    todo.append(following)
                self.givers[following].append(node)
        for node in self.givers:
            self.handles += [node.register_prehook(self.begin_of(node)), node.register_hook(self.end_of(node))]

    def begin_of(self, node):
        def begin(gradients):
            stream, givers = self.stream_of(node), self.givers[node]
            for clock, tickets in self.due.pop(node, ()):
                stream.after(clock, tickets)
            if len(givers) > 1:
                stream.after(self.adding.clock, self.adding.tickets)
            for gradient in gradients:
                if (memory := memory_of(gradient)) is not None:
                    memory.kept_for.add(stream)  # the engine records what travels from stream to stream
            if is_leaf(node):
                self.leaf_streams.add(stream)
                if any(self.stream_of(giver) is not stream for giver in givers):
                    warnings.warn(MISMATCH, stacklevel=2)
            HERE.stream, HERE.fills = stream, any(on_device(g) for g in gradients)

        return begin

    def end_of(self, node):
        def end(*_):
            stream = HERE.stream
            for following in takers(node):
                self.due.setdefault(following, []).append((dict(stream.clock), list(stream.tickets)))
            self.adding.after(stream.clock, stream.tickets)
            HERE.stream, HERE.fills = self.adding, False

        return end

    def stream_of(self, node):
        """Where the node was made; that of a leaf is made by the first operation which takes the leaf."""
        if is_leaf(node):
            givers = self.givers[node]
            return self.stream_of(min(givers, key=lambda giver: giver._sequence_nr())) if givers else self.caller
        at = bisect.bisect_right(HERE.switches, node._sequence_nr(), key=lambda switch: switch[0])
        return HERE.switches[max(at - 1, 0)][1]

    def close(self):
        """Backward has ended, well or not."""
        for handle in self.handles:
            handle.remove()
        HERE.stream, HERE.fills = self.caller, False
        for stream in self.leaf_streams:
            self.caller.after(stream.clock, stream.tickets)


def takers(node):
    """Nodes that take this one's gradients."""
    return [following for following, _ in node.next_functions if following is not None]


def is_leaf(node):
    return node.name() == "torch::autograd::AccumulateGrad"
