"""Compiled: sets of tokens as bits, 64 in a word; how many are in one set, or in several.

For all searches and simulations that ask who visits what. E experts, T tokens, K top_k, B words, I items.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ray_ep.placement.compiled import kernel

_M1, _M2, _M4 = np.uint64(0x5555555555555555), np.uint64(0x3333333333333333), np.uint64(0x0F0F0F0F0F0F0F0F)
_H, _S1, _S2, _S4, _S56 = (
    np.uint64(0x0101010101010101),
    np.uint64(1),
    np.uint64(2),
    np.uint64(4),
    np.uint64(56),
)


@kernel
def ones(x: Any) -> Any:
    """Bits set in a word; LLVM turns this into its population count."""
    x = x - ((x >> _S1) & _M1)
    x = (x & _M2) + ((x >> _S2) & _M2)
    x = (x + (x >> _S4)) & _M4
    return (x * _H) >> _S56


@kernel
def common(a: Any, b: Any) -> Any:
    """Tokens in both sets [B]."""
    total = np.uint64(0)
    for w in range(a.shape[0]):
        total += ones(a[w] & b[w])
    return np.int64(total)


@kernel
def common3(a: Any, b: Any, c: Any) -> Any:
    """Tokens in all three sets [B]."""
    total = np.uint64(0)
    for w in range(a.shape[0]):
        total += ones(a[w] & b[w] & c[w])
    return np.int64(total)


@kernel
def token_bits(sample: Any, experts: int) -> Any:
    """sample [T, K] -> [E, B] which tokens chose each expert."""
    bits = np.zeros((experts, (sample.shape[0] + 63) // 64), np.uint64)
    for t in range(sample.shape[0]):
        for k in range(sample.shape[1]):
            bits[sample[t, k], t >> 6] |= np.uint64(1) << np.uint64(t & 63)
    return bits


@kernel
def split_bits(bits: Any, item: Any) -> Any:
    """Deal each expert's tokens out to its items in turn: [E, B], item [I] expert of each -> [I, B]."""
    total = np.zeros(bits.shape[0], np.int64)
    number = np.empty(item.shape[0], np.int64)
    for x in range(item.shape[0]):
        number[x] = total[item[x]]
        total[item[x]] += 1
    out = np.zeros((item.shape[0], bits.shape[1]), np.uint64)
    for x in range(item.shape[0]):
        e = item[x]
        if total[e] == 1:
            out[x] = bits[e]
            continue
        turn = 0
        for w in range(bits.shape[1]):
            left = bits[e, w]
            while left:
                rest = left & (left - np.uint64(1))
                if turn % total[e] == number[x]:
                    out[x, w] |= left ^ rest
                turn += 1
                left = rest
    return out
