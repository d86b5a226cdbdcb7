"""LLEP beside our layer: itself where RAY_EP_TEST_LLEP names a clone of it, and a slow reference with its interface."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner

from ray_ep.bench import llep
from ray_ep.bench.contenders import Work
from ray_ep.bench.layer import LayerCase, spawn
from ray_ep.bench.routing import route
from ray_ep.bench.skew import Beside, Skew, title
from ray_ep.cli import main
from ray_ep.collective import from_torch

RAY_EP = Path(sys.executable).with_name("ray-ep")
REAL = os.environ.get("RAY_EP_TEST_LLEP")
WORK = Work(tokens=512, hidden=32, ffn=16, experts=8, top_k=2)

UTILS = """
    MOE_ADAPTIVE_LPT_ROUTING_RATIO = None
    def set_ep_group(group): ...
    def set_moe_weight_transfer_group(group): ...
"""
FORWARD = """
    import torch
    from torch.distributed.nn.functional import all_gather

    def gptoss_llep_forward(x, index, dense, up, up_bias, down, down_bias, experts, held, group, limit, alpha, **_):
        up, up_bias, down, down_bias = (torch.cat(all_gather(p, group=group)) for p in (up, up_bias, down, down_bias))
        out = torch.zeros_like(x)
        for e in range(experts):
            both = x @ up[e] + up_bias[e]
            gate, linear = both[..., ::2].clamp(max=limit), both[..., 1::2].clamp(-limit, limit)
            y = ((linear + 1) * gate * torch.sigmoid(gate * alpha)) @ down[e] + down_bias[e]
            out = out + dense[:, e, None] * y
        return out
"""


@pytest.fixture(params=["reference", "llep"])
def folder(request, tmp_path):
    """A folder with a package `llep`."""
    if request.param == "llep":
        if REAL is None:
            pytest.skip(f"RAY_EP_TEST_LLEP names no clone of {llep.REPOSITORY}")
        return REAL
    package = tmp_path / "llep"
    package.mkdir()
    for name, text in {"__init__": "", "utils": UTILS, "gpt_oss_llep": FORWARD}.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    return str(tmp_path)


def bench(*args):
    return subprocess.run([RAY_EP, "bench", "layer", *args], capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["--routing=zipf", "--llep=/nowhere"], "--llep=/nowhere: no llep/utils.py there: expected a git clone"),
        (["--llep=/nowhere"], "--routing=zipf,80:4"),
        (["--brief"], "--brief: it leaves out what --routing=... would compare"),
        (["--routing=zipf", "--llep=/nowhere", "--device=cuda"], "--routing=zipf,80:4, no --device"),
    ],
)
def test_a_folder_without_llep_or_options_that_do_not_go_with_it_are_refused_before_anything_runs(args, word):
    done = CliRunner().invoke(main, ["bench", "layer", "--work=C", *args])
    assert done.exit_code == 2
    assert word in done.stderr
    assert not done.stdout
    assert len(done.stderr.splitlines()) < 4


def test_ranks_that_cannot_share_the_experts_evenly_are_refused(folder):
    fits = LayerCase("C", "float32", False, 4, "tuned", 1)
    llep.check_llep(folder, [fits])
    with pytest.raises(llep.BadInput, match="--ranks=3: work C has 16 experts"):
        llep.check_llep(folder, [fits, LayerCase("C", "float32", False, 3, "tuned", 1)])


def test_figures_of_llep_are_of_all_tokens_and_of_its_own_ideal_and_only_there_if_it_was_asked_for():
    case = LayerCase("A", "float32", True, 4, "tuned", 7)
    alone = Skew(case, "ragged", 90.0, 150.0, 0.6, 100.0, 0.9, 1.5, 1.0, 2.0, {})
    both = replace(alone, llep=Beside(ms=200.0, share=0.9, ratio=2.0, twin_ratio=1.25))
    assert "llep" not in alone.to_dict()
    assert both.to_dict()["llep"] == {
        "ms": 200.0,
        "tokens_per_second": pytest.approx(4 * 2048 / 0.2),
        "share": 0.9,
        "ratio": 2.0,
        "twin_ratio": 1.25,
    }
    assert both.line() == alone.line() + "    81,920    40,960   0.90   2.00   1.25"
    brief = replace(both, off_ms=None, off_share=None, llep=replace(both.llep, share=None, twin_ratio=None))
    assert brief.line().split()[6:8] == ["-", "-"]
    assert brief.line().split()[-3::2] == ["-", "-"]
    for row, llep_too in ((alone, False), (both, True), (brief, True)):
        assert len(row.line()) == len(title(llep_too).splitlines()[0])


@pytest.mark.slow
def test_a_row_has_llep_on_the_same_routing(folder):
    done = bench(
        "--work=C", "--dtype=float32", "--pass=both", "--malloc=tuned", "--rounds=1", "--routing=80:4", "--json",
        f"--llep={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,) = map(json.loads, done.stdout.splitlines())
    assert row["routing"] == "80:4"
    assert row["llep"]["tokens_per_second"] == pytest.approx(2 * 16 / row["llep"]["ms"] * 1e3)
    assert row["llep"]["ratio"] == pytest.approx(row["llep"]["ms"] / row["auto_ms"])
    assert row["llep"]["share"] > 0
    assert row["llep"]["twin_ratio"] > 0


def compute(rank, case, folder, store, queue):
    """Outputs and gradients of LLEP, of it without its balancer, and of our layer on its experts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=case.ranks)
    group = from_torch()
    layers = [*llep.peer(folder, WORK, group, torch.float32, True), llep.twin(WORK, group, torch.float32)]
    hidden = torch.randn(WORK.tokens, WORK.hidden, generator=torch.Generator().manual_seed(rank))
    index = route("80:4", WORK, rank, case.ranks, 0, 0)
    found = []
    for layer in layers:
        x, weights = hidden.clone().requires_grad_(), layer.weights(index).requires_grad_()
        out = layer.call(x, index, weights)
        out.square().sum().backward()
        of_weights = weights.grad if weights.grad.shape == index.shape else weights.grad.gather(1, index)
        grads = [p.grad for p in layer.parameters if p.grad is not None]  # our block has a router, which takes no part
        found.append([t.detach().clone() for t in (out, x.grad, of_weights, *grads)])
        for p in layer.parameters:
            p.grad = None
    worst = [max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(f, found[2], strict=True)) for f in found]
    worst = torch.tensor(worst)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    if rank == 0:
        queue.put((worst.tolist(), len(found[2])))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_llep_and_our_layer_on_its_experts_compute_the_same_outputs_and_gradients(folder):
    worst, tensors = spawn(LayerCase("A", "float32", True, 2, "default", 1), compute, folder)
    assert tensors == 7
    assert max(worst) < 1e-4
