"""What of transformers' continuous batching is overridden or called, though it is not public, is as it was."""

import inspect

from transformers.generation.continuous_batching import continuous_api, model_runner
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

OVERRIDDEN = {
    "_generation_loop_body": ["self", "batch_processor", "bootstrapping"],
    "_create_batch_processor": ["self"],
    "_fail_all_remaining_requests": ["self", "error", "batch_processor"],
    "_generation_step": ["self"],
}


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_the_seam_is_there():
    manager = continuous_api.ContinuousBatchingManager
    assert {name: parameters(getattr(manager, name)) for name in OVERRIDDEN} == OVERRIDDEN
    assert "_wake_up_loop" in inspect.getsource(manager.__init__)
    assert "self.distributed_helper" in inspect.getsource(manager.__init__)
    assert parameters(model_runner.ModelRunner._sample) == ["self", "scores", "output_ids"]
    assert parameters(DistributedHelper.tp_all_reduce_state)[1:] == ["payload_size", "stop_status", "pause_requested"]
    state = vars(RequestState(request_id="", initial_tokens=[]))
    assert {"_true_initial_tokens", "generated_tokens", "initial_tokens"} <= set(state)


def test_every_round_begins_with_one_agreement():
    source = inspect.getsource(continuous_api.ContinuousBatchProcessor._update_tp_group_state)
    assert source.count("tp_all_reduce_state(") == 1
    prepare = inspect.getsource(continuous_api.ContinuousBatchProcessor.prepare_next_batch)
    assert prepare.index("_update_tp_group_state") < prepare.index("schedule_batch")
