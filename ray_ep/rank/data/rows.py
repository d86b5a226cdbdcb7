"""Tables of documents: JSON arrays and lines, CSV, Parquet and Arrow -> each row's document, which field.py takes out.

Each reader takes what a file holds and names the line or row of what it refuses. Also tells JSON and CSV by their
beginning. Knows nothing of files, archives or encodings of whole files.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ray_ep.errors import DataError
from ray_ep.rank.data.decode import text_of_bytes
from ray_ep.rank.data.field import Field, some

_BLANK = re.compile("[ \t\r\n\ufeff]*")  # a byte order mark stands in the middle where files were put together
_LINE_END = re.compile("\r\n?|\n")
_DECODER = json.JSONDecoder()
_LONGEST_CELL = 2**28  # csv's own limit of 131,072 characters is short of a book


def beginning(chunks: Iterator[str]) -> str:
    """As much of a file, from its first piece on, as it takes to tell the format: the first row of JSON is whole."""
    text = next(chunks, "")
    while True:
        found, _, then = _objects(text)
        if found or then != "cut" or not (more := _take(chunks, len(text))):
            return text
        text += more


def _take(chunks: Iterator[str], size: int) -> str:
    """At least ``size`` more characters, if they are there."""
    got = []
    for chunk in chunks:
        got.append(chunk)
        if (size := size - len(chunk)) <= 0:
            break
    return "".join(got)


def is_json(text: str, field: Field) -> bool:
    """Whether the beginning of a file is rows of JSON: objects in an array or one after the other, most of the text.

    An object alone counts only if it has the field: else it is a configuration, or the like.
    """
    found, end, state = _objects(text)
    if not found or (state == "wrong" and end < len(text) / 2):
        return False
    alone = len(found) == 1 and state == "end" and not text.lstrip(" \t\r\n\ufeff").startswith("[")
    return not alone or field.name in found[0]


def _blank(text: str, start: int) -> int:
    """Where the blanks end that begin at `start`, if any do."""
    found = _BLANK.match(text, start)
    return start if found is None else found.end()


def _objects(text: str) -> tuple[list[dict[str, Any]], int, str]:
    """(objects at the beginning, where the last one ends, what comes then: the 'end', a 'cut' one, or 'wrong')."""
    at = _blank(text, 0)
    array = text[at : at + 1] == "["
    at, end = at + array, 0
    found: list[dict[str, Any]] = []
    while True:
        at = _blank(text, at)
        if found and text[at : at + 1] in (",", "]"):  # lines that end in commas: meant as rows, and refused as such
            at = _blank(text, at + 1)
        if at == len(text):
            return found, end, "end"
        if text[at] != "{":
            return found, end, "wrong"
        try:
            row, at = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError) as e:
            return found, end, "cut" if _may_go_on(e, text) else "wrong"
        found.append(row)
        end = at


def _may_go_on(e: Exception, text: str) -> bool:
    """Whether the JSON that ``text`` ends in is right as far as it goes."""
    if not isinstance(e, json.JSONDecodeError):
        return False
    return e.msg.startswith("Unterminated string") or e.pos >= len(text) - 12  # 12: within \ud83d\ude00, -Infinity


class _Json:
    """Values of JSON one after the other, on lines or not, and those of arrays, from text that comes in pieces."""

    def __init__(self, chunks: Iterator[str], where: str) -> None:
        self._chunks, self._where = chunks, where
        self._text, self._at, self._line, self._element = "", 0, 1, 0

    @property
    def place(self) -> str:
        """Where the value at hand begins."""
        return f"{self._where}, line {self._line}" + (f", element {self._element}" if self._element else "")

    def values(self) -> Iterator[Any]:
        """Each value, while ``place`` is where it begins."""
        while mark := self._next():
            if mark != "[":
                yield from self._value()
                continue
            self._skip(self._at + 1)
            while self._next() != "]":
                self._element += 1
                yield from self._value()
                if self._next() == ",":
                    self._skip(self._at + 1)
                elif self._next() != "]":
                    raise self._wrong("a comma or ] must follow")
            self._skip(self._at + 1)
            self._element = 0

    def _next(self) -> str:
        """The next character that is not blank, '' at the end."""
        while True:
            self._skip(_blank(self._text, self._at))
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _value(self) -> Iterator[Any]:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                break
            except RecursionError:
                raise self._wrong("nested too deeply") from None
            except ValueError as e:
                if not (_may_go_on(e, self._text) and self._more()):
                    line = self._line + self._text.count("\n", self._at, getattr(e, "pos", self._at))
                    problem = getattr(e, "msg", str(e)) + (f" in line {line}" if line > self._line else "")
                    raise self._wrong(problem) from None
        yield value
        self._skip(end)

    def _more(self) -> bool:
        """Read on: as much as is there already, so that a long value is not tried too often."""
        more = _take(self._chunks, len(self._text) - self._at or 1)
        if more:
            self._text, self._at = self._text[self._at :] + more, 0
        return bool(more)

    def _skip(self, to: int) -> None:
        self._line += self._text.count("\n", self._at, to)
        self._at = to

    def _wrong(self, problem: str) -> DataError:
        return DataError(f"{self.place}: not JSON: {problem}")


def read_json(chunks: Iterator[str], where: str, field: Field) -> Iterator[bytes]:
    """Objects in arrays or one after the other, each a document."""
    reader = _Json(chunks, where)
    for row in reader.values():
        yield field.document(row, reader.place)


def csv_mark(text: str, field: Field, usual: str | None) -> str | None:
    """What separates the columns of a CSV file, from its beginning; None where this is no CSV with the text column.

    ``usual`` is the separator its name stands for: then it is CSV in any case.
    """
    if usual:
        marks = [usual, *(m for m in ",\t;|" if m != usual)]
        return next((m for m in marks if field.name in map(str.strip, _cells(text, m, 1)[0])), usual)
    for mark in ",\t;":
        header, *others = _cells(text, mark, 20)
        named = field.name in header and len(header) > 1 and all(c and c == c.strip() for c in header)  # unlike prose
        if named and sum(len(o) == len(header) for o in others) > len(others) / 2:
            return mark
    return None


def _cells(text: str, mark: str, most: int) -> list[list[str]]:
    """Up to ``most`` rows, of any number of lines, of the beginning of a file; the last one may be cut.

    One without cells if there are none.
    """
    rows: list[list[str]] = []
    with suppress(csv.Error):
        rows.extend(islice((row for row in _csv_reader(io.StringIO(text, newline=""), mark) if row), most))
    return rows or [[]]


def _csv_reader(lines: Iterable[str], mark: str, strict: bool = False) -> Any:
    csv.field_size_limit(_LONGEST_CELL)  # the process's, there is no other
    return csv.reader(lines, delimiter=mark, strict=strict)


def read_csv(chunks: Iterator[str], where: str, field: Field, mark: str) -> Iterator[bytes]:
    """Each row after the header is a document."""
    reader = _csv_reader(_lines(chunks), mark, strict=True)
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            if not header:
                header = [name.strip() for name in row]
                if header and header.count(field.name) != 1:
                    times = "more than one" if field.name in header else "no"
                    raise DataError(f"{where}: {times} column {field}; it has {some(header)}")
            elif row:  # none: an empty line
                if len(row) != len(header):
                    raise DataError(f"{where}, line {line}: {len(row)} cells, but the header has {len(header)}")
                yield field.document(dict(zip(header, row, strict=True)), f"{where}, line {line}")
            line = reader.line_num + 1
    except csv.Error as e:
        raise DataError(
            f"{where}, line {line}: not CSV: {e}; a cell with quotes, separators or line ends in it stands in quotes"
        ) from None


def _lines(chunks: Iterator[str]) -> Iterator[str]:
    parts: list[str] = []
    for chunk in chunks:
        begin = 0
        for end in _LINE_END.finditer(chunk):
            yield "".join((*parts, chunk[begin : end.end()]))
            parts.clear()
            begin = end.end()
        parts.append(chunk[begin:])
    if last := "".join(parts):
        yield last


def read_parquet(file: Any, where: str, field: Field, encoding: str) -> Iterator[bytes]:
    """Each row of a Parquet file is a document."""
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    _check_column(table.schema_arrow, field, where)
    names = field.columns(table.schema_arrow.names)
    return _documents(table.iter_batches(batch_size=1024, columns=names), where, field, encoding)


def read_arrow(reader: Any, where: str, field: Field, encoding: str) -> Iterator[bytes]:
    """Each row of an Arrow file or stream, opened by pyarrow, is a document."""
    _check_column(reader.schema, field, where)
    batches = map(reader.get_batch, range(reader.num_record_batches)) if hasattr(reader, "get_batch") else reader
    return _documents(batches, where, field, encoding)


def _check_column(schema: Any, field: Field, where: str) -> None:
    if field.name not in schema.names:
        raise DataError(f"{where}: no column {field}; it has {some(schema.names)}")
    kind = schema.field(field.name).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    text = (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.null())
    if not field.text or kind in text or "view" in str(kind) or pa.types.is_fixed_size_binary(kind):
        return
    raise DataError(f"{where}: column {field} holds {kind}, not text")


def _documents(batches: Iterable[Any], where: str, field: Field, encoding: str) -> Iterator[bytes]:
    number = 0
    for batch in batches:
        names = field.columns(batch.schema.names)
        for cells in zip(*(batch.column(name) for name in names), strict=True):
            number += 1
            place = f"{where}, row {number}"
            try:
                row = {name: cell.as_py() for name, cell in zip(names, cells, strict=True)}
            except UnicodeDecodeError as e:  # a column of strings holds what is none
                row = {field.name: text_of_bytes(e.object, "utf-8", place)}
            yield field.document(row, place, encoding)
