import bz2
import gzip
import json
import lzma
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_ep.config import load_config
from ray_ep.errors import DataError
from ray_ep.rank.data.corpus import global_batch, held_out_batch, load_corpus

DOCUMENTS = [f"document {i} says {'word ' * (i % 7 + 3)}\n" for i in range(400)]


def config(*overrides):
    return load_config(None, [f"data.{o}" for o in overrides]).data


def corpus(*overrides, length=8, seed=0):
    return load_corpus(config(*overrides), length, seed)


def split(tokens):
    return bytes(tokens).decode().split("\0")[:-1]


def write_jsonl(path, rows, open_=open):
    with open_(path, "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def test_a_text_file_is_one_document_ended_by_a_zero_byte(tmp_path):
    (tmp_path / "a.txt").write_text("grüße, world")
    got = corpus(f"files={tmp_path}/a.txt", "held_out=0")
    assert bytes(got.train) == "grüße, world".encode() + b"\0"
    assert (got.train.dtype, got.vocab_size, got.documents) == (np.uint8, 256, 1)
    assert got.held_out.size == 0
    assert got.source == f"14 bytes of data.files=['{tmp_path}/a.txt'] (documents: 1; files: 1 text)"


def test_files_are_read_in_order_of_the_patterns_then_sorted_and_each_once(tmp_path):
    for name in ["b.txt", "a.txt", "deep/er/c.txt", "z.md"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    got = corpus(f"files=[{tmp_path}/z.md, {tmp_path}/**/*.txt, {tmp_path}/a.txt]", "held_out=0")
    assert split(got.train) == [f"text of {n}" for n in ["z.md", "a.txt", "b.txt", "deep/er/c.txt"]]


def test_a_name_with_glob_characters_is_taken_literally_if_it_exists(tmp_path):
    (tmp_path / "part[1].txt").write_text("brackets in the name")
    assert corpus(f'files=["{tmp_path}/part[1].txt"]', "held_out=0").documents == 1


def test_an_fsspec_url_is_read(tmp_path):
    import fsspec

    with fsspec.open("memory://data_test/a.txt", "w") as f:
        f.write("text in memory")
    assert split(corpus("files=memory://data_test/*.txt", "held_out=0").train) == ["text in memory"]


@pytest.mark.parametrize(("suffix", "open_"), [("gz", gzip.open), ("bz2", bz2.open), ("xz", lzma.open)])
def test_compressed_files_are_read_by_the_suffix_before(tmp_path, suffix, open_):
    with open_(tmp_path / f"a.txt.{suffix}", "wt") as f:
        f.write("plain text")
    write_jsonl(tmp_path / f"b.jsonl.{suffix}", [{"text": "row 1"}, {"text": "row 2"}], open_)
    assert split(corpus(f"files={tmp_path}/*", "held_out=0").train) == ["plain text", "row 1", "row 2"]


def test_each_line_of_jsonl_is_a_document_and_empty_ones_are_left_out(tmp_path):
    rows = [{"text": "not this", "body": t} for t in ["one", "", None, " \n", "two\nlines"]]
    write_jsonl(tmp_path / "a.jsonl", rows)
    with (tmp_path / "a.jsonl").open("a") as f:
        f.write("\n")
    got = corpus(f"files={tmp_path}/a.jsonl", "text_field=body", "held_out=0")
    assert split(got.train) == ["one", "two\nlines"]
    assert got.documents == 2


def test_each_row_of_parquet_is_a_document(tmp_path):
    table = pa.table({"n": range(3), "body": ["first row", None, "last row"]})
    pq.write_table(table, tmp_path / "a.parquet")
    got = corpus(f"files={tmp_path}/a.parquet", "text_field=body", "held_out=0")
    assert split(got.train) == ["first row", "last row"]


@pytest.mark.parametrize(
    ("name", "content", "override", "says"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "held_out=0", r"data.files, .*a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"body": "", "id": 1}', "held_out=0", r"line 1: no field data.text_field='text'; .* body, id"),
        ("a.jsonl", b'["x"]\n', "held_out=0", r"line 1, element 1: is a str, not an object"),
        ("a.jsonl", b'{"text": 5}\n', "held_out=0", r"line 1: data.text_field='text' holds a int, not text"),
        ("a.parquet", b"no parquet", "held_out=0", r"data.files, .*a\.parquet: cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "held_out=0", r"a\.txt\.gz: cannot be read"),
        ("a.txt.xz", b"\xfd7zXZ\0 and no more", "held_out=0", r"data.files, .*a\.txt\.xz: cannot be read"),
        ("a.bin", b"\x7fELF\0\0", "held_out=0", r"a\.bin: has NUL bytes"),
        ("a.txt", b" \n", "held_out=0", r"data.files=.*no text"),
        ("a.txt", b"1234567", "held_out=0", r"data.files=.*8 tokens .*needs 9 \(batch.length \+ 1\)"),
        ("a.txt", b"1234567890123456", "held_out=0.1", r"17 tokens .*needs 9 .*data.held_out=0.1; 0: none"),
        ("a.txt", b"x" * 99, "tokenizer=/no/such", "data.tokenizer='/no/such': give bytes, or the name or directory"),
    ],
)  # fmt: skip
def test_bad_content_is_refused_with_its_place(tmp_path, name, content, override, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says):
        corpus(f"files={tmp_path}/{name}", override)


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("no/such.txt", r"data\.files='.*/no/such\.txt': no file matches; give paths, globs"),
        ("no/*.txt", r"data\.files='.*/no/\*\.txt': no file matches"),
        (".", r"data\.files='/.*': matches a directory, not a file"),
        ("nosuchscheme://a/b", "data.files='nosuchscheme://a/b': Protocol not known"),
    ],
)
def test_a_pattern_without_files_is_refused_by_name(tmp_path, monkeypatch, pattern, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=says):
        corpus(f"files={pattern}")


def test_a_missing_parquet_column_is_refused_with_the_columns_there(tmp_path):
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column data\.text_field='text'; it has n, body"):
        corpus(f"files={tmp_path}/a.parquet")


def test_whole_documents_are_held_out_at_about_the_share(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS + DOCUMENTS[:50]])
    got = corpus(f"files={tmp_path}/a.jsonl", "held_out=0.2")
    train, held_out = split(got.train), split(got.held_out)
    assert set(train).isdisjoint(held_out)
    assert set(train) | set(held_out) == set(DOCUMENTS)
    assert len(train) + len(held_out) == got.documents == 450
    assert 0.1 < len(held_out) / 450 < 0.3
    assert train == [t for t in DOCUMENTS + DOCUMENTS[:50] if t in set(train)], "the order is kept"


