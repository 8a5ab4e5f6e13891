"""Every overlay renders, fits Kubernetes' own schemas, names only what exists, and keeps the rules below."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from app.observe import metrics
from app.settings import Settings
from app.train.config import Job
from tests.conftest import REPOSITORY
from tests.deploy.kubectl import unpacked

FOLDER = REPOSITORY / "deploy" / "kubernetes"
RENDERED = ["overlays/cpu", "overlays/gpu", "overlays/ha", "overlays/multi-node", "jobs/finetune"]
VERSIONS = ("1.31", "1.37")
# Kinds of operators, whose schemas no package carries.
CUSTOM = {"ServiceMonitor", "PrometheusRule", "ScaledObject", "RayService"}


@cache
def rendered(folder: str) -> list[dict[str, Any]]:
    command = [unpacked(REPOSITORY / ".cache" / "kubectl"), "kustomize", FOLDER / folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def objects(kind: str, folder: str) -> list[dict[str, Any]]:
    return [each for each in rendered(folder) if each["kind"] == kind]


def pods(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pod spec of whatever makes pods."""
    for each in rendered(folder):
        if each["kind"] in ("Deployment", "StatefulSet", "Job"):
            yield each["metadata"]["name"], each["spec"]["template"]["spec"]


def test_every_overlay_and_job_is_rendered_here() -> None:
    found = {str(file.parent.relative_to(FOLDER)) for file in FOLDER.glob("*/*/kustomization.yaml")}
    assert {each for each in found if not each.startswith("components/")} == set(RENDERED)


@pytest.mark.parametrize("folder", RENDERED)
@pytest.mark.parametrize("version", VERSIONS)
def test_it_fits_kubernetes_own_schemas(folder: str, version: str) -> None:
    for each in rendered(folder):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("folder", RENDERED)
def test_everything_is_in_one_namespace(folder: str) -> None:
    assert {each["metadata"].get("namespace") for each in rendered(folder)} == {"refrain"}


@pytest.mark.parametrize("folder", RENDERED)
def test_pods_may_do_nothing_but_their_work(folder: str) -> None:
    for name, pod in pods(folder):
        assert pod["enableServiceLinks"] is False, name
        assert pod["automountServiceAccountToken"] is False, name
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in pod["containers"]:
            held = container["securityContext"]
            assert held["allowPrivilegeEscalation"] is False, name
            assert held["readOnlyRootFilesystem"] is True, name
            assert held["capabilities"] == {"drop": ["ALL"]}, name
            assert container["image"].rpartition(":")[2] not in ("", "latest", container["image"])
            resources = container["resources"]
            assert {"cpu", "memory"} <= set(resources["requests"]), name
            assert resources["limits"]["memory"] == resources["requests"]["memory"], name
            assert "cpu" not in resources["limits"], f"{name}: a throttled thread holds up all others"


