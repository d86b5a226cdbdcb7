"""The files of records: whole, bounded, replaced where steps are made again, read whatever is damaged among them."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pytest
from pyarrow import parquet

from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.driver.records import Event
from ray_ep.errors import BadInput
from ray_ep.observe.provenance import files, table
from ray_ep.observe.provenance.files import CLOSE_S, ProvenanceFiles, parts_of
from ray_ep.observe.provenance.reader import Records, chosen
from ray_ep.observe.provenance.table import SCHEMA
from ray_ep.rank.data.tokenizer import load_decoder
from tests.records import provenance, record

ROOT = Path(__file__).parents[2]
TEXT = "To be, or not to be, that is the question: whether 'tis nobler."


class Scene:
    """A run directory and what writes into it."""

    def __init__(self, path, disk_mb=64):
        self.path, self.told, self.now = path, [], 0.0
        (path / "config.yaml").touch()
        self.it = self.files(disk_mb)

    def files(self, disk_mb=64):
        cfg = ProvenanceConfig(sample="0.1", disk_mb=disk_mb)
        return ProvenanceFiles(self.path, cfg, lambda: load_decoder("bytes"), self.told.append, lambda: self.now)

    def step(self, number, positions=(3, 20, 40), **more):
        self.it.step(record(number, provenance=provenance(TEXT, positions, **more)))

    @property
    def names(self):
        return [p.path.name for p in parts_of(self.path)]

    @property
    def steps(self):
        return Records(self.path).steps()


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path)


def test_a_row_says_all_that_is_known_of_one_choice(scene):
    scene.step(7)
    scene.it.close()
    found = parquet.read_table(parts_of(scene.path)[0].path)
    assert found.schema.equals(SCHEMA, check_metadata=True)
    assert found.num_rows == 3 * 2 * 2
    row = found.slice(4, 1).to_pylist()[0]
    assert row == {
        "step": 7, "request": None, "position": 20, "batch_row": 1, "batch_column": 4, "token": ord("i"), "text": "i",
        "before": TEXT[:20][-24:], "after": TEXT[21:29], "document": 0, "offset": 20, "home_rank": 1,
        "home_node": "node1", "home_host": "host1", "home_device": "cuda:1", "layer": 0, "choice": 0, "expert": 0,
        "weight": 0.75, "rank": 0, "kind": "primary", "node": "node0", "host": "host0", "device": "cuda:0",
        "placement_version": 3, "epoch": 1,
    } | {"token": ord(TEXT[20]), "text": TEXT[20]}  # fmt: skip
    order = [found.column(name).to_pylist() for name in ("position", "layer", "choice")]
    assert sorted(zip(*order, strict=True)) == list(zip(*order, strict=True))


def test_a_file_is_closed_after_a_while_after_a_checkpoint_and_at_the_end(scene):
    scene.step(1)
    scene.step(2)
    assert scene.names == []
    scene.now = CLOSE_S
    scene.step(3)
    assert scene.names == ["steps-00000001-00000003.parquet"]
    scene.step(4)
    scene.it.event(Event("checkpoint", "x"))
    assert len(scene.names) == 2
    with scene.it:
        scene.step(5)
    assert scene.steps == dict.fromkeys(range(1, 6), 3)
    assert [p.name for p in (scene.path / "provenance").iterdir() if p.suffix != ".parquet"] == []


def test_a_file_is_closed_when_much_waits(scene, monkeypatch):
    monkeypatch.setattr(files, "CLOSE_BYTES", 3000)
    for step in range(1, 9):
        scene.step(step)
    assert 1 < len(scene.names) < 8


def test_steps_that_are_made_again_replace_their_records_and_those_after_them(scene):
    for step in range(1, 7):
        scene.step(step)
        if step % 2 == 0:
            scene.it.close()
    scene.step(7)
    scene.step(4, positions=[5])  # the run went back to after step 3
    assert scene.names == ["steps-00000001-00000002.parquet", "steps-00000003-00000003.parquet"]
    scene.step(5, positions=[6, 7])
    scene.it.close()
    assert scene.steps == {1: 3, 2: 3, 3: 3, 4: 1, 5: 2}


def test_a_run_that_goes_on_without_a_sample_still_takes_back_what_is_made_again(scene):
    for step in (1, 2, 3):
        scene.step(step)
    scene.it.close()
    later = scene.files()
    later.step(record(3))
    assert scene.steps == {1: 3, 2: 3}


def test_the_oldest_files_go_when_the_disk_limit_is_reached_and_that_is_told(tmp_path):
    scene = Scene(tmp_path, disk_mb=1)
    for step in range(1, 13):
        scene.step(step)
        scene.it.close()
        with (scene.path / "provenance" / scene.names[-1]).open("ab") as f:
            f.write(bytes(200_000))  # as large as with many more tokens
    sizes = [p.path.stat().st_size for p in parts_of(tmp_path)]
    assert sum(sizes) <= (1 << 20) + 2 * max(sizes)
    assert scene.names[-1] == "steps-00000012-00000012.parquet"
    assert scene.names[0] > "steps-00000001"
    assert scene.told[0].kind == "provenance"
    assert "provenance.disk_mb=1 is full: records of steps up to" in scene.told[0].words
    assert len(scene.told) == 1, "the first, the tenth, the hundredth"


def test_a_limit_below_one_file_is_told_in_one_sentence(scene, monkeypatch):
    monkeypatch.setattr(scene.it, "_limit_mb", 0)
    scene.step(1)
    scene.it.close()
    assert scene.names == []
    (event,) = scene.told
    assert "provenance.disk_mb=0 is less than one file of records takes" in event.words


def test_a_full_disk_ends_no_run_and_is_told_once(scene, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    for step in (1, 2):
        scene.step(step)
        scene.it.close()
    assert [e.words for e in scene.told] == [
        f"{scene.path}/provenance cannot be written: No space left on device: records of sampled tokens are lost; "
        "the run goes on"
    ]
    monkeypatch.undo()
    scene.step(3)
    scene.it.close()
    assert scene.steps == {3: 3}


def test_half_files_are_taken_away_and_damaged_ones_left_out_by_name(scene):
    for step in (1, 2, 3):
        scene.step(step)
        scene.it.close()
    first, second, _ = (p.path for p in parts_of(scene.path))
    first.write_bytes(first.read_bytes()[:700])
    half = second.with_suffix(".part")
    half.write_bytes(b"PAR1")
    scene.it.start(Event("start", "x"))
    assert not half.exists()
    records = Records(scene.path)
    assert records.steps() == {2: 3, 3: 3}
    assert records.damaged == [first.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.observe.provenance import files, table
from tests.records import provenance, record
table.ROWS, decoded = 8, []

def decode(ids):
    decoded.append(ids)
    if len(decoded) > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return bytes(ids).decode()

it = files.ProvenanceFiles(Path(sys.argv[1]), ProvenanceConfig(), lambda: decode, print)
for step in (2, 3):
    it.step(record(step, provenance=provenance("To be, or not to be: " * 3, [3, 20, 40, 41])))
    it.close()
"""


