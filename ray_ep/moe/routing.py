"""Around the router: logits for the balancing losses, recorded routes for recomputation, forced routes.

With the routes, a recomputed block makes its random draws again (draws.py).

Hooks on transformers' own router modules; nothing of them is replaced. T tokens, E experts, K top_k.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from ray_ep.moe.draws import Draws
from ray_ep.moe.passes import Passes, recomputing


@dataclass(slots=True)
class Tape:
    """What one checkpointed block did in its forward, to be done again in its recomputation."""

    idle: bool
    tokens: torch.Tensor | None  # see Pass
    drawn: int | None  # random draws of the pass before this block; None: they are not watched
    routes: list[torch.Tensor] = field(default_factory=list)
    replaying: bool = False
    position: int = 0


class Routing:
    """What the routers of one model share on one rank.

    Attributes:
        logits: [T, E] router logits of each layer in the last forward, with their graph; None without a router.
        force: none, balanced or skewed; anything else than none is for benchmarks only.
        first_token: number that this rank's first token has in the global batch, so that forced routes do not depend
            on how the batch is divided.
        draws: the random draws of training passes; None: they are torch's.
    """

    def __init__(self, layers: int, passes: Passes | None = None):
        self.passes = passes or Passes()
        self.logits: list[torch.Tensor | None] = [None] * layers
        self.routers: list[torch.nn.Module | None] = [None] * layers
        self.force = "none"
        self.first_token = 0
        self.draws: Draws | None = None
        self._tape: Tape | None = None
        self._tokens: torch.Tensor | None = None  # of the last forward: see Pass

    def logits_of_tokens(self) -> list[torch.Tensor | None]:
        """`logits` without those of padding: chosen here, since a recomputed block must save what its forward did."""
        if self._tokens is None:
            return self.logits
        return [None if x is None else x.index_select(0, self._tokens) for x in self.logits]

    def forget(self) -> None:
        """Let go of the last pass's logits, and with them of its graph."""
        self.logits[:], self._tokens = [None] * len(self.logits), None

    def attach(
        self, index: int, router: torch.nn.Module, num_experts: int, top_k: int, logits_at: int | None = None
    ) -> None:
        """Hook the router of layer `index`.

        Args:
            logits_at: which of its outputs are the logits; None: the first one with E columns.
        """
        self.routers[index] = router
        modes: list[ChoiceMode] = []

        def before(module: torch.nn.Module, args: Any) -> None:
            if self._tape is not None or self.force != "none":
                modes.append(ChoiceMode(num_experts, top_k, lambda chosen: self._choose(chosen, num_experts)))
                modes[-1].__enter__()  # type: ignore[no-untyped-call]

        def after(module: torch.nn.Module, args: Any, output: Any) -> None:
            if modes:
                modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
            outputs = output if isinstance(output, tuple) else (output,)
            if not recomputing():
                candidates = outputs if logits_at is None else outputs[logits_at : logits_at + 1]
                logits = next((o for o in candidates if _is_logits(o, num_experts)), None)
                if logits is not None:
                    logits = logits.reshape(-1, num_experts)[: 0 if self.passes.now.idle else None]
                    self._tokens = self.passes.now.tokens
                self.logits[index] = logits

        router.register_forward_pre_hook(before)
        router.register_forward_hook(after, always_call=True)

    def checkpoint_blocks(self, model: torch.nn.Module) -> None:
        """Make transformers' gradient checkpointing replay recorded routes, whenever the user switches it on."""

        def before(module: Any, args: Any) -> None:
            inner = getattr(module, "_gradient_checkpointing_func", None)
            if module.gradient_checkpointing and inner is not None and not hasattr(inner, "ray_ep_inner"):
                module._gradient_checkpointing_func = self._with_tape(inner)

        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.register_forward_pre_hook(before)

    def _with_tape(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
            now = self.passes.now
            tape = Tape(now.idle, now.tokens, self.draws.count if self.draws and self.draws.watching else None)

            def run(*inputs: Any) -> Any:
                with self._playing(tape):
                    return function(*inputs)

            # No early stop: every rank must take part in every exchange of the recomputed block.
            with set_checkpoint_early_stop(False):
                return inner(run, *args)

        checkpointed.ray_ep_inner = inner  # type: ignore[attr-defined]
        return checkpointed

    @contextmanager
    def _playing(self, tape: Tape) -> Any:
        outer, self._tape = self._tape, tape
        tape.replaying, tape.position = recomputing(), 0
        again = self.draws.replay(tape.drawn) if tape.replaying and self.draws else nullcontext()
        try:
            with again, self.passes.changed(idle=tape.idle, tokens=tape.tokens):
                yield
        finally:
            self._tape = outer

    def _choose(self, chosen: torch.Tensor, num_experts: int) -> torch.Tensor:
        """The routes [T, K] to take, given the router's own `chosen`: replayed, forced, or those, and recorded."""
        tape = self._tape
        if tape is not None and tape.replaying:
            tape.position += 1
            return tape.routes[tape.position - 1]
        if self.force != "none":
            chosen = forced(self.force, chosen, num_experts, self.first_token)
        if tape is not None:
            tape.routes.append(chosen)
        return chosen


class ChoiceMode(TorchFunctionMode):
    """Inside a router's forward: replaces the indices of its top-k over the experts; values are gathered anew.

    So weights and their gradients are those of the replaced choice.
    """

    def __init__(self, num_experts: int, top_k: int, choose: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.num_experts, self.top_k, self.choose = num_experts, top_k, choose

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.topk, torch.Tensor.topk):
            scores = args[0] if args else kwargs["input"]
            if scores.shape[-1] == self.num_experts and out.indices.shape[-1] == self.top_k and scores.dim() == 2:
                index = self.choose(out.indices)
                return torch.return_types.topk((scores.gather(-1, index), index))
        return out


def forced(kind: str, chosen: torch.Tensor, num_experts: int, first_token: int) -> torch.Tensor:
    """Routes [T, K] that depend on the token's number alone.

    balanced: every expert gets the same. skewed: half of the tokens go to the first K experts, the rest are balanced.
    """
    tokens, top_k = chosen.shape
    number = torch.arange(first_token, first_token + tokens, device=chosen.device)[:, None]
    each = torch.arange(top_k, device=chosen.device)[None]
    routes = (number * top_k + each) % num_experts
    if kind == "skewed":
        routes = torch.where(number % 2 == 0, each, (number // 2 * top_k + each) % num_experts)
    return routes


def _is_logits(output: Any, num_experts: int) -> bool:
    return isinstance(output, torch.Tensor) and output.is_floating_point() and output.shape[-1] == num_experts
