"""Files of every format and encoding -> documents: read as what they hold, or refused with their place."""

import bz2
import codecs
import csv
import gzip
import hashlib
import io
import json
import lzma
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.config import load_config
from ray_ep.config.schema import DataConfig
from ray_ep.errors import DataError
from ray_ep.rank.data.corpus import load_corpus
from ray_ep.rank.data.documents import open_source
from ray_ep.rank.data.field import Field
from ray_ep.rank.data.rows import read_csv, read_json

ROWS = [{"id": i, "text": f"grüße {i}, {'word ' * (i % 5)}\nsaid “{i}”"} for i in range(300)]
TEXTS = [row["text"] for row in ROWS]


def read(path, *overrides):
    cfg = load_config(None, [f"data.{o}" for o in (f"files=['{path}']", *overrides)]).data
    return [document.decode() for document in open_source(cfg).documents]


def refusal(path, *overrides):
    with pytest.raises(DataError) as e:
        read(path, *overrides)
    return str(e.value)


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows, delimiter=",", end="\n", quoting=csv.QUOTE_MINIMAL):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def as_parquet(table):
    out = pa.BufferOutputStream()
    pq.write_table(table, out, row_group_size=50)
    return out.getvalue().to_pybytes()


def as_arrow(table, new=pa.ipc.new_file):
    out = pa.BufferOutputStream()
    with new(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return out.getvalue().to_pybytes()


def as_zip(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def as_tar(members, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def packed(content, codec):
    out = pa.BufferOutputStream()
    with pa.CompressedOutputStream(out, codec) as stream:
        stream.write(content)
    return out.getvalue().to_pybytes()


TABLE = pa.Table.from_pylist(ROWS)
FORMATS = {
    "array": json.dumps(ROWS).encode(),
    "pretty": json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "lines": as_lines(ROWS).encode(),
    "concatenated": "".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "csv": as_csv(ROWS).encode(),
    "csv-crlf": as_csv(ROWS, end="\r\n").encode(),
    "csv-cr": as_csv(ROWS, end="\r").encode(),
    "csv-semicolon": as_csv(ROWS, ";").encode(),
    "tsv": as_csv(ROWS, "\t").encode(),
    "parquet": as_parquet(TABLE),
    "arrow-file": as_arrow(TABLE),
    "arrow-stream": as_arrow(TABLE, pa.ipc.new_stream),
}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.txt", "a", "part-00000", "a.00001", "a.dat"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "marked"])
@pytest.mark.parametrize("form", ["array", "pretty", "lines", "concatenated"])
def test_rows_of_json_are_read_under_any_name(tmp_path, form, name, mark):
    (tmp_path / name).write_bytes(mark + FORMATS[form])
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.txt", "a", "part-00000.data"])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8], ids=["", "marked"])
@pytest.mark.parametrize("form", ["csv", "csv-crlf", "csv-cr", "csv-semicolon", "tsv"])
def test_csv_with_a_text_column_is_read_under_any_name(tmp_path, form, name, mark):
    (tmp_path / name).write_bytes(mark + FORMATS[form])
    assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", ["a.csv", "a.txt", "a", "a.txt.gz"])
@pytest.mark.parametrize("columns", [("text", "id"), ("id", "text")])
def test_csv_whose_cells_are_whole_pages_is_no_text(tmp_path, name, columns):
    pages = ["\n".join(f"line {i} of page {n}, with a comma" for i in range(100)) for n in range(30)]
    rows = [{column: {"text": page, "id": n}[column] for column in columns} for n, page in enumerate(pages)]
    (tmp_path / name).write_text(as_csv(rows))
    assert read(tmp_path / name) == pages


@pytest.mark.parametrize("form", ["parquet", "arrow-file", "arrow-stream"])
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "a", "a.py"])
def test_parquet_and_arrow_are_read_under_any_name(tmp_path, form, name):
    (tmp_path / name).write_bytes(FORMATS[form])
    assert read(tmp_path / name) == TEXTS


PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, lzma.FORMAT_ALONE),
    "zst": lambda content: packed(content, "zstd"),
    "lz4": lambda content: packed(content, "lz4"),
    "zip": lambda content: as_zip({"deep/er/a": content}),
    "tar": lambda content: as_tar({"deep/er/a": content}),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("suffix", PACK)
