"""Where the documents of a run come from: files of any format, Hugging Face datasets, the standard library's source.

Finds files, unpacks them and tells their format by what is in them; rows.py reads the formats. Everything is read in
one pass, so that no more of a file is read than data.max_bytes asks for. Imports the schema and errors of ray_ep only.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
import shutil
import sysconfig
import tarfile
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]

from ray_ep.config.schema import DataConfig
from ray_ep.errors import DataError
from ray_ep.rank.data import rows
from ray_ep.rank.data.decode import checked_encoding, decoded
from ray_ep.rank.data.field import Field, field_of

_FILES_ARE = (
    "give paths, globs (** for any depth) or URLs of text, JSON, CSV, Parquet or Arrow files, "
    "as they are, compressed or in archives"
)
_NOT_OURS = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}  # lib2to3: wrong syntax on purpose

# Text whatever is in it: a program that begins like JSON is a program all the same.
_TEXT_NAMES = re.compile(
    r"""py|pyi|ipynb|c|h|cc|cpp|cxx|hpp|cu|cuh|cs|java|kt|scala|go|rs|rb|php|pl|pm|lua|r|jl|swift|m|mm|js|mjs|cjs|ts|jsx
    |tsx|vue|sh|bash|zsh|fish|ps1|bat|sql|hs|ml|ex|exs|erl|clj|el|lisp|f|f90|asm|s|v|sv|vhd|proto|cmake|mk|gradle
    |md|markdown|rst|tex|bib|html|htm|xhtml|xml|svg|css|scss|less|yaml|yml|toml|ini|srt
    |vtt|po|diff|patch""",
    re.VERBOSE,
)
_JSON_NAMES = {"json", "jsonl", "ndjson", "jl", "jsonlines", "ldjson"}
_CSV_NAMES = {"csv": ",", "tsv": "\t", "tab": "\t"}
_OF_A_DATASET = {"dataset_info.json", "dataset_dict.json", "state.json"}
_NO_ROWS = {"_metadata", "_common_metadata"}  # Parquet files beside those with the rows
_BINARY_NAMES = {"parquet": "Parquet", "arrow": "Arrow", "feather": "Arrow", "zip": "zip"}
_PACKED_NAMES = {"gz", "gzip", "bz2", "xz", "lzma", "zst", "zstd", "lz4"}

_UNPACK: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file),
    **{b"BZh%d%s" % (level, then): bz2.BZ2File for level in range(1, 10) for then in (b"1AY&SY", b"\x17rE8P")},
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,  # the .lzma format has no better mark
    b"\x28\xb5\x2f\xfd": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd"),
    b"\x04\x22\x4d\x18": lambda file: pa.CompressedInputStream(pa.PythonFile(file, "r"), "lz4"),
}
_FOREIGN = {
    b"version https://git-lfs": "a git-lfs pointer and not the file itself (git lfs pull fetches it)",
    b"%PDF-": "a PDF file",
    b"7z\xbc\xaf\x27\x1c": "a 7-zip archive",
    b"Rar!\x1a": "a RAR archive",
    b"\x1f\x9d": "compressed by compress (.Z)",
    b"\xff\x06\0\0sNaPpY": "compressed by snappy",
    b"\xd0\xcf\x11\xe0": "an old Office document",
    b"{\\rtf": "a rich text (RTF) file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"Obj\x01": "an Avro file",
}
_BROKEN: tuple[type[Exception], ...] = (
    OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError, tarfile.TarError, csv.Error,
    zipfile.BadZipFile, pa.ArrowException,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class DocumentSource:
    """Documents in UTF-8 and reading order, one line that names where they come from, and the files read so far."""

    documents: Iterator[bytes]
    origin: str
    formats: Counter[str] = field(default_factory=Counter)  # format -> files of it; grows while documents are read

    def counted(self, documents: int) -> str:
        """'documents: 300; files: 1 JSON array, 2 text', sorted, so that equal data have equal words."""
        files = ", ".join(f"{n:,} {name}" for name, n in sorted(self.formats.items()))
        return f"documents: {documents:,}" + (f"; files: {files}" if files else "")


def open_source(cfg: DataConfig) -> DocumentSource:
    """What the configuration names. Raises DataError, here or while documents are read."""
    if cfg.dataset:
        return DocumentSource(
            _read_dataset(cfg), f"data.dataset={cfg.dataset!r}, data.dataset_split={cfg.dataset_split!r}"
        )
    if not cfg.files:
        return DocumentSource(_read_standard_library(cfg.max_bytes), "the Python standard library")
    reader = _Reader(cfg, field_of(cfg), checked_encoding(cfg.encoding), Counter())
    files = list(dict.fromkeys(chain.from_iterable(map(_expand, cfg.files))))
    documents = chain.from_iterable(reader.open(fs, path) for fs, path in files)
    return DocumentSource(documents, f"data.files={cfg.files}", reader.formats)


def _read_standard_library(max_bytes: int) -> Iterator[bytes]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p for p in root.rglob("*.py") if not _NOT_OURS.intersection(p.relative_to(root).parts)):
        try:
            with path.open("rb") as file:
                raw = file.read(max_bytes + 4 if max_bytes else -1)  # + 4: a cut character lies past the limit
        except OSError as e:
            raise DataError(f"the Python standard library, {path}: cannot be read: {e}") from e
        yield raw.decode("utf-8", "replace").encode()  # some of it tests other encodings on purpose


def _expand(pattern: str) -> list[tuple[Any, str]]:
    """One entry of data.files -> its (file system, path) pairs, sorted; as in a shell, globs leave out hidden files."""
    try:
        fs, path = fsspec.core.url_to_fs(pattern)
        found = [path] if fs.isfile(path) else _not_hidden(path, sorted(fs.glob(path)))
        files = [(fs, p) for p in found if fs.isfile(p)]
    except (OSError, ImportError, ValueError) as e:
        raise DataError(f"data.files={pattern!r}: {e}; {_FILES_ARE}") from e
    if not files:
        problem = "matches a directory, not a file; its files are <directory>/**" if found else "no file matches"
        raise DataError(f"data.files={pattern!r}: {problem}; {_FILES_ARE}")
    return files


def _not_hidden(pattern: str, found: list[str]) -> list[str]:
    fixed = min((pattern.find(c) for c in "*?[" if c in pattern), default=len(pattern))
    fixed = pattern.rfind("/", 0, fixed) + 1  # names up to here were spelled out
    hidden = "/." in "/" + pattern[fixed:]  # asked for by name
    return [p for p in found if PurePosixPath(p).name not in _NO_ROWS and (hidden or "/." not in "/" + p[fixed:])]


class _Peeked(io.RawIOBase):
    """A file of which ``head``, its first bytes, has been looked at: read from the beginning all the same."""

    def __init__(self, file: Any) -> None:
        self.head = b""
        while len(self.head) < 512 and (more := file.read(512 - len(self.head))):
            self.head += more
        self._left, self._file = self.head, file

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> int:
        data = self._left[: len(into)] or self._file.read(len(into))
        self._left = self._left[len(data) :]
        into[: len(data)] = data
        return len(data)


@dataclass(frozen=True, slots=True)
class _Reader:
    cfg: DataConfig
    field: Field
    encoding: str
    formats: Counter[str]

    def open(self, fs: Any, path: str) -> Iterator[bytes]:
        where = f"data.files, {path}"
        try:
            with fs.open(path, "rb") as file:
                yield from self._read(file, path, where, seekable=True)
        except _BROKEN as e:
            raise DataError(f"{where}: cannot be read: {e}") from e

    def _read(self, file: Any, name: str, where: str, seekable: bool = False) -> Iterator[bytes]:
        """The documents of a file at its beginning; ``name`` tells what a file of text is expected to hold."""
        peeked = _Peeked(file)
        head = peeked.head
        stream = io.BufferedReader(peeked)
        while name.rpartition(".")[2].lower() in _PACKED_NAMES:  # also a plain file that is only named so
            name = name.rpartition(".")[0]
        if kind := next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None):
            raise DataError(f"{where}: is {kind}; {_FILES_ARE}")
        if unpack := next((unpack for magic, unpack in _UNPACK.items() if head.startswith(magic)), None):
            with unpack(stream) as inner:
                yield from self._read(inner, name, where)
        elif head[257:262] == b"ustar":
            yield from self._read_tar(stream, where)
        elif head.startswith((b"PK\3\4", b"PK\5\6", b"PAR1", b"ARROW1\0\0")):
            with _seekable(file, stream, seekable) as whole:
                yield from self._read_seekable(whole, head, where)
        elif head.startswith(b"\xff\xff\xff\xff"):
            self.formats["Arrow"] += 1
            yield from rows.read_arrow(pa.ipc.open_stream(stream), where, self.field, self.encoding)
        elif head:
            yield from self._read_text(stream, head, name, where)

    def _read_seekable(self, file: Any, head: bytes, where: str) -> Iterator[bytes]:
        """Formats whose table of contents is at the end."""
        if head.startswith(b"PK"):
            yield from self._read_zip(file, where)
            return
        self.formats["Parquet" if head.startswith(b"PAR1") else "Arrow"] += 1
        if head.startswith(b"PAR1"):
            yield from rows.read_parquet(file, where, self.field, self.encoding)
        else:
            yield from rows.read_arrow(pa.ipc.open_file(file), where, self.field, self.encoding)

    def _read_zip(self, file: Any, where: str) -> Iterator[bytes]:
        with zipfile.ZipFile(file) as archive:
            members = sorted((m for m in archive.infolist() if not m.is_dir()), key=lambda m: m.filename)
            if any(m.filename in ("mimetype", "[Content_Types].xml") for m in members):
                raise DataError(f"{where}: is an office document or an e-book, and no archive of texts; {_FILES_ARE}")
            for member in members:
                if member.flag_bits & 1:
                    raise DataError(f"{where}, member {member.filename}: is encrypted")
                if _is_shown(name := member.filename):
                    yield from self._member(partial(archive.open, member), name, where)

    def _read_tar(self, file: Any, where: str) -> Iterator[bytes]:
        with tarfile.open(fileobj=file, mode="r|") as archive:
            for member in archive:
                if member.isfile() and _is_shown(member.name):
                    yield from self._member(partial(archive.extractfile, member), member.name, where)

    def _member(self, opened: Callable[[], Any], name: str, where: str) -> Iterator[bytes]:
        where = f"{where}, member {name}"
        try:
            with opened() as file:
                yield from self._read(file, name, where)
        except _BROKEN as e:
            raise DataError(f"{where}: cannot be read: {e}") from e

    def _read_text(self, stream: Any, head: bytes, name: str, where: str) -> Iterator[bytes]:
        """Text, or the formats that are text."""
        suffix = PurePosixPath(name).suffix[1:].lower()
        if suffix in _BINARY_NAMES:
            raise DataError(f"{where}: cannot be read: its name says {_BINARY_NAMES[suffix]}, its content does not")
        kind, documents = self._choose(decoded(stream, head, self.encoding, where), suffix, where)
        self.formats[kind] += 1
        try:
            yield from documents
        except DataError as e:
            hint = ""
            if PurePosixPath(name).name in _OF_A_DATASET:
                hint = "; it belongs to a dataset that the datasets library saved: data.dataset=DIRECTORY reads that"
            elif kind != "text" and suffix not in {*_JSON_NAMES, *_CSV_NAMES}:
                hint = f"; by its content this is {kind}: data.format=text reads it as it stands"
            raise DataError(f"{e}{hint}") from None

    def _choose(self, chunks: Iterator[str], suffix: str, where: str) -> tuple[str, Iterator[bytes]]:
        """(format, documents). Where the name leaves it open, a format that fits most of the first MB."""
        field = self.field
        if self.cfg.format != "text" and not _TEXT_NAMES.fullmatch(suffix):
            start = rows.beginning(chunks)
            chunks = chain([start], chunks)
            if suffix in _JSON_NAMES or rows.is_json(start, field):
                kind = "JSON array" if start.lstrip().startswith("[") else "JSON lines"
                return kind, rows.read_json(chunks, where, field)
            if mark := rows.csv_mark(start, field, _CSV_NAMES.get(suffix)):
                return "TSV" if mark == "\t" else "CSV", rows.read_csv(chunks, where, field, mark)
        if not field.text:
            raise DataError(f"{where}: is no table with {field}: rows of JSON, Parquet or Arrow hold conversations")
        return "text", _as_one(chunks, self.cfg.max_bytes)


def _is_shown(member: str) -> bool:
    """False for hidden files and for what macOS adds to its archives."""
    parts = PurePosixPath(member).parts
    return "__MACOSX" not in parts and not any(p.startswith(".") and p not in (".", "..") for p in parts)


def _seekable(file: Any, stream: Any, seekable: bool) -> Any:
    """The file from its beginning, with its end in reach: itself, or a copy on disk of what an archive holds."""
    if seekable:
        file.seek(0)
        return file
    copy = tempfile.TemporaryFile()  # noqa: SIM115
    shutil.copyfileobj(stream, copy)
    copy.seek(0)
    return copy


def _as_one(chunks: Iterator[str], max_bytes: int) -> Iterator[bytes]:
    parts, size = [], 0
    for chunk in chunks:
        parts.append(chunk.encode())
        size += len(parts[-1])
        if 0 < max_bytes < size:  # the caller cuts it
            break
    yield b"".join(parts)


def _read_dataset(cfg: DataConfig) -> Iterator[bytes]:
    where, field = f"data.dataset={cfg.dataset!r}", field_of(cfg)
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError:
        raise DataError(f"{where}: needs the datasets package: pip install 'ray_ep[datasets]'") from None
    try:
        if (Path(cfg.dataset) / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(cfg.dataset)
            if cfg.dataset_split not in found:
                raise DataError(f"{where}: no data.dataset_split={cfg.dataset_split!r}; it has {', '.join(found)}")
            table = found[cfg.dataset_split]
        elif (Path(cfg.dataset) / "dataset_info.json").is_file():
            table = datasets.load_from_disk(cfg.dataset)
        else:  # streamed: max_bytes then also bounds the download
            table = datasets.load_dataset(cfg.dataset, split=cfg.dataset_split, streaming=True)
        for number, row in enumerate(table, 1):
            yield field.document(row, f"{where}, row {number}", cfg.encoding)
    except DataError:
        raise
    except Exception as e:  # its loaders have no common base class
        raise DataError(f"{where}, data.dataset_split={cfg.dataset_split!r}: cannot be read: {e}") from e
