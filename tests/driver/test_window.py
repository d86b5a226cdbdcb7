"""Where the tokens of recent steps went: sums under each placement, and of the newest seconds, in few files."""

import numpy as np
import pytest

from ray_ep.driver.run import window as module
from ray_ep.driver.run.window import EVERY_S, Window
from tests.driver.scenes import Clock
from tests.records import record


@pytest.fixture
def it(tmp_path):
    """A window, and `step(n, version)` of one expert-token more each."""
    clock = Clock()
    made = Window(tmp_path, clock)

    def step(number, version=0, ranks=2):
        told = record(
            number, placement_version=version, step_seconds=0.5, load=np.full((1, 4), number),
            rank_load=np.full((1, ranks), number), sent=np.full((ranks, ranks), 10),
        )  # fmt: skip
        if made.due(told):
            made.write()
        made.add(told)

    made.step, made.now = step, clock
    return made


def read(folder, version):
    with np.load(folder / f"load-{version:04d}.npz") as file:
        return {name: file[name] for name in file.files}


def test_a_file_has_the_sums_of_all_steps_under_a_placement_and_of_the_newest_two_windows(it, tmp_path):
    it.step(1)
    it.step(2)  # the first step is written at once
    assert read(tmp_path, 0)["load"].tolist() == [[1] * 4]
    for second, number in enumerate(range(3, 6)):
        it.now.now = second * EVERY_S
        it.step(number)
    found = read(tmp_path, 0)
    assert found["load"].tolist() == [[1 + 2 + 3 + 4] * 4]
    assert found["steps"].tolist() == [1, 4]
    assert found["recent_steps"].tolist() == [3, 4] or found["recent_steps"].tolist() == [2, 4]
    assert float(found["recent_seconds"]) == 0.5 * (found["recent_steps"][1] - found["recent_steps"][0] + 1)
    assert found["ranks"].shape == (1, 2)
    assert found["sent"].tolist() == [[20.0 if found["recent_steps"][0] == 3 else 30.0] * 2] * 2


def test_what_was_counted_under_a_placement_is_written_before_the_next_ones(it, tmp_path):
    it.step(1)
    it.step(2)
    it.step(3, version=1, ranks=3)
    assert read(tmp_path, 0)["steps"].tolist() == [1, 2]
    it.write()
    assert read(tmp_path, 1)["steps"].tolist() == [3, 3]
    assert read(tmp_path, 1)["sent"].shape == (3, 3)


def test_nothing_is_written_twice_and_nothing_before_a_step(it, tmp_path):
    it.write()
    assert list(tmp_path.iterdir()) == []
    it.step(1)
    it.write()
    before = (tmp_path / "load-0000.npz").stat().st_mtime_ns
    it.write()
    assert (tmp_path / "load-0000.npz").stat().st_mtime_ns == before


def test_files_of_old_placements_go(it, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 2)
    for version in range(5):
        it.step(version + 1, version)
        it.write()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["load-0003.npz", "load-0004.npz"]


def test_a_file_that_cannot_be_written_leaves_none_half_written(it, tmp_path):
    (tmp_path / "load-0000.npz").mkdir()
    it.step(1)
    with pytest.raises(OSError):
        it.write()
    assert [p.name for p in tmp_path.iterdir()] == ["load-0000.npz"]
