"""What cannot run is refused in words, before weights are read where transformers lets us."""

import subprocess
import sys

import pytest

from ray_ep.errors import BadInput, ModelError
from tests.hf.loaded import hf, load, saved


def test_an_unknown_balance_names_the_known_ones():
    with pytest.raises(BadInput, match="balance='sometimes': allowed are off, auto, always"):
        hf.register("another", balance="sometimes")


def words_of(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value).__name__, str(caught.value)


def refused(rank, path, dense, odd):
    experts = "model.layers.*.mlp.experts"
    return {
        "a weight that is not shared out": words_of(
            lambda: load(path, fsdp_size=2, ep_plan={f"{experts}.gate_up_proj": "replicate"})
        ),
        "an unknown name": words_of(lambda: load(path, "ray-ep")),
        "other ranks than there are": words_of(lambda: load(path, fsdp_size=4, ep_size=4)),
        "a size that does not divide": words_of(lambda: load(path, fsdp_size=2, ep_size=3)),
        "experts that do not divide": words_of(lambda: load(odd)),
        "no experts": words_of(lambda: load(dense)),
    }


def test_what_does_not_fit_is_refused_in_words(two, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.models import BASE, build

    build("mixtral", num_local_experts=5).save_pretrained(tmp_path / "odd")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **BASE))
    dense.save_pretrained(tmp_path / "dense")
    paths = saved(tmp_path, "qwen3_moe")[1], str(tmp_path / "dense"), str(tmp_path / "odd")
    first, second = two(refused, *paths)
    assert first == second
    kind, words = first["a weight that is not shared out"]
    assert kind == "ModelError"
    assert "gate_up_proj is not shared out by experts: its rule in ep_plan must be 'grouped_gemm'" in words
    assert "'ray_ep'" in first["an unknown name"][1]  # transformers lists what is registered
    assert "requires 4 processes, but world_size is 2" in first["other ranks than there are"][1]
    assert "`ep_size` must divide `fsdp_size * tp_size`" in first["a size that does not divide"][1]
    assert "Cannot evenly shard 5 experts across 2" in first["experts that do not divide"][1]
    assert "has no `ep_plan`" in first["no experts"][1]


@pytest.mark.slow
def test_without_a_job_transformers_says_that_there_is_no_process_group(tmp_path):
    code = (
        "import ray_ep.hf; from transformers import AutoModelForCausalLM; from transformers.distributed import "
        "DistributedConfig; config = DistributedConfig(fsdp_size=2, ep_size=2, ep_implementation='ray_ep'); "
        f"AutoModelForCausalLM.from_pretrained({saved(tmp_path, 'qwen3_moe')[1]!r}, distributed_config=config)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode != 0
    assert "tried to initialize torch.distributed for you, but it failed" in done.stderr


def test_a_transformers_without_the_interface_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.distributed.expert_parallel", None)
    for name in [m for m in sys.modules if m.startswith("ray_ep.hf")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModelError, match=r"ray_ep.hf needs transformers 5.23.*: [\d.]+ has none"):
        __import__("ray_ep.hf")