def test_the_split_is_drawn_by_the_seed(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS])
    first, again, other = (corpus(f"files={tmp_path}/a.jsonl", "held_out=0.2", seed=s) for s in (3, 3, 4))
    assert np.array_equal(first.held_out, again.held_out)
    assert not np.array_equal(first.held_out, other.held_out)


@pytest.mark.parametrize("seed", range(60))
def test_with_few_documents_the_tail_is_held_out_whatever_the_hash_says(tmp_path, seed):
    (tmp_path / "a.txt").write_text("".join(DOCUMENTS))
    got = corpus(f"files={tmp_path}/a.txt", "held_out=0.1", seed=seed)
    text = "".join(DOCUMENTS).encode() + b"\0"
    assert bytes(got.train) + bytes(got.held_out) == text
    assert len(got.held_out) == len(text) // 10


def test_the_tail_holds_at_least_one_sequence(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 40)
    got = corpus(f"files={tmp_path}/a.txt", "held_out=0.01")
    assert (len(got.train), len(got.held_out)) == (32, 9)
    assert held_out_batch(got.held_out, 4, 8).shape == (1, 9)


def test_reading_stops_at_the_last_document_that_fits_max_bytes(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": "a" * 30}, {"text": "b" * 30}, {"text": "c" * 30}])
    (tmp_path / "b.jsonl").write_text("never read, so its JSON does not matter")
    for limit, documents in [(59, 1), (60, 2), (89, 2)]:
        got = corpus(f"files={tmp_path}/*.jsonl", "held_out=0", f"max_bytes={limit}")
        assert (got.documents, len(got.train)) == (documents, documents * 31)


def test_a_first_document_over_max_bytes_is_cut_between_characters(tmp_path):
    (tmp_path / "a.txt").write_text("é" * 100)
    assert split(corpus(f"files={tmp_path}/a.txt", "held_out=0", "max_bytes=21").train) == ["é" * 10]
    assert split(corpus(f"files={tmp_path}/a.txt", "held_out=0", "max_bytes=0").train) == ["é" * 100]


def test_the_default_is_the_source_text_of_the_standard_library():
    got = corpus(length=128)
    text = bytes(got.train)
    assert len(text) > 5_000_000
    assert got.documents > 300
    assert text.count(b"import ") > 3000
    assert 0.005 < len(got.held_out) / len(text) < 0.06
    assert "bytes of the Python standard library (documents: " in got.source


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(DOCUMENTS, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>").save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(path / "no_eos")
    return path


def test_a_hugging_face_tokenizer_separates_documents_by_its_eos_token(tmp_path, tokenizer_dir):
    from transformers import AutoTokenizer

    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS[:5]])
    got = corpus(f"files={tmp_path}/a.jsonl", f"tokenizer={tokenizer_dir}", "held_out=0")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    assert (got.train.dtype, got.vocab_size) == (np.uint16, len(tokenizer))
    assert (got.train == tokenizer.eos_token_id).sum() == 5
    assert tokenizer.decode(got.train).split("<eos>")[:-1] == DOCUMENTS[:5]


