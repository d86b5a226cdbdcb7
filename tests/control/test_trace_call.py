"""The call Trace on a run that has records: the tokens of a step, and the path of one of them."""

import pytest

from ray_ep.config.sections.observing import ProvenanceConfig
from ray_ep.control.v1 import control_pb2 as pb
from ray_ep.errors import BadInput
from ray_ep.observe.provenance.files import ProvenanceFiles
from ray_ep.rank.data.tokenizer import load_decoder
from tests.control.scene import served
from tests.records import provenance, record

TEXT = "To be, or not to be, that is the question: whether 'tis nobler."


@pytest.fixture(scope="module")
def it(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    with served(path) as run:
        files = ProvenanceFiles(path, ProvenanceConfig(sample="0.1"), lambda: load_decoder("bytes"), lambda event: None)
        files.step(record(7, provenance=provenance(TEXT, (3, 20))))
        files.close()
        yield run


def test_a_token_is_traced_through_the_layers_with_the_reason_for_each_experts_place(it):
    there = it.call(pb.TraceRequest(step=7))
    assert [t.position for t in there.tokens] == [3, 20]
    assert not there.hops
    path = it.call(pb.TraceRequest(step=7, position=20))
    assert [t.text for t in path.tokens] == [TEXT[20]]
    assert [(h.layer, h.choice) for h in path.hops] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    first = path.hops[0]
    assert (first.expert, first.weight, first.kind, first.host) == (0, 0.75, "primary", "host0")
    assert first.why.startswith("placement 0, after step 0: ")
    assert (path.placement_version, path.epoch) == (3, 1)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (pb.TraceRequest(), "expected a step or a request_id"),
        (pb.TraceRequest(step=8), "step 8: no token of it was recorded"),
        (pb.TraceRequest(step=2**64 - 1), "no token of it was recorded"),
        (pb.TraceRequest(request_id="r"), "request 'r': no token of it was recorded"),
        (pb.TraceRequest(step=7, position=4), "position=4: that token was not recorded; 2 others were"),
        (pb.TraceRequest(step=7, position=2**64 - 1), "that token was not recorded"),
    ],
)
def test_what_was_not_recorded_is_said(it, request_, says):
    with pytest.raises(BadInput, match=says):
        it.call(request_)
