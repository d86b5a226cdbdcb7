"""A model that transformers loads with ray_ep's layer computes what plain transformers does in one process."""

import pytest
import torch

import ray_ep
from tests.conftest import slow
from tests.hf.loaded import IDS, assert_equals_one_process, gradients, hf, load, mean_loss, rows_of, saved, whole
from tests.models import build, reference


def parity(rank, path, name, sizes, ranks):
    same_batch = "tp_size" in sizes
    ep = assert_equals_one_process(
        build(name), load(path, **sizes), slice(None) if same_batch else rows_of(rank, ranks)
    )  # fmt: skip
    assert [layer.calls for layer in ep.layers] == [1] * len(ep.layers)
    return int(ep.pass_load().sum())


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", *slow("nemotron_h", "olmoe")])
def test_logits_and_gradients_equal_one_process(two, tmp_path, name):
    plain, path = saved(tmp_path, name)
    layers = len(ray_ep.moe.find_experts(plain))
    top_k = plain.config.num_experts_per_tok
    assert sum(two(parity, path, name, {}, 2)) == layers * top_k * IDS.numel()


def test_ranks_that_share_a_batch_compute_each_token_once(two, tmp_path):
    plain, path = saved(tmp_path, "qwen3_moe")
    loads = two(parity, path, "qwen3_moe", {"tp_size": 2}, 2)
    assert sum(loads) == 2 * plain.config.num_experts_per_tok * IDS.numel()
    assert min(loads) > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp_size": 4, "ep_size": 2}, {"fsdp_size": 4}], ids=["two_meshes", "one_mesh"])
def test_four_ranks_equal_one_process_with_experts_kept_whole_or_shared_out(four, tmp_path, sizes):
    _, path = saved(tmp_path, "qwen3_moe")
    four(parity, path, "qwen3_moe", sizes, 4)


def uneven(rank, path):
    """Rank 0 has 3 x 9 tokens, rank 1 has 1 x 4; FSDP takes the mean of the ranks' gradients."""
    plain, model = build("qwen3_moe"), load(path)
    parts = [IDS[:3], IDS[3:, :4]]
    (loss, logits, _), grads = reference(plain, parts[rank]), [reference(plain, part)[2] for part in parts]
    got_loss, got = mean_loss(model, parts[rank])
    got_loss.backward()
    assert abs(got_loss - loss) < 1e-5
    assert (got - logits).abs().max() < 1e-5
    for name, gradient in gradients(model).items():
        assert (gradient - (grads[0][name] + grads[1][name]) / 2).abs().max() < 1e-5, name


def test_ranks_with_different_numbers_of_tokens_equal_one_process(two, tmp_path):
    two(uneven, saved(tmp_path, "qwen3_moe")[1])


def one_idle(rank, path, again):
    plain, model = build("qwen3_moe"), load(path)
    ep = hf.experts_of(model)
    if again:
        model.gradient_checkpointing_enable()
        model.train()
    _, _, grads = reference(plain, IDS)
    for _ in range(3):  # rows that are never written would show in the second step
        model.zero_grad()
        if rank == 0:
            mean_loss(model, IDS)[0].backward()
        else:
            with ep.idle():
                (mean_loss(model, IDS[:1, :2])[0] * 0).backward()
        for name, gradient in gradients(model).items():
            assert (2 * gradient - grads[name]).abs().max() < 1e-5, name
    return int(ep.pass_load().sum())


@pytest.mark.parametrize("again", [False, *slow(True)], ids=["kept", "recomputed"])
def test_a_rank_without_tokens_takes_part_and_adds_nothing(two, tmp_path, again):
    loads = two(one_idle, saved(tmp_path, "qwen3_moe")[1], again)
    assert loads == [2 * 3 * IDS.numel(), 0]


def skewed():
    """A model whose tokens mostly want experts of the first rank."""
    plain = build("qwen3_moe")
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.gate.weight[4:] *= 0.1
    return plain


def balanced(rank, path):
    model = load(path, hf.register("always", balance="always"))
    ep = hf.experts_of(model)
    ep.balancer.assume(1e-3, 1e9)  # a token costs so much that moving it always pays
    assert_equals_one_process(skewed(), model, rows_of(rank))
    done = ep.balancer.done
    return done.guests, done.before / done.layers, done.after / done.layers


def test_balance_inside_the_step_moves_tokens_and_changes_nothing_else(two, tmp_path):
    skewed().save_pretrained(tmp_path)
    for guests, before, after in two(balanced, str(tmp_path)):
        assert guests > 0
        assert after < before


