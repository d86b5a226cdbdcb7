"""The steps that the state of a run keeps: which ones of very many, and those of a run that went back."""

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from ray_ep.observe.state import RunState
from ray_ep.observe.state.steps import NEWEST, Steps


def test_of_a_long_run_the_newest_steps_are_whole_and_older_ones_evenly_spread(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": s, "loss": s / 2}) + "\n" for s in range(1, 10_001)))
    steps = RunState(tmp_path).snapshot("steps")["steps"]
    assert len(steps["step"]) <= 2 * NEWEST + 1
    assert steps["step"][-NEWEST:] == list(range(9_001, 10_001))
    assert steps["step"][:3] == [1, 16, 32]
    assert steps["stride"] == 16
    assert steps["columns"]["loss"] == [s / 2 for s in steps["step"]]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 400), st.integers(0, 60)), max_size=12), st.data())
def test_whenever_they_are_read_steps_are_those_up_to_the_last_line_however_often_a_run_went_back(spans, data):
    lines, newest = [], 0
    for more, back in spans:
        newest = max(newest - back, 0)
        lines += [b'{"step": %d, "loss": %d.0}' % (newest + n, len(lines) + n) for n in range(1, more + 1)]
        newest += more
    whole, parts = Steps(), Steps()
    whole.add(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(lines)), max_size=4)))
    for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        parts.add(lines[start:end])
    assert parts.snapshot() == whole.snapshot()
    last = {json.loads(line)["step"]: json.loads(line) for line in lines}
    assert whole.rows == [last[row["step"]] for row in whole.rows]
    assert [row["step"] for row in whole.rows][-1:] == [newest] * bool(newest)
    assert len(whole.rows) <= 2 * NEWEST + 1


def test_a_reader_goes_on_with_the_steps_that_it_has_unless_some_were_made_again(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def write(*steps):
        with path.open("a") as file:
            file.writelines(json.dumps({"step": s, "loss": float(s)}) + "\n" for s in steps)
        state.refresh()

    state = RunState(tmp_path)
    write(1, 2, 3)
    first = state.snapshot("steps")["steps"]
    assert (first["step"], first["after"]) == ([1, 2, 3], None)
    write(4, 5)
    second = state.snapshot("steps", mark=first["mark"])["steps"]
    assert (second["step"], second["columns"]["loss"], second["after"]) == ([4, 5], [4.0, 5.0], 3)
    assert state.snapshot("steps", mark=second["mark"])["steps"]["step"] == []
    write(4)
    third = state.snapshot("steps", mark=second["mark"])["steps"]
    assert (third["step"], third["after"]) == ([1, 2, 3, 4], None), "5 is to be made again, too"
    write(5)
    assert state.snapshot("steps", mark=third["mark"])["steps"]["step"] == [5]
    assert state.snapshot("steps", mark="nonsense")["steps"]["step"] == [1, 2, 3, 4, 5]
