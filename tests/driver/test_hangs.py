"""What is kept of hangs: the newest, each whole, and a disk that fails ends nothing. Real ranks: test_ranks.py."""

from ray_ep.collective import Membership
from ray_ep.driver.hang.keeping import KEPT, Hangs


def test_the_newest_hangs_are_kept_each_with_what_the_driver_was_at(tmp_path):
    for step in range(KEPT + 2):
        kept = Hangs(tmp_path, lambda: step).keep(Membership(step, ("rank-0",), (0,)), [], [], {}, dict)
        assert "in test_the_newest_hangs_are_kept" in (tmp_path / kept / "driver.txt").read_text()
    names = sorted(p.name for p in (tmp_path / "hangs").iterdir())
    assert names == [f"step-{step:06d}-epoch-{step}" for step in range(2, KEPT + 2)]


def test_a_place_that_cannot_be_written_is_logged_and_ends_nothing(tmp_path, caplog):
    (tmp_path / "hangs").write_text("a file is in its place")
    assert Hangs(tmp_path, lambda: 3).keep(Membership(0, ("rank-0",), (0,)), [], [], {}, dict) == ""
    assert "what ranks were at cannot be kept in" in caplog.text
    assert "Error" in caplog.text
