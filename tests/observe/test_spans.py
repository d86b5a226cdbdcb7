"""Spans of a run: how they nest and what they are linked to; sent by the real SDK to a real receiver, and in a file."""

import json
import threading
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from ray_ep.config import load_config
from ray_ep.driver.records import Event
from ray_ep.errors import BadInput
from ray_ep.observe.trackers import check_trackers, otel, trackers
from ray_ep.observe.trackers.spans import Spans, nanoseconds
from ray_ep.placement import Placement, contiguous
from tests.records import record

BEGAN = datetime(2026, 3, 30, 8, 0, 0, tzinfo=timezone.utc)
PHASES = {"data": 0.01, "forward": 0.03, "backward": 0.05, "driver": 0.01}
CLOCKS = {"detect": 0.02, "decide": 0.1, "regroup": 0.2, "restore": 0.3, "first_step": 0.4}
OTEL = load_config(None, ["tracking.to=[otel]"])


def at(seconds):
    return BEGAN + timedelta(seconds=seconds)


def step(number, **figures):
    return replace(record(number, phase_seconds=PHASES, **figures), at=at(number))


def said(kind, words, when, step, **fields):
    return Event(kind, words, fields, step, at(when))


START = said("start", "begins", 0, 0, model="qwen3_moe", ranks=2)
STORY = [
    step(1),
    step(2, rebalance_seconds=0.05, eval_loss=2.5, eval_seconds=0.2),
    said("rebalance", "move", 2.5, 2, asked_after=1, moves=True, placement_version=1, gain_predicted=0.5),
    said("state", "placement version 1", 2.6, 2, **{"from": "stepping", "to": "migrating"}),
    said("state", "back", 2.7, 2, **{"from": "migrating", "to": "stepping"}),
    step(3),
    said("rebalance", "measured", 3.5, 3, moved_after=2, gain_predicted=0.5, gain_measured=0.4),
    said("checkpoint", "x", 3.8, 3, url="x/step-3", seconds=0.2),
    said("recovered", "rank 1 died", 5, 3, lost=["rank-1"], done=1, repeated=2, seconds=CLOCKS, cause="rank 1 died"),
    step(2),
    said("failed", "rank 0 raised: boom", 6, 2),
]


def whole(run_dir):
    """All spans of the story."""
    made = Spans(run_dir, START)
    spans = [s for x in STORY for s in (made.of_event(x) if isinstance(x, Event) else made.of_step(x))]
    return [*spans, made.of_run(at(6.5), "failed", "rank 0 raised: boom")]


def test_spans_have_the_times_of_what_was_measured_and_parts_lie_in_their_whole(tmp_path):
    (tmp_path / "placements").mkdir()
    first = contiguous(1, 4, 2)
    second = Placement(first.slots[:, ::-1].copy(), 4, version=1)
    for version, placement in enumerate((first, second)):
        (tmp_path / "placements" / f"{version:04d}.json").write_text(placement.to_json())
    spans = whole(tmp_path)
    seconds = [(s.name, (s.start - nanoseconds(BEGAN)) / 1e9, (s.end - nanoseconds(BEGAN)) / 1e9) for s in spans]
    assert seconds == [
        ("step", 0.9, 1.0),
        ("step", 1.9, 2.0),
        ("step.evaluation", 2.05, 2.25),
        ("rebalance", 1.0, 2.5),
        ("migration", 2.6, 2.7),
        ("step", 2.9, 3.0),
        ("rebalance.measured", 2.0, 3.5),
        ("checkpoint", 3.6, 3.8),
        ("recovery", 3.98, 5.0),
        ("step", 1.9, 2.0),
        ("run", 0.0, 6.5),
    ]
    for span in spans:
        ends = [span.start, *(x for child in span.children for x in (child.start, child.end)), span.end]
        assert ends == sorted(ends), span.name
    by = {s.name: s for s in spans}
    assert [c.name for c in by["step"].children] == [f"step.{phase}" for phase in PHASES]
    assert [round((c.end - c.start) / 1e9, 6) for c in by["recovery"].children] == list(CLOCKS.values())
    assert by["recovery"].links == ("step 2", "step 3")
    assert by["migration"].links == (by["rebalance"].key,)
    assert by["rebalance.measured"].links == (by["migration"].key,)
    assert by["migration"].attributes["ray_ep.moved_experts"] == 4
    assert by["recovery"].attributes["ray_ep.lost"] == ["rank-1"]
    assert by["step"].attributes["ray_ep.step"] == 2
    assert by["run"].failed == "rank 0 raised: boom"


class Receiver(ThreadingHTTPServer):
    """An OTLP receiver over HTTP."""

    def __init__(self, status=200):
        self.spans, self.resources, self.status, self.paths = [], [], status, set()
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.paths.add(self.path)
        for part in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.server.resources.append({a.key: a.value.string_value for a in part.resource.attributes})
            self.server.spans += [s for scope in part.scope_spans for s in scope.spans]
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *words):
        """Nothing."""