def overlay_on(base: str, components: list[str], folder: Path) -> str:
    """An overlay of one's own in a folder outside the project, where nobody else looks at it; its path."""
    told = {
        "kind": "Kustomization",
        "namespace": "refrain",
        "resources": [os.path.relpath(FOLDER / base, folder)],
        "components": [os.path.relpath(FOLDER / each, folder) for each in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(told))
    return str(folder)


@pytest.mark.parametrize("overlay", ["cpu", "ha"])
def test_with_a_store_of_weights_pods_pull_before_they_serve(overlay: str, tmp_path: Path) -> None:
    folder = overlay_on(f"overlays/{overlay}", ["components/weights-store"], tmp_path.resolve())
    for each in rendered(folder):
        if each["kind"] not in CUSTOM:
            kubernetes_validate.validate(each, VERSIONS[-1], strict=True)
    pod = dict(pods(folder))["refrain"]
    (pulling,), (serving,) = pod["initContainers"], pod["containers"]
    assert pulling["args"] == ["models", "pull", "$(REFRAIN_MODEL)"]
    for same in ("image", "envFrom", "securityContext"):
        assert pulling[same] == serving[same]
    assert serving["envFrom"][0]["configMapRef"]["name"] in {
        each["metadata"]["name"] for each in objects("ConfigMap", folder)
    }
    assert {"name": "data", "mountPath": "/data"} in pulling["volumeMounts"]
    assert "refrain-to-https" in {each["metadata"]["name"] for each in objects("NetworkPolicy", folder)}


@pytest.mark.parametrize("folder", [each for each in RENDERED if each.startswith("overlays/")])
def test_each_probe_asks_what_it_means(folder: str) -> None:
    pod = dict(pods(folder))["refrain"]
    (container,) = pod["containers"]
    asked = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")}
    assert asked == {"startup": "/healthz", "readiness": "/readyz", "liveness": "/healthz"}


@pytest.mark.parametrize("folder", [each for each in RENDERED if each.startswith("overlays/")])
def test_the_longest_answer_may_end_before_the_pod_is_killed(folder: str) -> None:
    pod = dict(pods(folder))["refrain"]
    sleeps_s = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    drains_s = float(environment(folder)["REFRAIN_DRAIN_S"])
    assert pod["terminationGracePeriodSeconds"] >= sleeps_s + drains_s + 15


def environment(folder: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for each in objects("ConfigMap", folder):
        found |= {name: value for name, value in each.get("data", {}).items() if name.startswith("REFRAIN_")}
    return found


@pytest.mark.parametrize("folder", RENDERED)
def test_every_variable_is_a_setting_with_a_value_that_it_takes(folder: str) -> None:
    values = environment(folder)
    names = {name.removeprefix("REFRAIN_").lower() for name in values}
    assert names <= set(Settings.model_fields)
    text = "\n".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    mentioned = set(re.findall(r"\bREFRAIN_([A-Z0-9_]+)(?==|:)", text))
    assert {name.lower() for name in mentioned} <= set(Settings.model_fields)


def test_the_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in RENDERED:
        for name, value in environment(folder).items():
            monkeypatch.setenv(name, value)
        Settings()
        for name in environment(folder):
            monkeypatch.delenv(name)


def test_a_selector_finds_its_pods_and_a_service_its_port() -> None:
    for folder in RENDERED:
        labels = [
            each["spec"]["template"]["metadata"]["labels"]
            for each in rendered(folder)
            if each["kind"] in ("Deployment", "Job")
        ]
        for service in objects("Service", folder):
            wanted = service["spec"]["selector"].items()
            assert any(wanted <= each.items() for each in labels), service["metadata"]["name"]
        for policy in objects("NetworkPolicy", folder):
            matched = policy["spec"]["podSelector"].get("matchLabels", {}).items()
            assert any(matched <= each.items() for each in labels), policy["metadata"]["name"]


def test_what_autoscales_is_a_metric_of_ours() -> None:
    ours = {each._name for each in vars(metrics).values() if hasattr(each, "_name")}
    ours |= {f"{name}_total" for name in ours}
    text = "\n".join(file.read_text() for file in FOLDER.rglob("*.yaml"))
    named = set(re.findall(r"\brefrain_[a-z_]+", text))
    assert named
    assert named <= ours, named - ours


def test_the_jobs_file_is_one_that_the_command_takes() -> None:
    Job.model_validate(tomllib.loads((FOLDER / "jobs" / "finetune" / "job.toml").read_text()))


def test_the_components_that_no_overlay_uses_render_too(tmp_path: Path) -> None:
    """`keda` and `egress-https` are for overlays of one's own: on top of `ha`."""
    folder = overlay_on("overlays/ha", ["components/keda", "components/egress-https"], tmp_path.resolve())
    kinds = [each["kind"] for each in rendered(folder)]
    assert "ScaledObject" in kinds
    assert "HorizontalPodAutoscaler" not in kinds, "one of the two may scale"
