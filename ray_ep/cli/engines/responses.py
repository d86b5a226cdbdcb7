"""Routing in responses of vLLM and SGLang: JSON values -> expert ids [tokens, layers, top_k]. No files are opened here.

vLLM sends arrays: nested lists, or base64 of a .npy file. SGLang sends base64 of bare int32: of every token but the
last, all layers (dense ones as zeros), top_k. Newer servers say the shape in expert_ids_schema; else the tokens are
counted in the same response, and top_k is told from the ids, for a token never names an expert twice in a layer.

Sources (commits of public repositories, read in 2026): vLLM as in ray_ep.placement.engines.records; SGLang,
python/sglang/srt/managers/tokenizer_manager.py and state_capturer/routed_experts.py (meta_info.routed_experts), and its
end-to-end tests of input_expert_ids, output_expert_ids and expert_ids_schema (in meta_info, or sglext of OpenAI's API).
"""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_ep.cli.engines.formats import ALLOWED, holds
from ray_ep.errors import PlacementError

SERVED = {"choices", "outputs", "routed_experts", "prompt_routed_experts", "meta_info", "sglext", "sgl_ext", "error"}
"""A mapping with one of these keys is a response."""
MOST_TOP_K = 64
"""Experts of a token; a response that names more for one is refused as damaged."""

NO_ROUTING = (
    "responses without routed experts: start vLLM with --enable-return-routed-experts, SGLang with the same flag and "
    '"return_routed_experts": true in each request'
)
"""Refusal of responses that hold no routing: how to start the engine so that they do."""


@dataclass(frozen=True)
class Flat:
    """SGLang's ids. tokens: how many they may be of, the likeliest first; shape: layers and top_k, where said."""

    where: str
    ids: npt.NDArray[np.int32]
    tokens: tuple[int, ...]
    shape: tuple[int, int] | None


@dataclass
class Routed:
    """What was found in responses.

    Args:
        arrays: vLLM's, by name. flat: SGLang's. responses, empty, again: how many there were, how many of them without
            routing, and how many left out because one of the same id was there before.
    """

    arrays: list[tuple[str, Any]] = field(default_factory=list)
    flat: list[Flat] = field(default_factory=list)
    responses: int = 0
    empty: int = 0
    again: int = 0
    ids: set[str] = field(default_factory=set)

    def add(self, tree: Any, where: str) -> None:
        """Take a response, a list of responses, or an array; raises PlacementError for anything else."""
        if isinstance(tree, list) and all(isinstance(x, Mapping) for x in tree):
            for i, item in enumerate(tree):
                self.add(item, where if len(tree) == 1 else f"{where}: [{i}]")
            return
        if not isinstance(tree, np.ndarray) and not (isinstance(tree, Mapping) and tree.keys() & SERVED):
            raise PlacementError(f"{where}: not a routing record, it holds {holds(tree)}; allowed are {ALLOWED}")
        self.responses += 1
        before = len(self.arrays) + len(self.flat)
        if isinstance(tree, np.ndarray):
            self._array(tree, where)
        elif self._seen(tree):
            self.again += 1
            return
        else:
            self._response(tree, where, _tokens(tree))
        self.empty += len(self.arrays) + len(self.flat) == before

    def notes(self) -> tuple[str, ...]:
        """What was left out, a sentence each."""
        said = (
            (self.empty, f"{self.empty} of {self.responses} responses hold no routing and are left out"),
            (self.again, f"{self.again} of {self.responses} responses are there twice (same id) and are counted once"),
        )
        return tuple(words for number, words in said if number)

    def _seen(self, tree: Mapping[str, Any]) -> bool:
        """Whether a response of this id was there before."""
        meta = tree.get("meta_info")
        name = tree.get("id") or (meta.get("id") if isinstance(meta, Mapping) else None)
        known = name in self.ids if isinstance(name, str) else False
        if isinstance(name, str):
            self.ids.add(name)
        return known

    def _response(self, tree: Mapping[str, Any], where: str, tokens: int) -> None:
        for key in ("prompt_routed_experts", "routed_experts"):
            self._array(tree.get(key), f"{where}: {key}")
        for key in ("meta_info", "sglext", "sgl_ext"):
            inner = tree.get(key)
            if isinstance(inner, Mapping):
                self._sglang(inner, f"{where}: {key}", _tokens(inner) or tokens)
        for key in ("choices", "outputs"):
            parts = tree.get(key)
            for i, part in enumerate(parts if isinstance(parts, list) else []):
                if isinstance(part, Mapping):
                    self._response(part, f"{where}: {key}[{i}]", _tokens(part) or tokens)

    def _array(self, value: Any, where: str) -> None:
        """vLLM's; null: the request was aborted, or the server does not capture. Empty: it had no token to route."""
        found = _npy(_bytes(value, where), where) if isinstance(value, str) and value else value
        there = _size(found, where) > 0 if isinstance(found, list | np.ndarray) else found not in (None, "")
        if there:
            self.arrays.append((where, found))

    def _sglang(self, inner: Mapping[str, Any], where: str, tokens: int) -> None:
        """All of the stream under routed_experts, or its two parts; a text, or one for each of several choices."""
        shape = _schema(inner.get("expert_ids_schema"), where)
        whole = inner.get("routed_experts")
        keys = ("routed_experts",) if whole else ("input_expert_ids", "output_expert_ids")
        likely = (tokens - 1, tokens) if whole and tokens else ()
        for key in keys:
            value = inner.get(key)
            texts = value if isinstance(value, list) and value and all(isinstance(x, str) for x in value) else [value]
            for one in texts:
                if not isinstance(one, str):
                    self._array(one, f"{where}.{key}")
                    continue
                data = _bytes(one, f"{where}.{key}")
                if data.startswith(b"\x93NUMPY"):
                    self._array(one, f"{where}.{key}")
                elif len(data) % 4:
                    raise PlacementError(f"{where}.{key}: {len(data)} bytes: expected base64 of int32, 4 bytes each")
                elif data:
                    self.flat.append(Flat(f"{where}.{key}", np.frombuffer(data, "<i4"), likely, shape))