@pytest.fixture
def receiver(monkeypatch):
    server = Receiver()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    server.server_close()


def tell(run_dir, story=STORY):
    told = []
    with trackers(OTEL, run_dir, told.append) as (listener,):
        listener.start(START)
        for x in story:
            (listener.event if isinstance(x, Event) else listener.step)(x)
    return told


def filed(run_dir):
    """Spans of the file as they stand there, and how many lines there are; each line is one of OTLP's messages."""
    lines = (run_dir / otel.FILE).read_text().splitlines()
    for line in lines:
        json_format.Parse(line, TracesData())
    spans = [s for line in lines for s in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    return spans, len(lines)


def test_a_receiver_gets_what_the_file_has_each_tree_a_trace_linked_to_the_runs(tmp_path, receiver, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=experts")
    assert tell(tmp_path) == []
    spans, lines = filed(tmp_path)
    assert lines == len(whole(tmp_path)) == 11
    assert {(s["spanId"], s["name"]) for s in spans} == {(s.span_id.hex(), s.name) for s in receiver.spans}
    assert len(receiver.spans) == len(spans) == 11 + 4 * len(PHASES) + len(CLOCKS)
    assert receiver.paths == {"/v1/traces"}
    assert receiver.resources[0]["service.name"] == "ray_ep"
    assert receiver.resources[0]["team"] == "experts"
    got = {s.span_id: s for s in receiver.spans}
    (run,) = [s for s in receiver.spans if s.name == "run"]
    for span in receiver.spans:
        if span.parent_span_id:
            parent = got[span.parent_span_id]
            assert parent.trace_id == span.trace_id
            assert parent.start_time_unix_nano <= span.start_time_unix_nano
            assert span.end_time_unix_nano <= parent.end_time_unix_nano
        elif span is not run:
            assert span.links[0].span_id == run.span_id
    assert len({s.trace_id for s in receiver.spans}) == lines
    (recovery,) = [s for s in receiver.spans if s.name == "recovery"]
    repeated = [{a.key: a.value for a in got[k.span_id].attributes} for k in recovery.links[1:]]
    assert [a["ray_ep.step"].int_value for a in repeated] == [2, 3]
    assert run.status.code == 2
    assert run.end_time_unix_nano > run.start_time_unix_nano == nanoseconds(BEGAN)


def test_a_receiver_that_refuses_is_told_once_and_the_file_has_all(tmp_path, receiver):
    receiver.status = 404
    (words,) = tell(tmp_path)
    assert words.startswith("tracking.to=otel: ConnectionError: spans do not arrive where OTEL_* variables say: ")
    assert "404" in words
    assert filed(tmp_path)[1] == 11


def test_without_a_receiver_there_is_the_file_which_keeps_to_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(otel, "MOST_BYTES", 30_000)
    assert tell(tmp_path, [step(n) for n in range(1, 41)]) == []
    numbers = []
    for name in (otel.OLDER, otel.FILE):
        assert (tmp_path / name).stat().st_size <= 30_000
        for line in (tmp_path / name).read_text().splitlines():
            top = json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
            numbers += [int(a["value"]["intValue"]) for a in top["attributes"] if a["key"] == "ray_ep.step"]
    assert numbers == list(range(numbers[0], 41))
    assert 1 < numbers[0] < 35


@pytest.mark.parametrize("variable", [("OTEL_TRACES_SAMPLER", "always_off"), ("OTEL_SDK_DISABLED", "true")])
def test_what_the_variables_leave_out_is_not_written(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(*variable)
    assert tell(tmp_path) == []
    assert not (tmp_path / otel.FILE).exists()


def test_exporters_that_are_not_there_are_refused_before_anything_starts(monkeypatch):
    for value, words in [("zipkin", "the exporter 'zipkin'"), ("console,nothing", "the exporter 'nothing'")]:
        monkeypatch.setenv("OTEL_TRACES_EXPORTER", value)
        with pytest.raises(BadInput, match=rf"tracking\.to=otel: {words} \(OTEL_TRACES_EXPORTER\) is not installed"):
            check_trackers(OTEL)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "otlp")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "smoke")
    with pytest.raises(BadInput, match=r"OTEL_EXPORTER_OTLP_PROTOCOL='smoke': expected http/protobuf or grpc"):
        check_trackers(OTEL)
    monkeypatch.setattr(otel, "entry_points", lambda **which: [])
    for protocol, what in [("grpc", "opentelemetry-exporter-otlp-proto-grpc"), ("", r"'ray_ep\[otel\]'")]:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
        with pytest.raises(BadInput, match=f"is not installed: pip install {what}"):
            check_trackers(OTEL)
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    check_trackers(OTEL)
