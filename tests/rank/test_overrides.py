"""model.overrides: a transformers config class's own fields say how text is read."""

import pytest

from ray_ep.config import load_config
from ray_ep.errors import ModelError
from ray_ep.rank.model import model_config

SMALL = "model.overrides={hidden_size: 32, num_hidden_layers: 2, num_experts: 4}"


def config(*overrides):
    return model_config(load_config(None, [SMALL, *overrides]).model, 256)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("rms_norm_eps=1e-6", 1e-6),
        ("rms_norm_eps=1e-05", 1e-5),
        ("initializer_range=1", 1.0),
        ("attention_dropout=.1", 0.1),
        ("attention_dropout=0", 0),
        ("num_experts_per_tok=1e0", 1),
        ("num_experts_per_tok=0_2", 2),
        ("norm_topk_prob=yes", True),
        ("norm_topk_prob=off", False),
        ("norm_topk_prob=1", True),
        ("sliding_window=None", None),
        ("sliding_window=null", None),
        ("mlp_only_layers=[0]", [0]),
        ("mlp_only_layers=[]", []),
        ("eos_token_id=[1, 2]", [1, 2]),
        ("hidden_act=gelu", "gelu"),
        ("hidden_act='gelu'", "gelu"),
        ("dtype=bfloat16", "bfloat16"),
    ],
)
def test_a_field_gets_a_value_of_its_own_type(override, value):
    name, _, text = override.partition("=")
    for given in (f"model.overrides.{override}", f"model.overrides={{{name}: {text}}}"):
        found = getattr(config(given), name)
        found = str(found).removeprefix("torch.") if name == "dtype" else found
        assert (found, type(found)) == (value, type(value))


def test_mappings_reach_the_class_as_plain_ones_with_their_numbers():
    found = config("model.overrides={rope_parameters: {rope_type: linear, rope_theta: 1e6, factor: 2}}").rope_parameters
    assert found["rope_theta"] == 1e6
    assert (type(found), type(found["rope_theta"]), found["rope_type"]) == (dict, float, "linear")


@pytest.mark.parametrize(
    "kind", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "olmoe", "granitemoe", "nemotron_h"]
)
def test_every_class_takes_its_own_defaults_as_text(kind):
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from ray_ep.rank.overrides import typed

    defaults = {k: v for k, v in CONFIG_MAPPING[kind]().to_dict().items() if isinstance(v, (bool, int, float, str))}
    read = typed(CONFIG_MAPPING[kind], {k: str(v) for k, v in defaults.items()})
    assert {k: v for k, v in read.items() if v not in (defaults[k], None)} == {}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("num_experts_per_tok=1.5", "model.overrides.num_experts_per_tok=1.5: expected int"),
        ("rms_norm_eps=small", "model.overrides.rms_norm_eps='small': expected float"),
        ("norm_topk_prob=perhaps", "model.overrides.norm_topk_prob='perhaps': expected bool"),
        ("mlp_only_layers=[a]", "model.overrides.mlp_only_layers=['a']: expected int"),
    ],
)
def test_what_a_field_does_not_take_is_named(override, says):
    with pytest.raises(ModelError) as e:
        config(f"model.overrides.{override}")
    assert says in str(e.value)
