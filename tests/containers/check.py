"""What `make check` asks of tools that a machine may lack: each runs, or says why it does not."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = ["docker", "compose", "--env-file", os.devnull, "--file", str(DOCKER / "compose.yaml")]
CLUSTER = [*COMPOSE[:-1], str(DOCKER / "cluster.yaml")]

CHECKS = {
    "docker compose config": [*COMPOSE, "config", "--quiet"],
    "docker compose config, gpu": [*COMPOSE, "--profile", "gpu", "config", "--quiet"],
    "docker compose config, observe": [*COMPOSE, "--profile", "observe", "config", "--quiet"],
    "docker compose config, cluster": [*CLUSTER, "--profile", "observe", "config", "--quiet"],
    "haproxy": ["haproxy", "-c", "-q", "-f", str(DOCKER / "haproxy" / "haproxy.cfg")],
    "promtool": ["promtool", "check", "config", str(DOCKER / "prometheus" / "prometheus.yml")],
    "promtool, cluster": [
        "promtool",
        "check",
        "config",
        str(DOCKER / "prometheus" / "cluster.yml"),
    ],
    "promtool, alerts": ["promtool", "test", "rules", str(Path(__file__).parent / "rules.yml")],
}
DASHBOARD = DOCKER / "grafana" / "dashboards" / "cottention.json"
PRESENT = {
    "docker": ["docker", "compose", "version"],
    "haproxy": ["haproxy", "-v"],
    "promtool": ["promtool", "--version"],
}
ENVIRONMENT = os.environ | {
    "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin",
    "REPLICAS": "replica:8000",
}
"""haproxy.cfg has no default for its servers; Debian has the program off a user's PATH."""


def is_present(tool: str) -> bool:
    """Whether the tool, with its plugin, answers here."""
    try:
        done = subprocess.run(PRESENT[tool], env=ENVIRONMENT, capture_output=True, check=False)
        return done.returncode == 0
    except OSError:
        return False


def dashboard_as_rules(path: Path) -> None:
    """The dashboard's queries as a file of rules, which promtool can read."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    queries = [target["expr"] for panel in panels for target in panel["targets"]]
    rules = [
        {"record": f"panel:query{i}", "expr": query.replace("$__rate_interval", "1m")}
        for i, query in enumerate(queries)
    ]
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))


def main() -> int:
    """Run what there is; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        rules = Path(folder, "rules.yml")
        dashboard_as_rules(rules)
        queries = {"promtool, dashboard": ["promtool", "check", "rules", str(rules)]}
        return run(CHECKS | queries)


def run(checks: dict[str, list[str]]) -> int:
    """1 where one failed; what it said is printed."""
    present = {tool: is_present(tool) for tool in PRESENT}
    failed = False
    for name, command in checks.items():
        if not present[command[0]]:
            print(f"{name}: skipped, there is no {' '.join(PRESENT[command[0]][:-1])}")
            continue
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        print(f"{name}: {'passed' if done.returncode == 0 else done.stdout + done.stderr}")
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
