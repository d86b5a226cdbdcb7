"""Of several ranks' failures the one that explains the others; a rank that was killed for memory is said to be."""

from ray.exceptions import ActorDiedError, OutOfMemoryError

from ray_ep.driver.cause import for_memory, root_cause
from ray_ep.errors import GroupError, RankError, SaveError
from ray_ep.rank.memory import oom_kills

WHERE = [{"host": "alpha"}, {"host": "beta"}]


def test_a_rank_that_rays_monitor_killed_for_memory_is_named_with_its_node_and_what_to_lower():
    failed = {0: GroupError("connection reset"), 1: OutOfMemoryError("Memory on the node was 15.9GB / 16GB (0.99)")}
    e = root_cause(failed, [], WHERE)
    assert isinstance(e, RankError)
    assert e.rank == 1
    for words in ("rank 1 on beta", "killed for memory", "batch.sequences", "balance.guest_mb", "15.9GB / 16GB"):
        assert words in str(e)


def test_a_rank_that_died_while_the_kernel_killed_for_memory_is_said_to_have_died_of_that():
    died = root_cause({1: ActorDiedError()}, [], WHERE)
    assert str(died).startswith("rank 1 on beta died: ")
    e = for_memory(died, "beta", 1)
    assert e.rank == 1
    for words in ("rank 1 on beta", "most likely killed for memory", "OOM killer", "batch.sequences"):
        assert words in str(e)


def test_before_places_are_known_a_death_has_none():
    assert str(root_cause({0: ActorDiedError()}, [], [])).startswith("rank 0 died: ")


def test_a_death_is_one_line_without_rays_list_of_ids():
    class Died(ActorDiedError):
        def __str__(self):
            return "The actor died unexpectedly.\n\tclass_name: RankActor\n\tip: 10.0.0.1\nIts worker process has died."

    said = str(root_cause({1: Died()}, [], WHERE))
    assert said == "rank 1 on beta died: The actor died unexpectedly. Its worker process has died."
    assert str(for_memory(RankError(1, said), "beta", 1)).endswith("Its worker process has died.")


def test_a_failed_save_of_a_rank_stays_one():
    assert isinstance(root_cause({0: SaveError("full")}, [], WHERE), (SaveError, RankError))


def test_the_kernels_kills_are_counted_where_it_tells(tmp_path):
    (tmp_path / "vmstat").write_text("nr_free_pages 7\noom_kill 2\n")
    (tmp_path / "events").write_text("low 0\noom 3\noom_kill 3\n")
    assert oom_kills((str(tmp_path / "vmstat"), str(tmp_path / "events"), str(tmp_path / "gone"))) == 3
    assert oom_kills((str(tmp_path / "gone"),)) == 0
