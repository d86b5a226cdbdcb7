"""How this package compiles its kernels: cached on disk, without the GIL, dividing as NumPy does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from numba import njit

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel(function: Function) -> Function:
    """Compile at the first call for its argument types, or load that from numba's cache."""
    return cast(Function, njit(cache=True, nogil=True, error_model="numpy")(function))