def in_bfloat16(rank, path):
    """As far from one process as one process with transformers' other experts function is."""
    plain, model = build("qwen3_moe", dtype=torch.bfloat16), load(path)
    with torch.no_grad():
        want = plain(input_ids=IDS).logits[rows_of(rank)].float()
        got = model(input_ids=IDS[rows_of(rank)]).logits.float()
    loss, _ = mean_loss(model, IDS[rows_of(rank)])
    loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert model.dtype == torch.bfloat16
    return float((got - want).norm() / want.norm())


def test_a_bfloat16_model_stays_near_one_process(two, tmp_path):
    assert max(two(in_bfloat16, saved(tmp_path, "qwen3_moe", torch.bfloat16)[1])) < 0.05


def under_autocast(rank, path):
    """The first layer's experts, as they are and inside an autocast region."""
    model = load(path)
    experts, ids = model.model.layers[0].mlp.experts, IDS[rows_of(rank)]
    with torch.no_grad():
        model(input_ids=ids)
        work = torch.randn(5, 32), torch.arange(10).view(5, 2) % 6, torch.rand(5, 2)
        plain = experts(*work)
        with torch.autocast("cpu", torch.bfloat16):
            same, rounded = experts(*work), experts(work[0].bfloat16(), *work[1:]).float()
        return torch.equal(same, plain), float((rounded - plain).norm() / plain.norm())


@pytest.mark.parametrize("name", ["gpt_oss", *slow("qwen3_moe")])
def test_autocast_does_not_reach_the_experts_whatever_it_makes_of_their_tokens(two, tmp_path, name):
    for same, rounded in two(under_autocast, saved(tmp_path, name)[1]):
        assert same
        assert 0 < rounded < 0.02


def two_models(rank, first, second):
    a, b = load(first), load(second)
    _, kept = mean_loss(a, IDS[rows_of(rank)])
    assert_equals_one_process(build("mixtral"), b, rows_of(rank))
    _, again = mean_loss(a, IDS[rows_of(rank)])
    assert torch.equal(kept, again)
    assert hf.experts_of(a) is not hf.experts_of(b)
    assert [hf.experts_of(m).num_experts for m in (a, b)] == [8, 6]


def test_two_models_in_one_job_keep_to_themselves(two, tmp_path):
    two(two_models, saved(tmp_path, "qwen3_moe")[1], saved(tmp_path, "mixtral")[1])


def prompts_differ(rank, path):
    """Also with packed weights; the ranks' prompts and answers have other lengths."""
    plain, model = build("qwen3_moe"), load(path)
    prompt = IDS[rank : rank + 1, : 3 + 4 * rank]
    choose = {"max_new_tokens": 5 + 3 * rank, "do_sample": False, "eos_token_id": None}
    want = plain.generate(prompt, **choose).tolist()
    again = model.generate(prompt, **choose).tolist() == want
    with hf.experts_of(model).inference():
        return again, model.generate(prompt, **choose).tolist() == want


def test_generate_with_other_lengths_on_each_rank_equals_one_process(two, tmp_path):
    assert two(prompts_differ, saved(tmp_path, "qwen3_moe")[1]) == [(True, True)] * 2


def checkpointed(rank, path, reentrant):
    plain, model = build("qwen3_moe"), load(path)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    ep = assert_equals_one_process(plain, model, rows_of(rank))
    return [layer.calls for layer in ep.layers]


@pytest.mark.parametrize("reentrant", [False, *slow(True)])
def test_gradient_checkpointing_gives_the_same_gradients(two, tmp_path, reentrant):
    assert two(checkpointed, saved(tmp_path, "qwen3_moe")[1], reentrant) == [[2, 2], [2, 2]]  # each block ran again


def whole_checkpoint(rank, path, into):
    model = load(path)
    model.save_pretrained(into)
    return sorted(whole(p).shape[0] for n, p in model.named_parameters() if ".experts." in n)


def test_save_pretrained_writes_the_whole_checkpoint(two, tmp_path):
    plain, path = saved(tmp_path, "qwen3_moe")
    assert two(whole_checkpoint, path, str(tmp_path / "out")) == [[8] * 4] * 2
    again = type(plain).from_pretrained(tmp_path / "out")
    assert "ray_ep" not in (tmp_path / "out" / "config.json").read_text()
    for (name, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name
