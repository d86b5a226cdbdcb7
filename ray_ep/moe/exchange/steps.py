"""A layer's pass in steps, so that several parts of its tokens can be under way at once.

What the steps do is the bodies' (grouped.py, around.py, bounded.py); here is how they are driven, one after the other
or side by side. T tokens, K top_k, H hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from ray_ep.collective import Group
from ray_ep.moe.site import Body, Site

Steps = Generator[torch.Tensor | None, Any, torch.Tensor]
"""One pass of a body. It yields a tensor on the device that it must read on the host, which is sent to it as an array,
and None once when its rows are on their way and its experts have not begun; it returns out [T, H]."""


class SteppedBody(ABC):
    """A body whose pass can be taken apart.

    Args:
        site: of the layer.
    """

    def __init__(self, site: Site):
        self.site = site

    @abstractmethod
    def steps(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Steps:
        """`Body.compute` in steps; between two of them no phase of the meter is open."""

    def compute(self, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """See `Body.compute`."""
        return together([Part(self.steps(module, hidden, index, weights))], self.site.traffic.group)[0]


class Part:
    """Some tokens' pass under way.

    Args:
        stream: of the device that it runs on, after all that the current one holds; None: the current one, or the CPU.

    Attributes:
        asked: what it must know to go on; None: nothing.
        out: [T, H] of its tokens once it is over.
    """

    def __init__(self, steps: Steps, stream: torch.cuda.Stream | None = None):
        self.steps, self.stream = steps, stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
        self.asked: torch.Tensor | None = None
        self.out: torch.Tensor | None = None

    def go(self, answer: np.ndarray | None = None) -> None:
        """Make the next step; `answer` is what was asked for."""
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            try:
                self.asked = self.steps.send(answer)
            except StopIteration as end:
                self.asked, self.out = None, end.value

    def join(self) -> None:
        """What the current stream does next comes after what this part has done."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)


def steps_of(body: Body, module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Steps:
    """The pass of any body in steps: in one, if it cannot be taken apart."""
    if isinstance(body, SteppedBody):
        return (yield from body.steps(module, hidden, index, weights))
    return body.compute(module, hidden, index, weights)


def read(asked: list[torch.Tensor], group: Group) -> list[np.ndarray]:
    """Tensors of one dtype, on the host: the one place where a pass waits for the device, once for all of them."""
    group.wait()
    flat = (asked[0] if len(asked) == 1 else torch.cat([a.reshape(-1) for a in asked])).cpu().numpy().reshape(-1)
    ends = np.cumsum([a.numel() for a in asked])
    return [part.reshape(a.shape) for part, a in zip(np.split(flat, ends[:-1]), asked, strict=True)]


def together(parts: list[Part], group: Group) -> list[torch.Tensor]:
    """Run all parts, first each until its rows are on their way, then each to its end: out [T, H] of each.

    So rows of later parts travel while the experts of earlier ones compute, and all parts' sizes are read at once.
    Every rank makes the same steps in this order, and backward undoes them in the opposite one.
    """
    for part in parts:
        part.go()
    while asking := [part for part in parts if part.asked is not None]:
        for part in asking:
            part.join()
        answers = read([part.asked for part in asking if part.asked is not None], group)
        for part, answer in zip(asking, answers, strict=True):
            part.go(answer)
    for part in parts:
        while part.out is None:
            part.go()
        part.join()
    return [part.out for part in parts if part.out is not None]


class WithParameters:
    """An experts module with other per-expert parameters, for the length of one pass or of one kernel's call.

    Args:
        params: by name, with a graph of their own maybe, one row for each expert.
    """

    def __init__(self, module: Any, params: dict[str, torch.Tensor]):
        self.module, self.params, self.num_experts = module, params, len(next(iter(params.values())))

    @staticmethod
    def of_streams(module: Any) -> WithParameters:
        """The module's own, through a node of the current stream: it takes gradients from those of all parts.

        A parameter itself expects them from one.
        """
        return WithParameters(module, {name: p.view_as(p) for name, p in module.named_parameters(recurse=False)})

    def __getattr__(self, name: str) -> Any:
        return self.params[name] if name in self.params else getattr(self.module, name)

    def named_parameters(self, recurse: bool = True) -> Iterator[tuple[str, torch.Tensor]]:
        """As of a module."""
        return iter(self.params.items())

    def parameters(self, recurse: bool = True) -> Iterator[torch.Tensor]:
        """As of a module."""
        return iter(self.params.values())