def test_a_process_that_is_killed_while_it_writes_leaves_whole_files_to_every_reader(scene):
    scene.step(1)
    scene.it.close()
    killed = subprocess.run([sys.executable, "-c", KILLED, scene.path], cwd=ROOT, timeout=60)
    assert killed.returncode == -signal.SIGKILL
    folder = scene.path / "provenance"
    (half,) = folder.glob(".*.part")
    assert half.stat().st_size > 1000
    assert scene.steps == {1: 3, 2: 4}
    assert Records(scene.path).damaged == []
    whole = pyarrow.dataset.dataset(folder, exclude_invalid_files=False).to_table()  # as pandas reads a folder
    assert sorted(set(whole.column("step").to_pylist())) == [1, 2]
    scene.files().start(Event("start", "x"))
    assert not half.exists()


def test_a_file_that_was_cut_short_by_a_process_that_was_then_killed_counts_once(scene):
    for step in range(1, 7):
        scene.step(step)
    scene.it.close()
    (whole,) = parts_of(scene.path)
    kept = whole.path.read_bytes()
    scene.step(4, positions=[5])
    whole.path.write_bytes(kept)  # as if it had been killed before this was taken away
    assert scene.steps == {1: 3, 2: 3, 3: 3}
    scene.files().start(Event("start", "x"))
    assert [p.name for p in (scene.path / "provenance").iterdir()] == ["steps-00000001-00000003.parquet"]


def test_records_of_steps_that_are_made_again_go_even_if_there_is_no_room_to_keep_those_before(scene, monkeypatch):
    def full(*args, **more):
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in (1, 2, 3):
        scene.step(step)
    scene.it.close()
    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    scene.step(3, positions=[5])
    monkeypatch.undo()
    scene.it.close()
    assert scene.steps == {3: 1}
    assert [t.position for t in Records(scene.path).tokens(3, None)] == [5]


