"""How the package compiles its kernels: cached on disk, without the GIL, dividing as NumPy does.

Any layer may import this; it imports numba alone. What a kernel computes lives beside its callers, not here.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.dispatcher import Dispatcher

Function = TypeVar("Function", bound=Callable[..., Any])


def kernel_with(fastmath: bool = False, forceinline: bool = False) -> Callable[[Function], Function]:
    """A decorator that compiles at the first call for its argument types, or loads that from numba's cache.

    Args:
        fastmath: sums in any order. forceinline: no call where another kernel calls this one.
    """

    def decorate(function: Function) -> Function:
        dispatcher: Any = njit(nogil=True, error_model="numpy", fastmath=fastmath, forceinline=forceinline)(function)
        dispatcher._cache = cast(Any, _SourcesCache)(function)
        return cast(Function, dispatcher)

    return decorate


kernel = kernel_with()
inlined = kernel_with(forceinline=True)
"""For small kernels with many arrays, whose call would cost more than their work."""


class _Index(IndexDataCacheFile):
    """numba's index of a kernel's entries, empty where it names what an upgrade has renamed.

    It is unpickled whole, named tuples by their names, before numba looks whether it is of the present source.
    """

    def _load_index(self) -> dict[Any, str]:
        try:
            found: dict[Any, str] = super()._load_index()  # type: ignore[no-untyped-call]
        except (AttributeError, ImportError):
            return {}
        return found


class _SourcesCache(FunctionCache):
    """numba's cache on disk, where an entry belongs to the sources of all that the kernel can reach.

    numba's own key knows the file of the kernel alone: a caller whose callee lies in another file would go on with the
    old one, after an upgrade, too. The digest is taken at the first call, when all names of a module are bound.
    """

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)  # type: ignore[no-untyped-call]
        place = self._impl.locator
        self._cache_file = _Index(place.get_cache_path(), self._impl.filename_base, place.get_source_stamp())  # type: ignore[no-untyped-call]

    def _index_key(self, sig: Any, codegen: Any) -> tuple[Any, ...]:
        own: tuple[Any, ...] = super()._index_key(sig, codegen)  # type: ignore[no-untyped-call]
        return (*own, sources_digest(self._py_func))


def sources_digest(function: Callable[..., Any]) -> str:
    """Digest of the files of a kernel and of what it can reach, and of the constants that those read."""
    digest = hashlib.sha256()
    for part in sorted(set(_reached(function, set()))):
        digest.update(part.encode())
    return digest.hexdigest()


def _reached(function: Callable[..., Any], seen: set[int]) -> Iterator[str]:
    """Of a function: the digest of its file, and the same of what its globals name; of constants the value.

    seen: identities of functions that need no second look.
    """
    if id(function) in seen:
        return
    seen.add(id(function))
    yield _file_digest(function.__code__.co_filename)
    names = function.__globals__
    for name in sorted(_names(function.__code__)):
        value = names.get(name)
        if isinstance(value, Dispatcher):
            yield from _reached(value.py_func, seen)
        elif isinstance(value, FunctionType):  # inlined by numba, or with an overload in its file
            yield from _reached(value, seen)
        elif isinstance(value, type):  # a named tuple: its fields are part of the kernel
            yield _file_digest(getattr(sys.modules.get(value.__module__), "__file__", None) or "")
        elif isinstance(value, (bool, int, float, str, tuple)) or hasattr(value, "dtype"):
            yield f"{name}={value!r}"


def _names(code: CodeType) -> set[str]:
    """Names that a function and those inside it look up."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    return set(code.co_names).union(*inner)


def _file_digest(path: str) -> str:
    """Of a source file; of none (an extension, a notebook's cell) its name."""
    file = Path(path)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" and file.is_file() else path
