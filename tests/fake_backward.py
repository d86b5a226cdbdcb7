"""Streams in a backward pass on the CUDA that is not there, as torch's engine has them."""

from __future__ import annotations

import bisect

from tests.fake_device import on_device
from tests.fake_streams import HERE, Stream, memory_of


class Adding(Stream):
    """Where torch's engine adds gradients up, after all nodes so far; it records what it reads there."""


class Backward:
    """Streams in one call of backward, as torch's engine has them.

    A node runs on the stream of its forward, after the nodes whose gradients it takes; gradients are added up where and
    when all of them are there.
    """

    def __init__(self, roots):
        self.caller = HERE.stream
        self.adding = Adding()
        self.due, self.inputs, self.handles, self.nodes = {}, {}, [], []
        self.adding.after(self.caller.clock, self.caller.tickets)
        todo = [root for root in roots if root is not None]
        for root in todo:
            self.due[root] = [(dict(self.caller.clock), list(self.caller.tickets))]
        seen = set(todo)
        while todo:
            node = todo.pop()
            self.nodes.append(node)
            for following, _ in node.next_functions:
                if following is not None:
                    self.inputs[following] = self.inputs.get(following, 0) + 1
                    if following not in seen:
                        seen.add(following)
                        todo.append(following)
        for node in self.nodes:
            self.handles += [node.register_prehook(self.begin_of(node)), node.register_hook(self.end_of(node))]

    def begin_of(self, node):
        def begin(gradients):
            stream = self.stream_of(node)
            for gradient in gradients:
                if (memory := memory_of(gradient)) is not None:
                    memory.kept_for.add(stream)  # the engine records what travels from stream to stream
            for clock, tickets in self.due.pop(node, ()):
                stream.after(clock, tickets)
            if self.inputs.get(node, 0) > 1:
                stream.after(self.adding.clock, self.adding.tickets)
            HERE.stream, HERE.fills = stream, any(on_device(g) for g in gradients)

        return begin

    def end_of(self, node):
        def end(*_):
            stream = HERE.stream
            for following, _ in node.next_functions:
                if following is not None:
                    self.due.setdefault(following, []).append((dict(stream.clock), list(stream.tickets)))
            self.adding.after(stream.clock, stream.tickets)
            HERE.stream, HERE.fills = self.adding, False

        return end

    def stream_of(self, node):
        number = node._sequence_nr()
        if number >= 2**63:  # the leaves': no number; the engine orders the caller after them
            return self.caller
        at = bisect.bisect_right(HERE.switches, number, key=lambda switch: switch[0])
        return HERE.switches[max(at - 1, 0)][1]

    def close(self):
        for handle in self.handles:
            handle.remove()
        HERE.stream, HERE.fills = self.caller, False