def test_a_step_of_many_tokens_is_written_some_after_others_and_reads_as_one(scene, monkeypatch):
    def rows():
        return Records(scene.path).read(SCHEMA.names, pa.compute.field("step") > 0).to_pylist()

    scene.step(1, positions=range(60))
    scene.step(2, positions=range(0, 60, 7))
    scene.it.close()
    whole = rows()
    assert len(whole) == (60 + 9) * 2 * 2
    monkeypatch.setattr(table, "ROWS", 16)
    scene.step(1, positions=range(60))
    scene.step(2, positions=range(0, 60, 7))
    scene.it.close()
    (part,) = parts_of(scene.path)
    file = parquet.ParquetFile(part.path)
    assert file.num_row_groups > 10
    assert max(file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)) < 2 * 16
    assert rows() == whole


def test_a_tokenizer_that_is_gone_costs_the_records_and_not_the_run(scene):
    def gone():
        raise BadInput("data.tokenizer='x': no such tokenizer")

    with ProvenanceFiles(scene.path, ProvenanceConfig(), gone, scene.told.append) as it:
        it.step(record(1, provenance=provenance(TEXT, [3])))
    (event,) = scene.told
    assert "cannot be written: data.tokenizer='x': no such tokenizer: records of sampled tokens are lost" in event.words


def test_tokens_are_there_though_the_first_layer_has_no_rows(scene):
    made = provenance(TEXT, [3, 20])
    for part in made.parts:
        part.experts[0] = -1
    scene.it.step(record(1, provenance=made))
    scene.it.close()
    records = Records(scene.path)
    assert records.steps() == {1: 2}
    assert [t.position for t in records.tokens(1, None)] == [3, 20]
    assert {row["layer"] for row in records.of_token(1, None, 3)} == {1}


def test_a_step_without_any_sampled_token_writes_no_row(scene):
    scene.step(1, positions=[])
    scene.it.close()
    assert scene.steps == {}


def test_tokens_are_found_by_position_or_row_and_column_and_a_refusal_names_the_next_ones(scene):
    scene.step(1)
    scene.it.close()
    records = Records(scene.path)
    tokens = records.tokens(1, None)
    assert [(t.position, t.row, t.column, t.text) for t in tokens] == [
        (p, p // 16, p % 16, TEXT[p]) for p in (3, 20, 40)
    ]
    assert chosen(tokens, "20") == chosen(tokens, "1:4") == tokens[1]
    with pytest.raises(BadInput, match=r"step 1: token 2:9 was not sampled; 3 of its tokens were, next to it: 40 \(2:"):
        chosen(tokens, "2:9")
    with pytest.raises(BadInput, match="expected a position such as 17, or ROW:COLUMN"):
        chosen(tokens, "x")
    with pytest.raises(BadInput, match="step 9: no token of it was recorded; there are records of 1 steps from 1 to 1"):
        records.tokens(9, None)
    with pytest.raises(BadInput, match="request 'r': no token of it was recorded"):
        records.tokens(None, "r")
    with pytest.raises(BadInput, match="layer 2: there are records of MoE layers 0 to 1"):
        records.of_layer(2, ["expert"])


def test_rows_of_requests_are_read_by_their_id(scene):
    """Nothing writes them yet; the schema has room for them."""
    scene.step(1)
    scene.it.close()
    found = parquet.read_table(parts_of(scene.path)[0].path)
    rows = [row | {"step": None, "request": "r-1", "document": None, "offset": None} for row in found.to_pylist()]
    parquet.write_table(
        pa.Table.from_pylist(rows, SCHEMA), scene.path / "provenance" / "steps-00000002-00000002.parquet"
    )
    records = Records(scene.path)
    assert [t.position for t in records.tokens(None, "r-1")] == [3, 20, 40]
    assert {row["request"] for row in records.of_token(None, "r-1", 20)} == {"r-1"}
    assert {row["request"] for row in records.of_token(1, None, 20)} == {None}


def test_a_directory_without_records_says_how_to_get_them(tmp_path):
    with pytest.raises(BadInput, match=r"is not a run directory: it has no config\.yaml"):
        Records(tmp_path)
    (tmp_path / "config.yaml").write_text(json.dumps({}))
    with pytest.raises(BadInput, match=r"has no records of tokens: train with provenance\.sample=0\.01"):
        Records(tmp_path)
