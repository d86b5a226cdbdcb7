"""Random draws of training passes (dropout, router noise), made independent of how the batch is divided.

A draw is a function of (seed, step, sequence in the global batch, order of the draw in the forward): the number of
ranks, accumulation, a resume and gradient checkpointing do not change it. Knows no layer and no model.
B sequences of L tokens in one pass of this rank.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from math import prod
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ESCAPED = (
    "random draws of this model depend on the number of ranks, and a resumed run differs from one that went on: it "
    "draws in a way that cannot be followed; to avoid it, set its dropout and noise to 0 in model.overrides"
)
"""Warning about a model whose random draws cannot be made the same for any number of ranks."""


class Draws:
    """What one rank draws in its training passes.

    The first passes are watched. While a model has drawn nothing, the later ones are not, at no cost but a look at
    torch's random state.

    Attributes:
        watching: whether the next pass is watched.
        count: draws of the pass so far; recomputation goes back to what it was at the block's entry.
    """

    _lock = threading.Lock()  # torch's generators are the process's

    def __init__(self, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        self.watching, self.count = True, 0
        self._drawn = self._escaped = self._told = False
        self._alone = False  # inside fused attention of one sequence
        self._pass = (0, 0, 1, 1)  # step, number of the first sequence, B, L

    @contextmanager
    def forward(self, step: int, first: int, sequences: int, length: int) -> Iterator[None]:
        """Around the forward of one pass over `sequences` of `length` tokens; 0 of them: a pass over padding."""
        self._pass = (step, first if sequences else -1, max(sequences, 1), length)
        before = self._state()
        with self.replay(0 if self.watching else None):
            yield
        if before != self._state():
            self._escaped = self._drawn = True
        self.watching = self._drawn

    def news(self) -> str:
        """Once, what there is to say of draws that could not be made independent."""
        if not self._escaped or self._told:
            return ""
        self._told = True
        return ESCAPED

    @contextmanager
    def replay(self, count: int | None) -> Iterator[None]:
        """Inside: draws of the present pass from number `count` on, as they are or were made; None: not watched."""
        if count is None:
            yield
            return
        self.count = count
        with _Seeded(self), _Attention(self):
            yield

    def draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operation that draws, each sequence's part from a seed of its own."""
        self._drawn = True
        self.count += 1
        step, first, sequences, _ = self._pass
        with self._lock:
            states = [generator.get_state() for generator in self._generators()]
            try:
                rows = self._rows(func, args, kwargs)
                if rows is None:  # not of the batch: the same on every rank
                    self._seed(step, first if self._alone else -2)
                    return func(*args, **kwargs)
                parts, total = [], rows * sequences
                for i in range(sequences):
                    self._seed(step, first + i)
                    cut = [_part(a, i * rows, rows, total) for a in args]
                    parts.append(func(*cut, **{k: _part(a, i * rows, rows, total) for k, a in kwargs.items()}))
                return _joined(func, args, kwargs, parts)
            finally:
                for generator, state in zip(self._generators(), states, strict=True):
                    generator.set_state(state)

    def attention(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Fused attention with dropout: sequence by sequence, since its backward draws the same mask again."""
        step, first, sequences, length = self._pass
        query = args[0] if args else kwargs["query"]
        total = query.shape[0]
        if total % sequences:  # not divided by sequence
            self._escaped = True
            return scaled_dot_product_attention(*args, **kwargs)

        def cut(value: Any, i: int) -> Any:
            of_batch = isinstance(value, torch.Tensor) and value.dim() == query.dim()  # a mask may be of all
            return _part(value, i * total // sequences, total // sequences, total) if of_batch else value

        count, out, self._alone = self.count, [], True
        try:
            for i in range(sequences):
                self.count, self._pass = count, (step, first + i, 1, length)
                parts = [cut(a, i) for a in args], {k: cut(a, i) for k, a in kwargs.items()}
                out.append(scaled_dot_product_attention(*parts[0], **parts[1]))
        finally:
            self._pass, self._alone = (step, first, sequences, length), False
        return torch.cat(out)

    def _rows(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        """Rows of one sequence in what is drawn; None if it is not of the batch, or cannot be divided."""
        _, first, sequences, length = self._pass
        shape = next((tuple(s) for a in (*args, *kwargs.values()) if (s := _shape(a))), ())
        if not shape or not prod(shape):
            return None
        whole = shape[0] in (sequences, sequences * length) or (shape[0] % sequences == 0 and length in shape[1:])
        if whole and (len(func._schema.returns) == 1 or func._schema.name == "aten::native_dropout"):
            return int(shape[0] // sequences)
        if first >= 0 and not self._alone and {length, sequences * length} & set(shape):
            self._escaped = True  # of the batch, but in another order
        return None

    def _seed(self, step: int, sequence: int) -> None:
        words = f"{self.seed} {step} {sequence} {self.count}".encode()
        number = int.from_bytes(blake2b(words, digest_size=4).digest(), "little")
        for generator in self._generators():
            generator.manual_seed(number)

    def _generators(self) -> list[torch.Generator]:
        found = [torch.default_generator]
        return found + ([torch.cuda.default_generators[self.device.index or 0]] if self.device.type == "cuda" else [])

    def _state(self) -> list[bytes]:
        with self._lock:
            return [g.get_state().numpy().tobytes() for g in self._generators()]


class _Seeded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Passes every operation that draws from torch's generators to `Draws.draw`; torch marks them with a tag."""

    def __init__(self, draws: Draws):
        super().__init__()  # type: ignore[no-untyped-call]
        self.draws = draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        return self.draws.draw(func, args, kwargs)


class _Attention(TorchFunctionMode):
    """Passes fused attention with dropout to `Draws.attention`."""

    def __init__(self, draws: Draws):
        super().__init__()
        self.draws = draws

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention and (args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0:
            return self.draws.attention(args, kwargs)
        return func(*args, **kwargs)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws from torch's own generator: some operations do only with dropout."""
    arguments = func._schema.arguments
    given = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given |= {a.name: v for a, v in zip(arguments, args, strict=False)} | kwargs
    return given.get("generator") is None and given.get("dropout_p", 1.0) != 0.0


def _shape(argument: Any) -> Any:
    """Shape that an argument of an operation gives to what is drawn; None if it gives none."""
    if isinstance(argument, torch.Tensor):
        return argument.shape
    sizes = isinstance(argument, (list, tuple)) and argument and all(isinstance(n, int) for n in argument)
    return argument if sizes else None


def _part(argument: Any, start: int, rows: int, total: int) -> Any:
    """Rows of an argument that has `total` of them, a tensor or a size; anything else as it is."""
    shape = _shape(argument)
    if not shape or shape[0] != total:
        return argument
    return argument.narrow(0, start, rows) if isinstance(argument, torch.Tensor) else [rows, *argument[1:]]


def _joined(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parts: list[Any]) -> Any:
    """The result for all rows from those of its parts; an operation in place returns what it wrote into."""
    if func._schema.returns[0].alias_info is not None:
        return kwargs["out"] if "out" in kwargs else args[0]
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(p) for p in zip(*parts, strict=True))
    return torch.cat(parts)
