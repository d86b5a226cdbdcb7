import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from ray_ep.bench.contenders import Work
from ray_ep.bench.device import Ceilings, flops, gemms, least_bytes, measure_ceilings, run_on_device
from ray_ep.cli import main

RAY_EP = Path(sys.executable).with_name("ray-ep")


def bench(*args):
    return subprocess.run([RAY_EP, "bench", "layer", *args], capture_output=True, text=True, timeout=120, check=False)


def refused(*args):
    done = CliRunner().invoke(main, ["bench", "layer", *args])
    assert done.exit_code == 2
    return done.stderr


@pytest.mark.slow
def test_a_row_has_both_contenders_speed_their_ratio_and_what_bounds_ours():
    done = bench(
        "--work=C", "--dtype=bfloat16", "--pass=both", "--malloc=tuned", "--rounds=2", "--peers=transformers", "--json"
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    speed = row["tokens_per_second"]
    assert row["case"] == {
        "work": "C",
        "dtype": "bfloat16",
        "backward": True,
        "ranks": 2,
        "malloc": "tuned",
        "rounds": 2,
    }
    assert speed.keys() == {"ray_ep", "transformers"}
    assert row["ratio"] == pytest.approx(speed["ray_ep"] / speed["transformers"])
    assert 0 < row["share"] < 1.5
    assert set(row["phases"]) == {"route", "pack", "exchange", "experts", "combine"}
    assert 0.3 < sum(row["phases"].values()) < 1.05
    # 16 tokens a rank, top-2 of 16: at most every token once to the other rank, 512 wide, there and back, both passes.
    assert 0 < row["bytes_sent"] <= 2 * 16 * (4 * 512 * 2 + 1 + 2 * (6 + 4))


@pytest.mark.slow
def test_our_layer_can_be_measured_alone():
    done = bench("--work=C", "--dtype=float32", "--pass=forward", "--malloc=tuned", "--rounds=2", "--peers=", "--json")
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    assert row["tokens_per_second"].keys() == {"ray_ep"}
    assert row["ratio"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_the_bench_on_it_is_refused_with_words():
    said = refused("--work=C", "--device=cuda")
    assert "no GPU can be used here" in said
    assert len(said.splitlines()) < 4


@pytest.mark.parametrize("wrong", ["--ranks=2", "--routing=zipf", "--peers=transformers", "--memory"])
def test_what_has_no_meaning_for_the_one_gpu_is_refused(wrong):
    assert "--ranks=1; no --routing, --peers, --memory" in refused("--work=C", "--device=cuda", wrong)


def test_the_roofline_computes_the_works_products_alike_one_by_one_batched_and_grouped():
    work = Work(tokens=64, hidden=32, ffn=16, experts=4, top_k=2)
    results = [[t.clone() for t in step()] for step in gemms(work, torch.float32, torch.device("cpu")).values()]
    assert [t.shape for t in results[0]] == [(4, 32, 32), (4, 32, 32)]
    assert len(results) == 3
    for same in zip(*results, strict=True):
        for other in same[1:]:
            torch.testing.assert_close(other, same[0])


def test_a_work_on_a_device_is_measured_as_shares_of_what_the_device_can_do():
    cpu = torch.device("cpu")
    ceilings = measure_ceilings("float32", cpu, side=256, copied=1 << 22)
    assert 1e8 < ceilings.flops_per_second < 1e14
    assert 1e7 < ceilings.bytes_per_second < 1e13
    row = run_on_device("C", "float32", True, 2, Ceilings(1e12, 1e11), cpu).to_dict()
    pairs, weights = 16 * 2, 16 * 3 * 512 * 1024
    assert row["share_of_flops"] == pytest.approx(3 * 2 * 3 * pairs * 512 * 1024 / 1e12 / row["seconds"])
    assert row["share_of_bytes"] == pytest.approx(3 * 4 * (weights + 2 * 16 * 512) / 1e11 / row["seconds"])
    assert row["share_of_gemms"] == pytest.approx(row["gemm_seconds"] / row["seconds"])
    assert row["tokens_per_second"] == pytest.approx(16 / row["seconds"])
    assert min(row[f"{kind}_seconds"] for kind in ("plain", "general", "gemm")) > 0


def test_flops_and_bytes_of_a_forward_are_a_third_of_both():
    work = Work(tokens=3, hidden=5, ffn=7, experts=2, top_k=2)
    assert flops(work, False) == 3 * 2 * (2 * 5 * 14 + 2 * 7 * 5)
    assert least_bytes(work, 2, False) == 2 * (2 * (5 * 14 + 7 * 5) + 3 * 5 + 3 * 5)
    assert flops(work, True) == 3 * flops(work, False)
    assert least_bytes(work, 2, True) == 3 * least_bytes(work, 2, False)


@pytest.mark.parametrize("wrong", ["--work=D", "--dtype=float16", "--pass=backward", "--ranks=two", "--peers=megatron"])
def test_a_word_that_is_not_allowed_is_named_with_what_is(wrong):
    said = refused(wrong)
    assert wrong.partition("=")[2] in said
    assert len(said.splitlines()) < 6
