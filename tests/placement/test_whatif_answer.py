"""The sentence that answers how many GPUs of which kind."""

from dataclasses import replace

import pytest

from ray_ep.errors import PlacementError
from ray_ep.placement.whatif.answer import Option, answer
from ray_ep.placement.whatif.gpus import GPUS, Gpu, gpu
from ray_ep.placement.whatif.simulate import Cluster, simulate, synthetic

(ROW,) = simulate(Cluster(1, 2, 2), synthetic(1, 4, 2, tokens=64), ["contiguous"])


def option(nodes, tokens, kind=None, memory=1e9):
    cluster = replace(ROW.cluster, nodes=nodes)
    return Option(kind, replace(ROW, cluster=cluster, tokens_per_second=tokens, memory_bytes=memory))


def test_growth_is_judged_by_what_an_added_gpu_brings():
    assert answer([option(1, 100)]) == (
        "Best is 1 node (2 ranks) with 2 slots a rank, placed by contiguous: most tokens a GPU, 50/s."
    )
    words = answer([option(4, 270), option(1, 100), option(2, 180)])  # 40 then 22.5 a GPU added, after 50 and 45
    assert "fastest is 4 nodes (8 ranks)" in words
    assert words.endswith("adding GPUs pays up to 8, the largest that was tried.")
    words = answer([option(1, 100), option(2, 180), option(4, 220)])
    assert words.endswith("more than 4 GPUs do not pay: up to 8, each added brings 22% of what one brought before.")
    assert answer([option(1, 100), option(2, 90)]).endswith("up to 4, each added brings nothing.")


def test_the_best_slots_of_each_size_count_and_other_kinds_do_not():
    fast, small = Gpu("fast"), Gpu("small")
    words = answer([option(1, 100, fast), option(2, 20, fast), option(2, 190, fast), option(4, 60, small)])
    assert "adding GPUs pays up to 4" in words


def test_a_price_decides_where_all_have_one():
    dear, cheap = Gpu("dear", price=10), Gpu("cheap", price=1)
    assert "(2 cheap)" in answer([option(1, 100, dear), option(1, 50, cheap)]).split(";")[0]
    assert "(2 dear)" in answer([option(1, 100, dear), option(1, 50, Gpu("free"))]).split(";")[0]


def test_what_does_not_fit_is_not_recommended():
    small = Gpu("small", memory_gb=0.5)
    assert "(2 small)" not in answer([option(1, 100, small), option(1, 50)])
    assert answer([option(1, 100, small)]).startswith("Nothing fits: the experts of 1 node (2 small)")


def test_kinds_are_read():
    assert gpu("H100") == GPUS["h100"]
    assert gpu("h100:price=3.5") == replace(GPUS["h100"], price=3.5)
    assert gpu("own: speed=0.4, inside=64 GB/s, memory_gb=24") == Gpu("own", 0.4, 64e9, 24)


@pytest.mark.parametrize("text", ["", "own", "own:", "own:name=x", "own:speed=nan", "h100:inside=0"])
def test_bad_kinds_are_named(text):
    with pytest.raises(PlacementError, match="gpu"):
        gpu(text)
