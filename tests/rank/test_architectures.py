"""Every architecture with experts that transformers has: loaded, compared, exported; or refused, with the reason."""

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ray_ep.config import load_config
from ray_ep.errors import ModelError
from ray_ep.rank.model import meta_model, model_config
from tests.architectures import attempt, decorated, documented, table, tried, without_language_model
from tests.conftest import slow

QUICK = ["gemma4", "llama4", "minimax_m3_vl_text", "qwen3_next"]
"""Kinds of attention and of configs that the models of tests/models.py have not."""


@pytest.mark.parametrize("kind", [*QUICK, *slow(*(k for k in tried() if k not in QUICK))])
def test_it_is_loaded_on_two_ranks_equals_one_process_and_is_exported_as_it_was(kind, tmp_path, ranks):
    row = attempt(kind, tmp_path, ranks)
    if f"With transformers {transformers.__version__}:" in documented():
        assert str(row) in documented().splitlines(), "run `python -m tests.architectures`"


@pytest.mark.parametrize("architecture", without_language_model())
def test_one_that_does_not_predict_tokens_is_refused_by_name(architecture):
    for kind in decorated()[architecture]:
        cfg = load_config(None, [f"model.type={kind}"]).model
        with pytest.raises(ModelError, match=CONFIG_MAPPING[kind].__name__):
            meta_model(model_config(cfg, 8))


def test_the_documented_table_has_them_all():
    if f"With transformers {transformers.__version__}:" not in documented():
        pytest.skip("the table is of another version of transformers")
    rows = [line for line in documented().splitlines() if line.startswith("| ")]
    assert len(rows) == len(tried()) + len(without_language_model()) + 2
    assert table(rows[1 : len(tried()) + 1]) == documented()
    assert len(decorated()) > 60
