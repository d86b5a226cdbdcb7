"""Bytes of files and of columns -> text: in the encoding that is told, strictly, without byte order marks."""

import codecs
import gzip
import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.config import load_config
from ray_ep.config.schema import DataConfig
from ray_ep.errors import DataError
from ray_ep.rank.data.decode import decoded
from ray_ep.rank.data.documents import open_source

TEXTS = [f"grüße {i}, {'word ' * (i % 5)}" for i in range(300)]
FORMATS = {
    "a.md": "\n".join(TEXTS),
    "a.json": "[" + ",\n".join(f'{{"text": "{text}"}}' for text in TEXTS) + "]",
    "a.jsonl": "".join(f'{{"text": "{text}"}}\n' for text in TEXTS),
    "a.csv": "id,text\n" + "".join(f'5,"{text}"\n' for text in TEXTS),
    "a": "id\ttext\r\n" + "".join(f'5\t"{text}"\r\n' for text in TEXTS),
}


def read(path, *overrides):
    cfg = load_config(None, [f"data.{o}" for o in (f"files=['{path}']", *overrides)]).data
    return [document.decode() for document in open_source(cfg).documents]


def refusal(path, *overrides):
    with pytest.raises(DataError) as e:
        read(path, *overrides)
    return str(e.value)


def write_table(table, path):
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)


NOT_UTF8 = [
    ("a.txt", b"caf\xe9 " * 200, "a.txt: byte 3 (0xe9) is not valid utf-8; data.encoding says"),
    ("a.txt", b"x" * 3_000_000 + b"\xff" + b"y" * 9, "a.txt: byte 3000000 (0xff)"),
    ("a.txt", "é".encode() * 700_000 + b"\xc3", "a.txt: byte 1400000 (0xc3)"),
    ("a.txt", codecs.BOM_UTF8 + b"caf\xe9!", "a.txt: byte 6 (0xe9)"),
    ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n', "a.jsonl: byte 30 (0xe9)"),
    ("a.csv", b"id,text\n1,fine\n2,caf\xe9\n", "a.csv: byte 20 (0xe9)"),
    ("a.txt.gz", gzip.compress(b"caf\xe9", mtime=0), "a.txt.gz: byte 3 (0xe9)"),
    ("a.txt", "grüße".encode("utf-16"), "looks like UTF-16: data.encoding=utf-16"),
    ("a.json", '[{"text": "x"}]'.encode("utf-16"), "looks like UTF-16: data.encoding=utf-16"),
    ("a.txt", "plain text".encode("utf-16-le"), "looks like UTF-16-LE: data.encoding=utf-16-le"),
    ("a.txt", "plain text".encode("utf-16-be"), "looks like UTF-16-BE: data.encoding=utf-16-be"),
    ("a.txt", "grüße".encode("utf-32"), "looks like UTF-32: data.encoding=utf-32"),
    ("a.bin", b"\x7fELF\0\0\0\1\2\3", "a.bin: has NUL bytes, so it is no utf-8 text"),
]


@pytest.mark.parametrize(("name", "content", "says"), NOT_UTF8)
def test_what_is_not_valid_utf8_is_refused_with_file_and_offset(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path / name, "max_bytes=0")
    assert says in message
    assert message.startswith(f"data.files, {tmp_path}/{name}: ")


class Trickle:
    """A file that gives ``size`` bytes at most, as a network does."""

    def __init__(self, content, size):
        self.file, self.size = io.BytesIO(content), size

    def read(self, _):
        return self.file.read(self.size)


@settings(deadline=None)
@given(
    text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufeff\0")),
    bad=st.booleans(),
    size=st.integers(1, 7),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "gb18030"]),
)
def test_text_and_offsets_do_not_depend_on_how_a_file_is_read(text, bad, size, encoding):
    content = text.encode(encoding)
    if bad:
        content += b"\xd8" if "16" in encoding else b"\xff\xff"  # the half of a character
    pieces = decoded(Trickle(content, size), content[:512], encoding, "here")
    if not bad:
        assert "".join(pieces) == text
        return
    with pytest.raises(DataError, match=rf"here: byte {len(content) - (1 if '16' in encoding else 2)} \("):
        list(pieces)


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32", "gb18030", "UTF8", "utf-8-sig", "utf-7"]
)
@pytest.mark.parametrize("name", FORMATS)
def test_text_json_and_csv_are_read_in_the_encoding_that_is_told(tmp_path, encoding, name):
    (tmp_path / name).write_bytes(FORMATS[name].encode(encoding))
    expected = [FORMATS[name]] if name == "a.md" else TEXTS
    assert read(tmp_path / name, f"encoding={encoding}") == expected


def test_utf16_without_its_mark_is_told_by_its_zeros(tmp_path):
    (tmp_path / "a.txt").write_bytes("plain text".encode("utf-16-le"))
    for told in ["utf-8", "utf-16"]:
        assert "looks like UTF-16-LE: data.encoding=utf-16-le" in refusal(tmp_path / "a.txt", f"encoding={told}")


def test_a_single_byte_encoding_is_read_and_a_byte_order_mark_of_utf8_is_believed(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_bytes(codecs.BOM_UTF8 + "café".encode())
    assert read(tmp_path / "*.txt", "encoding=latin-1") == ["café", "café"]


@pytest.mark.parametrize("name", ["utf-9", "rot13", "base64", "", "a\0b"])
def test_an_unknown_encoding_is_refused_naming_a_few(tmp_path, name):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"data.encoding=.*: no such text encoding.* utf-16, latin-1"):
        open_source(DataConfig(files=[f"{tmp_path}/a.txt"], encoding=name))


def test_a_byte_order_mark_is_no_token_wherever_files_begin(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"text")
    assert read(tmp_path / "a.txt") == ["text"]
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8)
    assert read(tmp_path / "a.txt") == [""]
    line = codecs.BOM_UTF8 + b'{"text": "\xef\xbb\xbfrow"}\n'
    (tmp_path / "a.jsonl").write_bytes(line * 3)
    assert read(tmp_path / "a.jsonl") == ["row"] * 3


@pytest.mark.parametrize(
    "kind",
    [pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.dictionary(pa.int32(), pa.string()),
     pa.dictionary(pa.int8(), pa.binary()), pa.string_view(), pa.binary_view()],
    ids=str,
)  # fmt: skip
def test_every_kind_of_text_column_is_read(tmp_path, kind):
    words = ["grüße", None, "", "welt", "grüße"]
    column = pa.array(words, kind)
    table = pa.table({"n": range(5), "text": column})
    for name in ["a.parquet", "a.arrow"]:
        write_table(table, tmp_path / name)
        assert read(tmp_path / name) == ["grüße", "", "", "welt", "grüße"]


@pytest.mark.parametrize(
    ("column", "says"),
    [
        (pa.array([b"fine", b"caf\xe9"]), "row 2: byte 3 (0xe9) is not valid utf-8"),
        (pa.array([b"fine", b"caf\xe9"]).view(pa.string()), "row 2: byte 3 (0xe9) is not valid utf-8"),
        (pa.array([1, 2]), "column data.text_field='text' holds int64, not text"),
        (pa.array([["a"], ["b"]]), "column data.text_field='text' holds list<"),
        (pa.array([{"a": "b"}]), "column data.text_field='text' holds struct<"),
    ],
)  # fmt: skip
def test_a_column_without_valid_text_is_refused(tmp_path, column, says):
    table = pa.table({"text": column})
    for name in ["a.parquet", "a.arrow"]:
        write_table(table, tmp_path / name)
        assert says in refusal(tmp_path / name)