def test_compressed_files_are_read_under_their_name_and_any_other(tmp_path, suffix, form):
    for name in [f"a.{suffix}", *(["b.txt", "c"] if form in ("lines", "parquet") else [])]:
        (tmp_path / name).write_bytes(PACK[suffix](FORMATS[form]))
        assert read(tmp_path / name) == TEXTS


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_compressed_parts_put_together_are_read_to_the_end_and_a_cut_one_is_refused(tmp_path, suffix):
    half = len(FORMATS["lines"]) // 2
    parts = [PACK[suffix](FORMATS["lines"][:half]), PACK[suffix](FORMATS["lines"][half:])]
    (tmp_path / "a").write_bytes(b"".join(parts))
    assert read(tmp_path / "a") == TEXTS
    (tmp_path / "a").write_bytes(parts[0][:-12])
    assert "data.files, " in refusal(tmp_path / "a")
    assert "cannot be read" in refusal(tmp_path / "a")


def test_a_file_that_is_only_named_compressed_is_read_as_it_is(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(FORMATS["lines"])
    assert read(tmp_path / "a.jsonl.gz") == TEXTS


def test_every_member_of_an_archive_is_read_by_name_except_hidden_ones(tmp_path):
    members = {"b.txt": b"text b", "a/z.jsonl": FORMATS["lines"], "a/x.txt.gz": gzip.compress(b"text x"), "c.md": b""}
    junk = {"__MACOSX/._b.txt": b"\0\5\x16\7", ".DS_Store": b"\0\0\0\1Bud1"}
    (tmp_path / "a.zip").write_bytes(as_zip({**members, **junk, "in.zip": as_zip({"inner.txt": b"inner"})}))
    assert read(tmp_path / "a.zip") == ["text x", *TEXTS, "text b", "inner"]
    (tmp_path / "a.tgz").write_bytes(as_tar({**junk, **members}, "w:gz"))
    assert read(tmp_path / "a.tgz") == ["text b", *TEXTS, "text x"]


def test_a_member_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.zip").write_bytes(as_zip({"a.txt": b"fine", "b/c.txt": b"caf\xe9"}))
    assert "a.zip, member b/c.txt: byte 3 (0xe9) is not valid utf-8" in refusal(tmp_path / "a.zip")
    broken = bytearray(as_zip({"a.txt": b"fine", "secret.txt": b"x"}))
    at = broken.rindex(b"PK\1\2")
    broken[at + 8] |= 1  # encrypted, it says
    broken[broken.rindex(b"PK\3\4") + 6] |= 1
    (tmp_path / "a.zip").write_bytes(broken)
    assert "a.zip, member secret.txt: is encrypted" in refusal(tmp_path / "a.zip")
    (tmp_path / "a.zip").write_bytes(as_zip({"[Content_Types].xml": b"<x/>", "word/document.xml": b"<w/>"}))
    assert "is an office document or an e-book" in refusal(tmp_path / "a.zip")


@pytest.mark.parametrize("suffix", ["py", "c", "md", "html", "ipynb", "yaml", "PY"])
def test_programs_and_markup_are_text_whatever_is_in_them(tmp_path, suffix):
    (tmp_path / f"a.{suffix}").write_bytes(FORMATS["lines"])
    assert read(tmp_path / f"a.{suffix}") == [FORMATS["lines"].decode()]


@pytest.mark.parametrize(
    "content",
    [
        '{"name": "a", "text_size": 5}',
        '{\n  "name": "alone, without the field"\n}\n',
        '{ int x = 5; }\nint main() { return 0; }\n',
        '{"text": "an example"}\nis how a row looks, and here the guide goes on for some more lines.\n',
        "[Footnote 1: a book]\n\nIt was a dark night.\n",
        "[1, 2, 3]\n[4, 5, 6]\n",
        "[section]\nkey = 5\n",
        "{{ template }} and text",
        "text, and other stories\nby somebody, somewhere\n",
        "title,text\n\nA poem under a strange title\nwith lines, of, many, kinds\nand more of them\nand more\n",
        "text\nis the first line\n",
        '{"text": "x"}, {y} and other notations\nare compared here, at some length, line by line\n',
        '"quoted, from the beginning',
        "\\documentclass{article}\r\nwith its own line ends\r\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["a.txt", "a", "a.unknown"])
def test_text_that_only_begins_like_a_table_is_text(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert read(tmp_path / name) == [content]


def test_rows_without_the_text_field_are_refused_and_not_trained_on_with_their_braces(tmp_path):
    rows = [{"id": i, "content": f"row {i}"} for i in range(3)]
    for name in ["a.json", "a.jsonl", "a.txt", "a"]:
        for content in [as_lines(rows), json.dumps(rows)]:
            (tmp_path / name).write_text(content)
            assert "line 1" in refusal(tmp_path / name)
            assert ": no field data.text_field='text'; it has id, content" in refusal(tmp_path / name)
    assert refusal(tmp_path / "a").endswith("by its content this is JSON array: data.format=text reads it as it stands")
    assert read(tmp_path / "a", "format=text") == [json.dumps(rows)]
    assert read(tmp_path / "a", "text_field=content") == ["row 0", "row 1", "row 2"]


BAD_ROWS = {
    "a.json": [
        ('{"rows": [{"text": "x"}]}', "line 1: no field data.text_field='text'; it has rows (rows are the file's"),
        ('{"text": "x"}\n{\n"id": 5,\n"text": y}', "a.json, line 2: not JSON: Expecting value in line 4"),
        ('[{"text": "x"},\n{"text": "y"}\n', "line 3, element 2: not JSON: a comma or ] must follow"),
        ('[{"text": "x"}\n{"text": "y"}]', "line 2, element 1: not JSON: a comma or ] must follow"),
        ('[{"text": "x"},\n"y"]', "line 2, element 2: is a str, not an object"),
        ('{"text": "a"}{"text": "b"}garbage\n', "line 1: not JSON: Expecting value"),
        ('[{"text": "x"}] and more', "line 1: not JSON: Expecting value"),
        ("not json at all", "line 1: not JSON: Expecting value"),
        ('{"text": "cut', "line 1: not JSON: Unterminated string"),
        ('{"text": ["a", "b"]}', "line 1: data.text_field='text' holds a list, not text"),
        ('{"text": "x"}\n\n{"text": "y \\ud800 z"}', r"line 3: data.text_field='text' holds \ud800 alone"),
        ("[" * 200_000, "line 1, element 1: not JSON: nested too deeply"),
        ('{"text": ' + "[" * 200_000, "line 1: not JSON: nested too deeply"),
    ],
    "a.csv": [
        ("id,body\n1,x\n", "a.csv: no column data.text_field='text'; it has id, body"),
        ("text,text\nx,y\n", "a.csv: more than one column data.text_field='text'; it has text, text"),
        ('id,text\n1,"two\nlines"\n2,x,y\n', "a.csv, line 4: 3 cells, but the header has 2"),
        ("id,text\n1,x\n2\n", "a.csv, line 3: 1 cells, but the header has 2"),
        ('id,text\n1,x\n2,"never ends\n', "a.csv, line 3: not CSV: unexpected end of data"),
        ('id,text\n1,"x" y\n', "a.csv, line 2: not CSV: ',' expected after '\"'"),
    ],
    "a.parquet": [("<html>not found</html>", "a.parquet: cannot be read: its name says Parquet, its content does not")],
    "a.zip": [("not found", "a.zip: cannot be read: its name says zip")],
    "a.txt": [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "a.txt: is a git-lfs pointer"),
        ("%PDF-1.7\n", "a.txt: is a PDF file"),
        ('{"text": "x"},\n' * 9, "line 1: not JSON: Expecting value; by its content this is JSON lines"),
        (as_lines(ROWS[:9]) + '{"text": "cut', "line 10: not JSON: Unterminated string"),
        (as_csv(ROWS[:15]) + "one\n", "line 32: 1 cells, but the header has 2"),
    ],
    "dataset_info.json": [('{"features": {}}', "data.dataset=DIRECTORY reads that")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), [(n, *case) for n, cases in BAD_ROWS.items() for case in cases])
def test_broken_rows_are_refused_with_their_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    message = refusal(tmp_path / name)
    assert says in message
    assert "in line 2" not in message
    assert message.startswith(f"data.files, {tmp_path}/{name}")


def test_a_cell_keeps_its_line_ends_and_words_like_null_and_may_be_a_book(tmp_path):
    cells = ["a\r\nb", "NA", "null", "5", 'he said "x"', "  blank around ", "word " * 500_000]
    (tmp_path / "a.csv").write_text(as_csv([{"id": 1, "text": c} for c in cells], end="\r\n"), newline="")
    assert read(tmp_path / "a.csv", "max_bytes=0") == cells
    (tmp_path / "a.jsonl").write_text(as_lines([{"text": c} for c in cells]))
    assert read(tmp_path / "a.jsonl") == cells


def test_max_bytes_may_cut_a_character_and_bounds_what_is_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("é".encode() * 2_000_000 + b"\xff")
    (tmp_path / "a.json").write_bytes(b"[" + FORMATS["lines"].replace(b"\n", b",\n") * 200 + b"broken")
    for limit in range(1000, 1004):
        for name, most in [("a.txt", limit // 2 * 2), ("a.json", limit)]:
            cfg = load_config(None, [f"data.files={tmp_path}/{name}", f"data.max_bytes={limit}", "data.held_out=0"])
            got = load_corpus(cfg.data, 8)
            assert most - 40 < len(got.train) - got.documents <= most


def test_empty_files_and_hidden_files_of_a_glob_are_passed_over(tmp_path):
    for name, content in {
        "a.parquet": FORMATS["parquet"], "b.parquet": b"", "_SUCCESS": b"",
        "_metadata": FORMATS["parquet"], "c.csv": b"", "d.gz": gzip.compress(b""),
        "d.bz2": bz2.compress(b""), "d.xz": lzma.compress(b""), "d.zst": packed(b"", "zstd"),
        "d.zip": as_zip({}),
        ".DS_Store": b"\0\1", ".cache/x.jsonl": b"junk", ".e/f.txt": b"hidden",
    }.items():  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path / "**") == TEXTS
    assert read(tmp_path / ".e/*") == read(tmp_path / ".e/f.txt") == read(tmp_path / ".*/*.txt") == ["hidden"]


def test_the_start_line_says_what_was_read_as_what(tmp_path):
    for name, form in {"a.json": "array", "b": "lines", "c.csv": "csv", "d.parquet": "parquet"}.items():
        (tmp_path / name).write_bytes(FORMATS[form])
    (tmp_path / "e.txt").write_text("text")
    cfg = load_config(None, [f"data.files={tmp_path}/*"]).data
    first, again = load_corpus(cfg, 8), load_corpus(cfg, 8)
    assert first.source == again.source
    assert first.source.endswith("(documents: 1,201; files: 1 CSV, 1 JSON array, 1 JSON lines, 1 Parquet, 1 text)")


def test_the_standard_library_is_read_as_it_stands():
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"site-packages", "dist-packages", "__pycache__", "lib2to3"}
    expected = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*.py") if not skip.intersection(p.relative_to(root).parts)):
        expected.update(path.read_bytes().decode("utf-8", "replace").encode() + b"\0")
    got = hashlib.sha256(b"".join(d + b"\0" for d in open_source(load_config(None, []).data).documents))
    assert got.hexdigest() == expected.hexdigest()


@pytest.fixture(scope="module")
def drawn_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("drawn")


@settings(deadline=None, max_examples=60)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\0")), min_size=1))
def test_any_texts_come_back_from_every_format(drawn_dir, texts):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
    table = pa.Table.from_pylist(rows)
    for name, content in {
        "a.json": json.dumps(rows, ensure_ascii=False, indent=1).encode(),
        "b": as_lines(rows).encode(),
        "c.csv": as_csv(rows, quoting=csv.QUOTE_ALL).encode(),
        "d.tsv": as_csv(rows, "\t", "\r\n", csv.QUOTE_ALL).encode(),
        "e.parquet": as_parquet(table),
        "f.arrow": as_arrow(table, pa.ipc.new_stream),
        "g.zip": as_zip({"a.jsonl": as_lines(rows)}),
    }.items():
        (drawn_dir / name).write_bytes(content)
        source = open_source(DataConfig(files=[f"{drawn_dir}/{name}"]))
        assert [document.decode() for document in source.documents] == texts


@settings(deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff"), max_size=9)),
    size=st.integers(1, 30),
    indent=st.sampled_from([None, 1]),
    escape=st.booleans(),
)
def test_a_row_is_the_same_wherever_the_file_is_cut_into_pieces(texts, size, indent, escape):
    rows = [{"n": -1.5e-7, "text": t, "x": [True, None, {}]} for t in texts]
    array = json.dumps(rows, ensure_ascii=escape, indent=indent)
    lines = "\n".join(json.dumps(row, ensure_ascii=escape, indent=indent) for row in rows)
    table = as_csv([{"text": "", "n": 0}, *({"text": t, "n": 0} for t in texts)], quoting=csv.QUOTE_ALL)
    for read, text, drop in [(read_json, array, 0), (read_json, lines, 0), (read_csv, table, 1)]:
        pieces = (text[at : at + size] for at in range(0, len(text), size))
        arguments = ("here", Field("text"), ",")[: 3 if read is read_csv else 2]
        assert [document.decode() for document in read(pieces, *arguments)][drop:] == texts


def test_a_saved_dataset_of_several_splits_takes_the_split_that_is_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    split = {name: datasets.Dataset.from_dict({"text": [f"a row of {name}"]}) for name in ("train", "test")}
    datasets.DatasetDict(split).save_to_disk(tmp_path / "d")
    for overrides, text in [([], "a row of train"), (["data.dataset_split=test"], "a row of test")]:
        cfg = load_config(None, [f"data.dataset={tmp_path}/d", *overrides]).data
        assert list(open_source(cfg).documents) == [text.encode()]
    cfg = load_config(None, [f"data.dataset={tmp_path}/d", "data.dataset_split=nope"]).data
    with pytest.raises(DataError, match=r"no data.dataset_split='nope'; it has train, test"):
        list(open_source(cfg).documents)
    assert read(tmp_path / "d/train/*.arrow") == ["a row of train"]
