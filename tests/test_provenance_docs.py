"""The examples of docs/provenance.md run as they stand, on the records of a run."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.observe.provenance.files import ProvenanceFiles
from ray_ep.observe.provenance.table import SCHEMA
from ray_ep.rank.data.tokenizer import load_decoder
from tests.records import provenance, record

PAGE = (Path(__file__).parent.parent / "docs" / "provenance.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture
def run(tmp_path, monkeypatch):
    path = tmp_path / "runs" / "NAME"
    path.mkdir(parents=True)
    with ProvenanceFiles(path, ProvenanceConfig(), lambda: load_decoder("bytes"), print) as files:
        for step in (1, 2, 101):
            files.step(record(step, provenance=provenance("To be, or not to be: " * 3, range(3, 40, 2))))
            files.close()
    monkeypatch.chdir(tmp_path)
    return path


def test_the_examples_with_duckdb_and_pandas_run_and_print_what_is_there(run):
    pytest.importorskip("duckdb", reason="duckdb is not installed: pip install duckdb")
    assert len(BLOCKS) == 3
    names, said = {}, []
    for block in BLOCKS:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(block, "docs/provenance.md", "exec"), names)
        said.append(out.getvalue())
    assert "primary" in said[0]
    assert "of_others" in said[0]
    assert "[0.75, 0.25]" in said[1]
    assert re.search(r"^0 +o +6\b", said[2], re.M), said[2]


def test_every_column_is_explained():
    rows = re.findall(r"^\| (`.*?) \| ", PAGE, re.M)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(SCHEMA.names) <= named