def shaped(flat: Sequence[Flat], given: tuple[int, int] | None) -> tuple[list[tuple[str, Any]], str]:
    """SGLang's ids as arrays [tokens, layers, top_k], and how they were read, in a sentence.

    Args:
        given: layers and top_k; None: as the responses say, else as their ids tell.

    Raises:
        PlacementError: ids that do not make whole tokens; nothing that tells the number of tokens.
    """
    shape = given or next((f.shape for f in flat if f.shape), None)
    how = "as given" if given else "as they say" if shape else "told from the ids: --routed LAYERSxTOP_K says otherwise"
    layers, top_k = shape or _told(flat)
    for f in flat:
        if len(f.ids) % (layers * top_k):
            raise PlacementError(
                f"{f.where}: {len(f.ids)} ids are not whole tokens of {layers} layers x top {top_k}; --routed "
                "LAYERSxTOP_K gives the shape (all layers of the model, dense ones too)"
            )
    return [
        (f.where, f.ids.reshape(-1, layers, top_k)) for f in flat
    ], f"routing of {layers} layers, top {top_k}, {how}"


def _told(flat: Sequence[Flat]) -> tuple[int, int]:
    """Layers and top_k with which all ids make whole tokens, no token naming an expert twice in a layer."""
    counted = [[len(f.ids) // t for t in f.tokens if t > 0 and len(f.ids) % t == 0] for f in flat]
    widths = [w for w in next((c for c in counted if c), []) if all(w in c for c in counted if c)]
    widths = [w for w in widths if all(len(f.ids) % w == 0 for f in flat)]
    if not widths:
        raise PlacementError(
            f"{flat[0].where}: {len(flat[0].ids)} ids, and nothing says of how many tokens, layers and experts a token "
            "(prompt_tokens and completion_tokens beside them do, as SGLang writes them): give --routed LAYERSxTOP_K, "
            "all layers of the model, such as --routed 61x8"
        )
    found = [(w // k, k) for w in widths if (k := _top_k(flat, w))]
    return next((x for x in found if x[1] > 1), found[0])


def _top_k(flat: Sequence[Flat], width: int) -> int:
    """The largest divisor of ids a token for which no layer names an expert twice; dense layers are all 0 or all -1.

    At least two layers, if that can be: of few tokens, two layers may name different experts by chance.
    """
    fits = [k for k in range(1, min(width, MOST_TOP_K) + 1) if width % k == 0 and all(_once(f.ids, k) for f in flat)]
    return max((k for k in fits if k < width), default=max(fits))


def _once(ids: npt.NDArray[np.int32], top_k: int) -> bool:
    rows = np.sort(ids.reshape(-1, top_k), 1)
    different = (rows[:, 1:] != rows[:, :-1]).all(1) & (rows[:, 0] >= 0)
    nothing = (rows[:, 0] == rows[:, -1]) & (rows[:, 0] <= 0)
    return bool((different | nothing).all())


def _tokens(tree: Mapping[str, Any]) -> int:
    """Tokens of prompt and answer that the response counts, in itself or in its usage; 0: it does not say."""
    usage = tree.get("usage")
    for place in (tree, usage if isinstance(usage, Mapping) else {}):
        numbers = [place.get(k) for k in ("prompt_tokens", "completion_tokens")]
        if all(type(n) is int and n >= 0 for n in numbers):
            return int(sum(n for n in numbers if isinstance(n, int)))
    return 0


def _schema(schema: Any, where: str) -> tuple[int, int] | None:
    if not isinstance(schema, Mapping):
        return None
    layers, top_k = schema.get("num_layers"), schema.get("top_k")
    if not (type(layers) is int and type(top_k) is int and layers > 0 and top_k > 0):  # true is no number
        raise PlacementError(
            f"{where}.expert_ids_schema: num_layers {layers!r}, top_k {top_k!r}: expected positive numbers"
        )
    return layers, top_k


def _bytes(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise PlacementError(
            f"{where}: expected base64 of a .npy file (vLLM) or of int32 (SGLang); it begins with {text[:12]!r}"
        ) from None


def _npy(data: bytes, where: str) -> Any:
    try:
        return np.load(io.BytesIO(data), allow_pickle=False)
    except Exception:  # on damaged bytes NumPy raises SyntaxError, TokenError and more
        raise PlacementError(f"{where}: expected base64 of a .npy file (vLLM)") from None


def _size(value: Any, where: str) -> int:
    """How many numbers there are; PlacementError where rows differ in length."""
    try:
        return int(np.size(value))
    except (ValueError, OverflowError):
        raise PlacementError(f"{where}: rows of different lengths: expected [tokens, layers, top_k]") from None
