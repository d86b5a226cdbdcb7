"""Bytes -> text in the encoding that data.encoding names, strictly: what is not valid is refused with its place.

Knows nothing of files or formats.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any

from ray_ep.errors import DataError

_CHUNK = 1 << 20  # bytes
_MARKS = {  # UTF-32 first: its mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def checked_encoding(name: str) -> str:
    """The codec's own name for data.encoding; raises DataError if Python has no such text codec."""
    try:
        codec = codecs.lookup(name)
        codecs.getincrementaldecoder(name)
        b"a".decode(name, "ignore")  # refuses codecs of bytes to bytes, such as base64
    except (LookupError, ValueError, TypeError):
        raise DataError(
            f"data.encoding={name!r}: no such text encoding; Python's are, for example, utf-8, utf-16, latin-1, "
            "cp1252, gb18030, shift_jis, euc_kr and koi8-r"
        ) from None
    return codec.name


def decoded(file: Any, head: bytes, encoding: str, where: str) -> Iterator[str]:
    """The text of ``file``, whose first bytes are ``head``, in pieces of up to 1 MB; without its byte order mark."""
    if head.startswith(codecs.BOM_UTF8):  # leaves no doubt, whatever data.encoding says of the other files
        encoding = "utf-8"
    decoder, read, first = codecs.getincrementaldecoder(encoding)(), 0, True
    while True:
        raw = file.read(_CHUNK)
        read += len(raw)
        try:
            text = decoder.decode(raw, not raw)
        except UnicodeDecodeError as e:  # e.object: what was left of the chunk before, and this one
            raise _invalid(e, read - len(e.object), head, encoding, where) from None
        except UnicodeError as e:
            raise DataError(f"{where}: cannot be read as {encoding}: {e}{_hint(head, encoding)}") from None
        if first and text:
            if "\0" in text[:8192]:
                raise DataError(f"{where}: has NUL bytes, so it is no {encoding} text{_hint(head, encoding)}")
            text, first = text.removeprefix("\ufeff"), False
        if text:
            yield text
        if not raw:
            return


def text_of_bytes(raw: bytes, encoding: str, where: str) -> str:
    """One cell of a table that holds text as bytes."""
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as e:
        raise _invalid(e, 0, raw, encoding, where) from None


def _invalid(e: UnicodeDecodeError, before: int, head: bytes, encoding: str, where: str) -> DataError:
    at, byte = before + e.start, e.object[e.start]
    return DataError(f"{where}: byte {at} (0x{byte:02x}) is not valid {encoding}{_hint(head, encoding)}")


def _hint(head: bytes, encoding: str) -> str:
    """What data.encoding could be instead."""
    looks = next((name for mark, name in _MARKS.items() if head.startswith(mark)), "")
    if not looks and len(head) > 8 and b"\0" not in head[::2] and not any(head[1:100:2]):
        looks = "utf-16-le"  # plain English without a mark
    if not looks and len(head) > 8 and b"\0" not in head[1::2] and not any(head[:100:2]):
        looks = "utf-16-be"
    if looks and looks != encoding:
        return f"; it looks like {looks.upper()}: data.encoding={looks}"
    return "; data.encoding says what the files are in (latin-1, cp1252, utf-16, gb18030, ...)"
