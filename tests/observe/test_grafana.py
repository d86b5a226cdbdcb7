"""Dashboards of Grafana and alert rules: what they show is exported; they join what Ray has written for its own."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_default_grafana_dashboard
from ray.dashboard.modules.metrics.templates import PROMETHEUS_YML_TEMPLATE

from ray_ep.cli import main
from ray_ep.errors import BadInput
from ray_ep.observe.grafana import DASHBOARDS, RAYS_OWN, ROW, RULES, install, with_row
from ray_ep.observe.metrics.table import METRICS

ROOT = Path(__file__).parents[2]
OURS = {path.stem: json.loads(path.read_text()) for path in sorted(DASHBOARDS.glob("*.json"))}
EXPORTED = {metric.exported for metric in METRICS.values()}


def queries(dashboard):
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]


def named(text):
    """Metrics of ours that a text names; of a histogram its parts."""
    return {re.sub("_(bucket|count)$", "", name) for name in re.findall(r"\bray_ep_\w+", text)}


def places(dashboard):
    """(left, top, right, bottom) of each panel that is shown."""
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        yield at["x"], at["y"], at["x"] + at["w"], at["y"] + at["h"]


def overlaps(dashboard):
    found = list(places(dashboard))
    return [
        (a, b)
        for n, a in enumerate(found)
        for b in found[:n]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


@pytest.fixture
def session(tmp_path):
    """A session's directory with what Ray's dashboard writes there for Grafana and Prometheus."""
    folder = tmp_path / "session" / "metrics" / "grafana" / "dashboards"
    folder.mkdir(parents=True)
    (folder / RAYS_OWN).write_text(generate_default_grafana_dashboard()[0])
    prometheus = tmp_path / "session" / "metrics" / "prometheus" / "prometheus.yml"
    prometheus.parent.mkdir()
    prometheus.write_text(PROMETHEUS_YML_TEMPLATE.format(prom_metrics_service_discovery_file_path="sd.json"))
    return tmp_path / "session"


def test_dashboards_and_alerts_ask_for_nothing_but_what_a_run_exports():
    asked = [named(query) for dashboard in OURS.values() for query in queries(dashboard)]
    asked += [named(rule["expr"]) for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len(asked) > 60
    assert all(asked)
    assert set().union(*asked) <= EXPORTED


def test_every_metric_is_shown_somewhere_or_raises_an_alert():
    text = json.dumps(list(OURS.values())) + RULES.read_text()
    assert EXPORTED - named(text) <= {"ray_ep_guest_bytes_total"}


def test_every_panel_has_a_title_and_a_sentence_and_none_lies_over_another():
    assert list(OURS) == ["elasticity", "links", "placement", "training"]
    for dashboard in OURS.values():
        assert all(panel["title"] and panel["description"].endswith(".") for panel in dashboard["panels"])
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"]) > 5
        assert overlaps(dashboard) == []


def test_every_query_is_of_the_chosen_session_and_run():
    for dashboard in OURS.values():
        for query in queries(dashboard):
            assert query.count("ray_ep_") == query.count('{SessionName=~"$SessionName",run=~"$run"'), query


def test_our_row_stands_above_rays_panels_which_stay_as_they_are():
    rays = json.loads(generate_default_grafana_dashboard()[0])
    merged = with_row(rays, OURS)
    count = 1 + sum(map(len, ROW.values()))
    head, *row = merged["panels"][:count]
    assert (head["type"], head["title"], head["gridPos"]["y"]) == ("row", "ray_ep", 0)
    assert [panel["title"] for panel in row] == [title for titles in ROW.values() for title in titles]
    assert "$run" not in json.dumps(row)
    others = merged["panels"][count:]
    assert [{**p, "gridPos": 0, "panels": 0} for p in others] == [
        {**p, "gridPos": 0, "panels": 0} for p in rays["panels"]
    ]
    assert min(p["gridPos"]["y"] for p in others) == max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in row)
    assert len(overlaps(merged)) == len(overlaps(rays))
    ids = [p["id"] for p in merged["panels"]]
    assert len(set(ids)) == len(ids)
    assert {k: v for k, v in merged.items() if k != "panels"} == {k: v for k, v in rays.items() if k != "panels"}


def test_a_row_that_is_there_already_is_replaced():
    rays = json.loads(generate_default_grafana_dashboard()[0])
    once = with_row(rays, OURS)
    assert with_row(once, OURS) == once


def test_a_dashboard_that_was_edited_keeps_what_is_not_ours(session):
    """Panels of the user's own: without a place or a number, as Grafana takes them, and with a number beyond ours."""
    path = session / "metrics" / "grafana" / "dashboards" / RAYS_OWN
    rays = json.loads(path.read_text())
    mine = [{"title": "mine", "type": "text", "id": None}, {"title": "too", "type": "text", "id": 9500}]
    rays["panels"] = [*mine, *rays["panels"][:2]]
    path.write_text(json.dumps(rays))
    install(session)
    once = json.loads(path.read_text())
    assert [p for p in once["panels"] if p["title"] in ("mine", "too")] == mine
    assert once["panels"][0]["title"] == "ray_ep"
    install(session)
    assert json.loads(path.read_text()) == once
    path.write_text(json.dumps({**rays, "panels": None}))
    install(session)
    assert [p["type"] for p in json.loads(path.read_text())["panels"]].count("row") == 1


