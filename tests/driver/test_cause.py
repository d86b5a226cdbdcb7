"""Of several ranks' failures the one that explains the others; a rank that was killed for memory is said to be."""

from ray.exceptions import ActorDiedError, ActorUnavailableError, OutOfMemoryError

from ray_ep.driver.actors.cause import Kind, for_memory, kind_of, lost_ranks, root_cause, silent_cause
from ray_ep.errors import BadInput, DivergedError, GroupError, RankError, SaveError
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


PLACES = [{"host": h, "address": a, "pid": p} for h, a, p in (("alpha", "10.0.0.1", 7), ("beta", "10.0.0.2", 8))] * 2
"""Ranks 0 and 2 on alpha, 1 and 3 on beta."""
SILENT = "has not answered for 5.1 s (cluster.silence_s=5)"


def test_a_silent_rank_whose_node_answers_is_named_with_its_process():
    e = silent_cause({1: SILENT}, (), PLACES)
    assert e.rank == 1
    assert str(e) == f"rank 1 on beta (process 8) {SILENT}: its node answers, so its process is stopped or hangs"


def test_ranks_of_a_node_that_is_cut_off_are_named_together_with_its_address():
    e = silent_cause({3: SILENT, 1: SILENT}, (1, 3), PLACES)
    assert e.rank == 1
    assert str(e).startswith("rank 1 on beta (process 8) and rank 3 on beta (process 8) have not answered for 5.1 s")
    assert str(e).endswith("no answer from node beta (10.0.0.2), which is down or cut off")


def test_a_rank_whose_node_ray_has_given_up_is_named_with_that_nodes_address():
    class Died(ActorDiedError):
        def __str__(self):
            return "The actor died because its node has died. Node Id: 54bc"

    said = str(root_cause({1: Died()}, [], PLACES))
    assert said.startswith("rank 1 on beta died: no answer from node beta (10.0.0.2), so Ray gave it up")


def test_ranks_that_are_stopped_together_are_named_together():
    said = str(silent_cause({1: SILENT, 0: SILENT}, (), PLACES))
    assert said.startswith("rank 0 on alpha (process 7) and rank 1 on beta (process 8) have not answered for 5.1 s")
    assert said.endswith(": their nodes answer, so their processes are stopped or hang")


def test_of_equal_failures_the_first_explains_the_others():
    assert root_cause({2: GroupError("late"), 0: GroupError("aborted")}, [], PLACES).rank == 2


def test_a_rank_that_did_not_come_back_is_named_unless_another_raised_an_error_of_its_own():
    lost = {0: GroupError("no answer from the peers")}
    e = root_cause(lost, [1], PLACES)
    assert e.rank == 1
    assert "rank 1 on beta (process 8) did not come back, while rank 0 raised:\nno answer from the peers" in str(e)
    assert root_cause(lost | {2: ValueError("boom")}, [1], PLACES).rank == 2


def test_who_must_be_released_depends_on_what_one_rank_found():
    assert kind_of(SaveError("full")) is Kind.OWN
    assert {kind_of(e) for e in (BadInput("x"), DivergedError("x"))} == {Kind.BY_ALL}
    assert {kind_of(e) for e in (ValueError("x"), GroupError("x"), ActorDiedError())} == {Kind.ALONE}


def test_a_rank_that_ray_cannot_reach_any_more_is_lost_as_one_that_died():
    """Its raylet was killed: Ray says so 3 s later, long before it gives the node up, and new calls would hang."""
    failed = {0: GroupError("connection reset"), 1: ActorUnavailableError("RpcError: rpc_code 14", None)}
    assert lost_ranks(failed, ()) == (1,)
    assert kind_of(failed[1]) is Kind.ALONE
    said = str(root_cause(failed, [], WHERE))
    assert said.startswith("rank 1 on beta died: The actor None is unavailable: RpcError: rpc_code 14.")
