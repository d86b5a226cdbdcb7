"""What every node must read and write is tried at the start; nodes are directories here, with ranks that look there."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from ray_ep.driver.actors.reach import in_job_copy, try_nodes
from ray_ep.errors import ClusterError
from ray_ep.rank.reach import unreadable

WHERE = [{"node": "a", "host": "alpha"}, {"node": "a", "host": "alpha"}, {"node": "b", "host": "beta"}]


class FakeRanks:
    """Ranks for which the directory that the driver names lies elsewhere: a disk of their own."""

    where = WHERE

    def __init__(self, *places):
        self.places = places

    def reach(self, trial):
        return [replace(trial, url=place or trial.url).on_rank(r, 0) for r, place in enumerate(self.places)]


def try_them(url, *places, reads=()):
    try_nodes(FakeRanks(*places), str(url), reads, patience_s=0)


def test_a_shared_directory_passes_and_nothing_stays_in_it(tmp_path):
    try_them(tmp_path / "run" / "checkpoints", None, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_another_node_does_not_share_is_refused_with_what_is_needed(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ClusterError) as e:
        try_them(tmp_path / "run" / "checkpoints", None, None, str(tmp_path / "other"))
    for part in (
        "rank 2",
        "beta",
        str(tmp_path / "other"),
        "checkpoint.dir must be a path that all nodes share",
        "s3://",
    ):
        assert part in str(e.value)
    assert os.listdir(tmp_path) == ["other"]


def test_one_rank_a_node_tries(tmp_path):
    (tmp_path / "other").mkdir()
    try_them(tmp_path / "checkpoints", None, str(tmp_path / "other"), None)  # rank 1 is on the node of rank 0


def test_a_directory_that_no_file_can_be_made_in_is_refused_by_the_driver(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ClusterError, match=r"file/checkpoints: no checkpoint can be written.*checkpoint\.dir"):
        try_them(tmp_path / "file" / "checkpoints", None, None, None)


def test_memory_of_the_driver_is_no_shared_place():
    ranks = FakeRanks()
    ranks.reach = lambda trial: [["it sees nothing"] if r in trial.ranks else [] for r in range(3)]
    with pytest.raises(ClusterError, match="rank 0 on node alpha"):
        try_nodes(ranks, "memory://checkpoints", patience_s=0)


def test_a_model_that_a_node_does_not_have_is_named(tmp_path):
    with pytest.raises(ClusterError) as e:
        try_them(tmp_path / "c", None, None, None, reads=(("model.path", str(tmp_path / "nope")),))
    assert f"model.path='{tmp_path}/nope' cannot be read: No such file" in str(e.value)
    assert "every node must have it under that path" in str(e.value)


def test_every_file_of_a_model_is_opened(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert unreadable(str(tmp_path)) == ""
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    assert "No such file" in unreadable(str(tmp_path))
    assert unreadable(str(tmp_path / "config.json")) == ""


def test_the_copy_that_a_job_gets_of_its_working_directory_is_known():
    copy = "/tmp/ray/session_x/runtime_resources/working_dir_files/_ray_pkg_1/runs/1"
    assert in_job_copy(Path(copy))
    assert not in_job_copy(Path("/home/me/runs/1"))
