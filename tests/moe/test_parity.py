"""Every architecture, on 1 to 4 ranks, any placement: logits and all gradients equal to plain transformers."""

import pytest
import torch

from tests.conftest import slow
from tests.models import MODELS, VOCAB, build, even_shards, logits_differ, parallel_pass, placement_of, reference

PLACEMENTS = ["contiguous", "shuffled", "replicated", "uneven", "empty_rank"]


def assert_equal_to_reference(ranks, model, ids, size, kind, shards=None, tolerance=1e-5, before=None):
    loss, logits, grads = reference(model, ids)
    placement = placement_of(model, kind, size)
    shards = shards or even_shards(len(ids), size)
    results = ranks(size, lambda g: parallel_pass(model, ids, g, placement, shards, before))
    assert all(layer.calls for m, *_ in results for layer in m.ray_ep.layers)
    got = torch.cat([r[2] for r in results])
    assert logits_differ(got, logits) <= tolerance
    for _, total, _, got_grads in results:
        assert abs(total - loss) <= tolerance
        assert got_grads.keys() == {n for n in grads if n in got_grads}
        for n, g in grads.items():
            worst = (got_grads[n] - (g if g is not None else 0)).abs().max()
            assert worst <= tolerance, f"{n}: {worst}"
    return results


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("size", [3, *slow(1, 2, 4)])
def test_logits_and_every_gradient_equal_single_process_on_every_placement(ranks, name, size):
    model = build(name)
    ids = torch.randint(3, VOCAB, (5, 9), generator=torch.Generator().manual_seed(1))
    for kind in PLACEMENTS:
        assert_equal_to_reference(ranks, model, ids, size, kind)