def test_a_tokenizer_without_eos_gets_no_separator(tmp_path, tokenizer_dir):
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in DOCUMENTS[:5]])
    got = corpus(f"files={tmp_path}/a.jsonl", f"tokenizer={tokenizer_dir}/no_eos", "held_out=0")
    with_eos = corpus(f"files={tmp_path}/a.jsonl", f"tokenizer={tokenizer_dir}", "held_out=0")
    assert len(got.train) == len(with_eos.train) - 5


def test_a_document_of_several_pieces_keeps_every_character(tmp_path, tokenizer_dir):
    from transformers import AutoTokenizer

    text = "".join(DOCUMENTS) * 20 + "x" * 1_100_000
    text = text * 2
    (tmp_path / "a.txt").write_text(text)
    got = corpus(f"files={tmp_path}/a.txt", f"tokenizer={tokenizer_dir}", "held_out=0")
    assert AutoTokenizer.from_pretrained(tokenizer_dir).decode(got.train) == text + "<eos>"


def test_a_dataset_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"data.dataset='some/name': .*pip install 'ray_ep\[datasets\]'"):
        corpus("dataset=some/name")


def test_a_dataset_saved_to_disk_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    datasets.Dataset.from_dict({"text": ["first row", "last row"]}).save_to_disk(tmp_path / "d")
    assert split(corpus(f"dataset={tmp_path}/d", "held_out=0").train) == ["first row", "last row"]
    with pytest.raises(DataError, match=r"no field data\.text_field='body'; it has text"):
        corpus(f"dataset={tmp_path}/d", "text_field=body")


def test_a_dataset_directory_of_files_is_read_by_split(tmp_path):
    pytest.importorskip("datasets", reason="the datasets extra is not installed")
    write_jsonl(tmp_path / "train.jsonl", [{"text": "a row to train on"}])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "a row to test on"}])
    got = corpus(f"dataset={tmp_path}", "dataset_split=test", "held_out=0")
    assert split(got.train) == ["a row to test on"]
    with pytest.raises(DataError, match=r"data.dataset=.*data.dataset_split='nope': cannot be read"):
        corpus(f"dataset={tmp_path}", "dataset_split=nope")


def test_a_batch_is_a_function_of_seed_and_step_alone():
    tokens = np.random.default_rng(0).integers(0, 256, 1000, dtype=np.uint8)
    first = global_batch(tokens, 5, 7, 16, 32)
    global_batch(tokens, 5, 8, 16, 32)
    assert np.array_equal(first, global_batch(tokens, 5, 7, 16, 32))
    assert not np.array_equal(first, global_batch(tokens, 5, 8, 16, 32))
    assert not np.array_equal(first, global_batch(tokens, 6, 7, 16, 32))
    assert (first.shape, first.dtype) == ((16, 33), np.int64)


@given(extra=st.integers(1, 300), length=st.integers(1, 40), step=st.integers(0, 10**9), sequences=st.integers(1, 9))
def test_every_row_of_a_batch_is_a_window_of_the_tokens(extra, length, step, sequences):
    tokens = np.arange(length + extra, dtype=np.uint16)
    batch = global_batch(tokens, 0, step, sequences, length)
    assert batch.shape == (sequences, length + 1)
    assert np.array_equal(batch, batch[:, :1] + np.arange(length + 1))
    assert batch.max() < length + extra


def test_the_first_and_the_very_last_token_are_reachable():
    tokens = np.arange(12, dtype=np.uint8)
    batch = global_batch(tokens, 0, 0, 500, 8)
    assert set(batch[:, 0]) == {0, 1, 2, 3}
    assert batch.max() == 11


@given(tokens=st.integers(0, 200), sequences=st.integers(1, 20), length=st.integers(1, 40))
def test_held_out_windows_are_spread_over_all_tokens_and_predict_none_twice(tokens, sequences, length):
    batch = held_out_batch(np.arange(tokens, dtype=np.uint8), sequences, length)
    assert batch.shape[0] == max(0, min(sequences, (tokens - 1) // length))
    assert batch.shape[1] == length + 1
    assert batch.dtype == np.int64
    targets = batch[:, 1:].ravel()
    assert len(set(targets)) == len(targets)
    if len(batch) > 1:
        assert (batch[0, 0], batch[-1, -1]) == (0, tokens - 1)
