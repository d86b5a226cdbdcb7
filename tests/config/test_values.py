"""A key's own type decides how its text is read, on the command line as in a file."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from ray_ep.config import from_dict, load_config
from ray_ep.errors import ConfigError

AS_TYPED = [
    "2026_11_28", "2026-11-28", "007", "1e5", "0x10", "1_000", "12:30:45", "yes", "no", "on", "null", "~", "true",
    ".inf", "*", "*x", "&x", "@x", "%x", "!x", "{x}", "[x", "'x'", '"x"', "a: b", "a #b", " a ", "-", "? x", "<<", "",
]  # fmt: skip


def one(override, key):
    return OmegaConf.select(load_config(None, [override]), key)


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_taken_as_it_was_typed(text):
    assert one(f"data.text_field={text}", "data.text_field") == text


@pytest.mark.parametrize("text", ["2026_11_28", "007", "1e5", "*x", "2026-11-28"])
def test_a_run_directory_is_called_what_was_typed(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one(f"run_dir={text}", "run_dir") == f"{tmp_path}/{text}"


@pytest.mark.parametrize("text", ["2026_11_28", "2026-11-28", "007", "1e5", "yes", "on", "12:30", "1.50", "true"])
def test_text_in_a_file_is_taken_as_it_is_written(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"data:\n  text_field: {text}\n  dataset_split: '{text}'\n")
    data = load_config(tmp_path / "c.yaml").data
    assert (data.text_field, data.dataset_split) == (text, text)


@given(st.text())
@settings(max_examples=15, deadline=None)
def test_any_text_survives_the_command_line_the_ranks_and_the_run_directory(tmp_path_factory, text):
    if "${" in text or text == "???":
        return
    cfg = load_config(None, [f"data.text_field={text}", "data.dataset_split=x"])
    assert cfg.data.text_field == text
    assert from_dict(OmegaConf.to_container(cfg)) == cfg
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    assert load_config(file) == cfg


@given(st.dictionaries(st.text(st.characters(categories=["L"]), min_size=1), st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text().filter(lambda t: "${" not in t and t != "???"),
    lambda inner: st.lists(inner, max_size=3), max_leaves=6,
), max_size=3))  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_whatever_an_open_mapping_holds_survives_the_run_directory(tmp_path_factory, tree):
    cfg = from_dict({"model": {"type": "other", "overrides": tree}})
    assert OmegaConf.to_container(cfg.model.overrides) == tree
    file = tmp_path_factory.getbasetemp() / "mapping.yaml"
    file.write_text(OmegaConf.to_yaml(cfg), encoding="utf-8")
    assert load_config(file) == cfg


@pytest.mark.parametrize(
    ("text", "elements"),
    [
        ("*.jsonl", ["*.jsonl"]),
        ("[*.jsonl, 007, yes]", ["*.jsonl", "007", "yes"]),
        ("['a, b', \"c\", 'it''s, so']", ["a, b", "c", "it's, so"]),
        ("[ab]*.txt", ["[ab]*.txt"]),
        ("[x[0,1].txt, {a,b}.txt,]", ["x[0,1].txt", "{a,b}.txt"]),
        ("[{a, b]", ["{a", "b"]),
        ("a, b", ["a, b"]),
        ("[]", []),
        ("", []),
    ],
)
def test_a_list_has_its_elements_as_typed_and_bare_text_is_one(text, elements, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert one(f"data.files={text}", "data.files") == [f"{tmp_path}/{e}" for e in elements]


@pytest.mark.parametrize(("text", "value"), [("1000", 1000), ("1e3", 1000), ("1_000", 1000), ("10.0", 10), ("+7", 7)])
def test_whole_numbers(text, value):
    assert one(f"optim.steps={text}", "optim.steps") == value


@pytest.mark.parametrize(("text", "value"), [("1e-6", 1e-6), ("1E-6", 1e-6), (".5", 0.5), ("2", 2.0), ("5.", 5.0)])
def test_numbers(text, value):
    assert one(f"optim.eps={text}", "optim.eps") == value
    assert isinstance(one(f"optim.eps={text}", "optim.eps"), float)


@pytest.mark.parametrize("key", ["optim.learning_rate", "router.aux_coefficient", "cluster.wait_s", "balance.most"])
@pytest.mark.parametrize("text", ["1e400", "-1e400", "inf", "nan", ".inf", "-.inf", ".NaN", "Infinity"])
def test_no_key_takes_a_number_that_is_not_finite(key, text, tmp_path):
    (tmp_path / "c.yaml").write_text("{}: {{{}: {}}}\n".format(*key.split("."), text))
    for arguments in ((None, [f"{key}={text}"]), (tmp_path / "c.yaml", [])):
        with pytest.raises(ConfigError, match="must be a finite number") as e:
            load_config(*arguments)
        assert f"{key}='{text}'" in str(e.value)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("optim.steps=1.5", "expected int, a whole number, such as 200"),
        ("optim.steps=0x10", "expected int in decimal digits"),
        ("optim.steps=1:30", "expected int in decimal digits"),
        ("optim.steps=true", "expected int in decimal digits"),
        ("optim.steps=99999999999999999999", "more than 64 bits hold"),
        ("optim.steps=1e999999999", "more than 64 bits hold"),
        ("optim.steps=inf", "must be a finite number"),
        ("optim.eps=1e-400", "too small for a float"),
        ("optim.eps=1,5", "expected float"),
        ("topology.measure=maybe", "expected bool: true or false"),
        ("model.overrides.rms_norm_eps=1e400", "must be a finite number"),
        ("model.overrides={rope_parameters: {rope_theta: .inf}}", "must be a finite number"),
        ("model.overrides={a: 1, a: 2}", "'a' twice"),
        ("run_dir=${HOME}/x", "is not replaced here"),
        ("data.files=[a, '${x}']", "is not replaced here"),
        ("data.text_field=???", "stands for a value that is missing"),
        ("data.files=[a,,b]", "nothing between two commas"),
        ("data.files=['a, b]", "a quote that nothing closes"),
        ("resume=", "resume='': allowed are no, auto"),
    ],
)
def test_what_a_type_does_not_take_is_refused_with_key_and_reason(override, says):
    with pytest.raises(ConfigError) as e:
        load_config(None, [override])
    assert says in str(e.value)
    assert override.partition("=")[0].partition(".rms")[0] in str(e.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("optim: {steps: 3}\noptim: {steps: 4}\n", "has 'optim' twice, again in line 2"),
        ("optim:\n  steps: 3\n  steps: 4\n", "has 'steps' twice, again in line 3"),
        ("optim.steps: 3\noptim: {steps: 4}\n", "has optim.steps twice"),
        ("data: {files: [*.jsonl]}\n", "needs quotes there"),
        ("data: {files: [@x]}\n", "needs quotes there"),
        ("run_dir: !!python/name:os.system x\n", "only plain values are read"),
        ("run_dir: null\n", "expected text: '' for none"),
        ("a: &a [*a]\n", "is not YAML"),
        ("a: [b\n", "c.yaml is not YAML: line 2, column 1: expected ',' or ']', but got '<stream end>'"),
        ("- a\n- b\n", "expected keys and values, found a list"),
        ("optim.steps = 3\n", "expected keys and values, found text without a colon"),
        ("optim:\n\tsteps: 3\n", "is not YAML (lines are indented with spaces, not with tabs)"),
    ],
)
def test_a_file_that_says_two_things_or_none_is_refused(text, says, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as e:
        load_config(tmp_path / "c.yaml")
    assert says in str(e.value)
    assert "c.yaml" in str(e.value)
    assert len(str(e.value).splitlines()) == 1


def test_sections_and_values_without_text_are_empty(tmp_path):
    (tmp_path / "c.yaml").write_text("optim:\n  # steps: 3\ndata:\n  files:\nrun_dir:\nmodel: {overrides: }\n")
    assert load_config(tmp_path / "c.yaml") == load_config()


def test_anchors_and_merge_keys_of_a_file_are_read(tmp_path):
    (tmp_path / "c.yaml").write_text("optim: &o {beta1: 0.5, beta2: 0.6}\nmodel: {overrides: {<<: *o, beta1: 1}}\n")
    cfg = load_config(tmp_path / "c.yaml")
    assert (cfg.optim.beta2, cfg.model.overrides.beta1, cfg.model.overrides.beta2) == (0.6, 1, 0.6)
    assert yaml.safe_load(OmegaConf.to_yaml(cfg))["model"]["overrides"]["beta2"] == 0.6
