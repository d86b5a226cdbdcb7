"""How many ranks a run may be asked to have, each limit with the key that sets it."""

from ray_ep.config import load_config
from ray_ep.driver.elastic.limits import fewest_ranks, most_ranks, scale_refusal


def test_the_fewest_are_what_the_strictest_key_allows():
    keys = ["cluster.ranks=4", "elastic.min_ranks=1"]
    assert fewest_ranks(load_config(None, keys), 16) == (1, "elastic.min_ranks=1")
    slots = load_config(None, [*keys, "placement.slots_per_rank=6"])
    assert fewest_ranks(slots, 16) == (3, "placement.slots_per_rank=6, for 16 experts")
    assert fewest_ranks(slots)[0] == 1, "how many experts there are is not known"
    tokens = load_config(None, [*keys, "exchange.tokens=4096"])  # 64 sequences of 128 tokens at most
    assert fewest_ranks(tokens, 16) == (2, "exchange.tokens=4096")


def test_the_most_are_those_that_a_run_begins_with_unless_more_are_allowed():
    assert most_ranks(load_config(None, ["cluster.ranks=4"])) == (
        4, "elastic.max_ranks=0: as many as cluster.ranks=4",
    )  # fmt: skip
    assert most_ranks(load_config(None, ["elastic.max_ranks=7"])) == (7, "elastic.max_ranks=7")


def test_a_number_is_refused_with_those_that_are_allowed():
    cfg = load_config(None, ["cluster.ranks=4", "elastic.min_ranks=2"])
    assert [scale_refusal(cfg, n) == "" for n in range(1, 6)] == [False, True, True, True, False]
    assert scale_refusal(cfg, 5) == (
        "5 ranks are too many: allowed are 2 to 4 (elastic.max_ranks=0: as many as cluster.ranks=4)"
    )