def test_installing_puts_dashboards_row_and_rules_where_rays_grafana_and_prometheus_read_them(session):
    result = CliRunner().invoke(main, ["dashboards", "install", "--session", str(session)])
    assert result.exit_code == 0, result.output
    folder, prometheus = session / "metrics" / "grafana" / "dashboards", session / "metrics" / "prometheus"
    assert {p.name for p in folder.iterdir()} == {RAYS_OWN, *(f"ray_ep_{name}.json" for name in OURS)}
    assert json.loads((folder / "ray_ep_links.json").read_text()) == OURS["links"]
    assert json.loads((folder / RAYS_OWN).read_text())["panels"][0]["title"] == "ray_ep"
    config = yaml.safe_load((prometheus / "prometheus.yml").read_text())
    assert [Path(name).read_text() for name in config["rule_files"]] == [RULES.read_text()]
    assert config["scrape_configs"][0]["job_name"] == "ray"
    assert all(str(path) in result.output for path in (folder / RAYS_OWN, prometheus / "prometheus.yml"))


def test_installing_twice_changes_nothing_more(session):
    def there():
        return {p: p.read_text() for p in session.rglob("*") if p.is_file()}

    install(session)
    once = there()
    install(session)
    assert there() == once


def test_rules_are_named_by_the_session_they_are_in_not_by_the_newest(session):
    latest = session.with_name("session_latest")
    latest.symlink_to(session)
    install(latest)
    (named,) = yaml.safe_load((session / "metrics" / "prometheus" / "prometheus.yml").read_text())["rule_files"]
    assert Path(named) == session / "metrics" / "prometheus" / "ray_ep_alerts.yaml"


def test_rules_that_prometheus_has_already_stay(session):
    path = session / "metrics" / "prometheus" / "prometheus.yml"
    path.write_text(path.read_text() + "\nrule_files: [mine.yaml]\n")
    install(session)
    assert yaml.safe_load(path.read_text())["rule_files"] == ["mine.yaml", str(path.with_name("ray_ep_alerts.yaml"))]


def test_another_grafana_is_given_the_dashboards_alone(session, tmp_path):
    before = {p: p.read_text() for p in session.rglob("*") if p.is_file()}
    mine = tmp_path / "mine"
    mine.mkdir()
    done = install(session, mine)
    assert sorted(p.name for p in mine.iterdir()) == sorted(p.name for p in done.dashboards)
    assert len(done.dashboards) == len(OURS)
    assert (done.merged, done.prometheus) == (None, None)
    assert {p: p.read_text() for p in session.rglob("*") if p.is_file()} == before


def refusal(*arguments):
    result = CliRunner().invoke(main, ["dashboards", "install", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    return result.stderr


def test_what_cannot_be_installed_is_said_in_a_sentence_and_nothing_is_written(session, tmp_path):
    folder = session / "metrics" / "grafana" / "dashboards"
    assert "no such directory: expected that of a Ray session" in refusal("--session", tmp_path / "none")
    assert "no such directory" in refusal("--grafana", tmp_path / "none")
    (tmp_path / "headless").mkdir()
    assert "its dashboard does not run" in refusal("--session", tmp_path / "headless")
    (session / "metrics" / "prometheus" / "prometheus.yml").write_text("scrape_configs: [")
    assert "no configuration of Prometheus" in refusal("--session", session)
    (folder / RAYS_OWN).write_text('{"panels": [3]}')
    assert f"{folder / RAYS_OWN}: no dashboard of Grafana: its panels are damaged" in refusal("--session", session)
    (folder / RAYS_OWN).write_text('{"panels": [')
    assert f"{folder / RAYS_OWN}: no dashboard of Grafana" in refusal("--session", session)
    assert [p.name for p in folder.iterdir()] == [RAYS_OWN]
    (folder / RAYS_OWN).unlink()
    assert f"{folder} has no {RAYS_OWN}" in refusal("--session", session)


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    for name in OURS:
        (tmp_path / f"ray_ep_{name}.json").mkdir()
    with pytest.raises(BadInput, match=r"ray_ep_elasticity.json: cannot write there: Is a directory"):
        install(grafana=tmp_path)
    assert list(tmp_path.glob("*.part")) == []
