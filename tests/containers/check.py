"""What `make check` asks of tools that a machine may lack: each runs, or says why it does not."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
COMPOSE = ["docker", "compose", "--file", str(DOCKER / "compose.yaml"), "--env-file", os.devnull]

CHECKS = {
    "docker compose config": [*COMPOSE, "config", "--quiet"],
    "docker compose config, gpu": [*COMPOSE, "--profile", "gpu", "config", "--quiet"],
    "docker compose config, observe": [*COMPOSE, "--profile", "observe", "config", "--quiet"],
    "promtool": ["promtool", "check", "config", str(DOCKER / "prometheus" / "prometheus.yml")],
}
PRESENT = {"docker": ["docker", "compose", "version"], "promtool": ["promtool", "--version"]}


def is_present(tool: str) -> bool:
    """Whether the tool, with its plugin, answers here."""
    try:
        return subprocess.run(PRESENT[tool], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def main() -> int:
    """Run what there is; the exit status."""
    present = {tool: is_present(tool) for tool in PRESENT}
    failed = False
    for name, command in CHECKS.items():
        if not present[command[0]]:
            print(f"{name}: skipped, there is no {' '.join(PRESENT[command[0]][:-1])}")
            continue
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        print(f"{name}: {'passed' if done.returncode == 0 else done.stdout + done.stderr}")
        failed |= done.returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
