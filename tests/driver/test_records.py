"""What records become as lines of metrics.jsonl and events.jsonl."""

import json
from math import inf, nan

from ray_ep.driver.records import Event
from tests.records import record


def strict(line):
    """As a parser reads it that takes JSON alone."""

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(json.dumps(line), parse_constant=refuse)


def test_figures_that_json_has_no_number_for_are_null_however_deep():
    event = Event("note", "words", {"loss": nan, "links": [{"now": inf, "before": 2.5}], "rank": 1})
    assert strict(event.line())["fields"] == {"loss": None, "links": [{"now": None, "before": 2.5}], "rank": 1}
    line = strict(record(1, loss=nan, max_expert_load=[1.5, inf], phase_seconds={"data": -inf}).line())
    assert (line["loss"], line["max_expert_load"], line["phase_seconds"]) == (None, [1.5, None], {"data": None})


def test_a_figure_that_was_not_measured_is_left_out():
    assert "eval_loss" not in record(1).line()
    assert record(1, eval_loss=2.5).line()["eval_loss"] == 2.5
