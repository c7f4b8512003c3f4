"""What docker/ says of the server is true: settings, names of metrics, times, paths.

Whether the images build and run is shown by tests/containers; their syntax by `make check`.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cottention.engine.ops import BuildError, build
from cottention.engine.sessions.store.postgres.connections import MAX_CONNECTIONS
from cottention.engine.settings.declaration import Setting, settings_of
from cottention.engine.settings.sources import variable_of
from cottention.server.cli.options import SERVE_SETTINGS
from cottention.server.cli.serve import FINAL_EVENT_SECONDS, NOTICE_SECONDS
from cottention.server.config import ServerConfig
from tests.server.exported import exported_names

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = (DOCKER / "compose.yaml").read_text()
CLUSTER = (DOCKER / "cluster.yaml").read_text()
HAPROXY = (DOCKER / "haproxy" / "haproxy.cfg").read_text()
MANIFESTS = [
    manifest
    for path in sorted((DOCKER / "kubernetes").rglob("*.yaml"))
    for manifest in yaml.safe_load_all(path.read_text())
]
EXAMPLE = (DOCKER / "env.example").read_text()
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cuda"]
SIZES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def settings() -> dict[str, Setting]:
    """Every setting of `cottention serve`, by its variable."""
    each_type = (settings_of(config_type) for config_type in SERVE_SETTINGS.values())
    return {variable_of(each.name): each for some in each_type for each in some}


def services() -> dict[str, Any]:
    """The services of both compose files."""
    cluster = yaml.safe_load(CLUSTER)["services"]
    own = {name: service for name, service in cluster.items() if "extends" not in service}
    return yaml.safe_load(COMPOSE)["services"] | own


def manifest(kind: str, name: str) -> Any:
    """One of the manifests for Kubernetes."""
    [found] = [
        each for each in MANIFESTS if (each["kind"], each["metadata"]["name"]) == (kind, name)
    ]
    return found["spec"]


def told(default: Any) -> set[str]:
    """How env.example may write a default."""
    if default in (None, ()):
        return {""}
    if isinstance(default, bool):
        return {str(default).lower()}
    texts = {f"{default:g}" if isinstance(default, float) else str(default)}
    if isinstance(default, int):
        texts |= {f"{default // size}{suffix}" for suffix, size in SIZES.items()}
    return texts


def test_the_example_has_every_setting_with_its_help_and_default() -> None:
    found = re.findall(r"^((?:# .*\n)+)#(COTTENTION_\w+)=(.*)$", EXAMPLE, re.MULTILINE)
    lines = {name: (" ".join(text.split()).replace("# ", ""), value) for text, name, value in found}
    expected = settings()
    assert lines.keys() == expected.keys()
    for name, (text, value) in lines.items():
        assert value in told(expected[name].default), name
        assert text.startswith(expected[name].help), name


def test_the_example_has_every_variable_of_the_compose_file_with_its_default() -> None:
    lines = dict(re.findall(r"^#([A-Z_]+)=(.*)$", EXAMPLE, re.MULTILINE))
    ours = {name for name in lines if not name.startswith("COTTENTION_")}
    used = re.findall(r"\$\{([A-Z_]+)(:[-+][^}]*)?\}", COMPOSE + CLUSTER)
    assert {name for name, _ in used if not name.startswith("COTTENTION_")} == ours
    for name, default in used:
        if name in ours and default.startswith(":-") and lines[name]:
            assert default == f":-{lines[name]}"


def test_a_stopped_server_has_the_time_to_drain() -> None:
    drain = ServerConfig().drain_seconds + FINAL_EVENT_SECONDS
    for name in ("server", "server-gpu", "replica"):
        [grace] = re.findall(r":-(\d+)s", services()[name]["stop_grace_period"])
        assert int(grace) >= drain + 10
    spec = manifest("Deployment", "cottention-server")["template"]["spec"]
    before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= before + drain + 10
    replica = manifest("StatefulSet", "cottention-replica")["template"]["spec"]
    assert replica["terminationGracePeriodSeconds"] >= drain + 10


def test_the_load_balancer_has_time_to_notice() -> None:
    """A server that is stopped takes no requests for longer than HAProxy needs to find out, and
    HAProxy stops only when its own streams may have ended."""
    [interval] = re.findall(r" inter (\d+)s ", HAPROXY)
    assert int(interval) + 1 < NOTICE_SECONDS
    [stop] = re.findall(r"hard-stop-after (\d+)s", HAPROXY)
    assert services()["haproxy"]["stop_grace_period"] == f"{int(stop) + 5}s"
    spec = manifest("Deployment", "cottention-haproxy")["template"]["spec"]
    before = spec["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] >= before + int(stop) + 5


def test_as_many_servers_as_may_come_have_their_places() -> None:
    """In HAProxy's tables, in the database's connections, in what autoscaling may ask for."""
    [most] = set(re.findall(r"MAX_REPLICAS-(\d+)", HAPROXY))
    assert f"MAX_REPLICAS:-{most}" in CLUSTER
    [connections] = re.findall(r"max_connections=(\d+)", CLUSTER)
    assert int(connections) >= int(most) * (MAX_CONNECTIONS + 1) + 10
    assert manifest("HorizontalPodAutoscaler", "cottention-replica")["maxReplicas"] <= int(most)


def test_everything_is_published_on_this_machine_alone() -> None:
    for name, service in services().items():
        for port in service.get("ports", ()):
            assert ":-127.0.0.1:" in port, name
    assert "127.0.0.1:8000}:8000" in COMPOSE
    assert "127.0.0.1:8000}:8000" in CLUSTER


def test_services_are_closed() -> None:
    for name, service in services().items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("restart") == (None if name == "password" else "unless-stopped"), name
        assert service["deploy"]["resources"]["limits"]["memory"], name
    gpu = yaml.safe_load(COMPOSE)["services"]["server-gpu"]
    [device] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert (device["driver"], device["capabilities"]) == ("nvidia", ["gpu"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_images_have_the_version_and_the_locked_packages(path: Path) -> None:
    text = path.read_text()
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'image.version="{version}"' in text
    assert all("--constraint constraints.txt" in line for line in re.findall("pip install.*", text))
    assert not re.search(r"https?://(?!127)", text)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_images_start_with_an_init(path: Path) -> None:
    """The kernel drops signals that process 1 has no handler for, until Python has set one."""
    text = path.read_text()
    last_stage = text[text.rindex("\nFROM ") :]
    assert re.search(r"apt-get install .*\btini=", last_stage)
    [entrypoint] = re.findall("^ENTRYPOINT (.*)$", text, re.MULTILINE)
    assert json.loads(entrypoint) == ["tini", "-s", "--", "cottention"]


def test_no_manifest_goes_round_the_image_s_init() -> None:
    for name, service in services().items():
        if name.startswith(("server", "replica")):
            assert "entrypoint" not in service, name
    for each in MANIFESTS:
        pod = each["spec"].get("template", {"spec": {}})
        for container in pod["spec"].get("containers", ()):
            assert "command" not in container, each["metadata"]["name"]


def cuda_build_step() -> dict[str, str]:
    """The variables that Dockerfile.cuda builds the kernels with."""
    [variables] = re.findall(r"^RUN (.*) cottention build \\$", DOCKERFILES[1].read_text(), re.M)
    return dict(pair.split("=") for pair in variables.split())


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_the_cuda_image_s_build_step_runs() -> None:
    """Up to nvcc, where there is one; not into the user's cache, where other tests want none."""
    variables = cuda_build_step()
    assert variables == {"COTTENTION_CUDA": "1"}
    try:
        build.nvcc()
    except BuildError as error:
        pytest.skip(str(error))
    command = ["env", *(f"{name}={value}" for name, value in variables.items())]
    command += [sys.executable, "-m", "cottention.server", "build"]
    environment = os.environ | {"COTTENTION_CACHE": str(ROOT / "build" / "cuda-image")}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "/cottention-cuda-" in done.stdout
    assert "compute_80,code=sm_80" in build.DEVICE_FLAGS
    assert "code=[sm_90,compute_90]" in build.DEVICE_FLAGS


def test_rules_and_dashboard_name_only_what_is_exported() -> None:
    known = exported_names() | {"up"}
    groups = yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]
    expressions = [rule["expr"] for group in groups for rule in group["rules"]]
    dashboard = json.loads((DOCKER / "grafana" / "dashboards" / "cottention.json").read_text())
    expressions += [it["expr"] for panel in dashboard["panels"] for it in panel["targets"]]
    expressions += [it["query"]["query"] for it in dashboard["templating"]["list"]]
    assert len(expressions) > 20
    for expression in expressions:
        names = set(re.findall(r"\b(?:cottention:|process_|up\b)[a-z0-9_]*", expression))
        assert names, expression
        assert names <= known, expression


def test_the_dashboard_is_found() -> None:
    provider = DOCKER / "grafana" / "provisioning" / "dashboards" / "cottention.yml"
    folder = yaml.safe_load(provider.read_text())["providers"][0]["options"]["path"]
    grafana = services()["grafana"]
    mounts = dict(each.split(":")[:2] for each in grafana["volumes"])
    assert mounts["./grafana/dashboards"] == folder
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{folder}/cottention.json"
