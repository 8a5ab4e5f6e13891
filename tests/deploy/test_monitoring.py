"""Alerts and dashboard name metrics that exist, with labels that they have; the two copies of the alerts are equal.

Whether the alerts fire when they should is tested by Prometheus' own tool: `promtool test rules
docker/monitoring/alerts.test.yaml`. No Python package carries it, so that is run by hand where it is installed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import yaml
from prometheus_client import Counter, Histogram

from app.observe import metrics
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "docker" / "monitoring"
# What Prometheus adds to each sample.
ADDED = {"job", "instance", "le", "namespace", "pod"}


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((FOLDER / "grafana" / "dashboards" / "refrain.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel["targets"])


def exposed() -> dict[str, set[str]]:
    """The samples of ours, by name, with their labels."""
    found: dict[str, set[str]] = {}
    for metric in vars(metrics).values():
        if not hasattr(metric, "_labelnames"):
            continue
        suffixes = {Counter: ("_total",), Histogram: ("_bucket", "_sum", "_count")}.get(type(metric), ("",))
        found |= {metric._name + suffix: set(metric._labelnames) for suffix in suffixes}
    return found


def test_every_metric_and_label_that_is_named_exists() -> None:
    ours, named = exposed(), set()
    for expression in expressions():
        for name, selector in re.findall(r"(refrain_[a-z_]+)(?:\{([^}]*)\})?", expression):
            assert name in ours, name
            named.add(name)
            assert set(re.findall(r"(\w+)[=!]", selector)) <= ours[name] | ADDED, expression
        labels = {each.strip() for by in re.findall(r"by \(([^)]*)\)", expression) for each in by.split(",")}
        mentioned = set().union(*(ours[name] for name in re.findall(r"refrain_[a-z_]+", expression)), ADDED)
        assert "refrain_" not in expression or labels <= mentioned, expression
    assert len(named) > 10


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in ("page", "ticket")
            assert set(rule["annotations"]) == {"summary", "action"}


def test_every_alert_has_a_test() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
    tests = yaml.safe_load((FOLDER / "alerts.test.yaml").read_text())["tests"]
    fired = {each["alertname"] for test in tests for each in test["alert_rule_test"] if each["exp_alerts"]}
    assert {rule["alert"] for rule in rules} == fired


def test_kubernetes_has_the_same_alerts() -> None:
    rules = REPOSITORY / "deploy" / "kubernetes" / "components" / "monitoring" / "rules.yaml"
    assert yaml.safe_load(rules.read_text())["spec"] == yaml.safe_load((FOLDER / "alerts.yaml").read_text())


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((FOLDER / "grafana" / "dashboards" / "refrain.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
