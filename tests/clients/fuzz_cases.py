"""Many cases of schemathesis against one server: `make fuzz-long`.

Bodies and parameters alone are varied (its phase "fuzzing"), seed after seed, until there are
--cases of them. Each seed that is done is a line of --record: a run that was ended goes on with the
next one. It ends with 1 at the first seed with a fault of the server, which `--seed` repeats; where
schemathesis itself fails, the cases that it has made count, and it says so.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

from tests.clients.conftest import Served, python, serving
from tests.clients.test_schemathesis import CONFIG

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
)
"""Those that depend on what is sent; methods and keys are for the short run."""

EXAMPLES = 60
"""Cases of each operation and seed, where there are as many: more of them come ever slower."""


def main() -> None:
    """Run seeds until there are enough cases."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=50_000)
    parser.add_argument("--record", type=Path, default=Path("build/fuzz.jsonl"))
    parser.add_argument("--seed", type=int, help="this one alone")
    parser.add_argument("--workers", default="2")
    arguments = parser.parse_args()
    arguments.record.parent.mkdir(exist_ok=True)
    done = _done(arguments.record)
    with serving("--max-tokens-limit", "40", "--default-max-tokens", "8") as served:
        if arguments.seed is not None:
            _run(served, arguments.seed, arguments.workers)
            return
        while sum(done.values()) < arguments.cases:
            seed = max(done, default=0) + 1
            done[seed] = _run(served, seed, arguments.workers)
            with arguments.record.open("a") as record:
                record.write(json.dumps({"seed": seed, "cases": done[seed]}) + "\n")
            print(f"seed {seed}: {done[seed]} cases, {sum(done.values())} in all", flush=True)


def _done(record: Path) -> dict[int, int]:
    """Cases of each seed that is done."""
    if not record.exists():
        return {}
    lines = map(json.loads, record.read_text().splitlines())
    return {line["seed"]: line["cases"] for line in lines}


def _run(served: Served, seed: int, workers: str) -> int:
    """The cases of a seed. SystemExit where one of them shows a fault."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "schemathesis.toml").write_text(CONFIG)
        command = [
            *(python(), "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {served.key}"),
            *("--checks", ",".join(CHECKS), "--warnings", "off", "--workers", workers),
            *("--phases", "fuzzing", "--max-examples", str(EXAMPLES), "--seed", str(seed)),
            *("--no-shrink", "--generation-database", "none", "--continue-on-failure"),
            *("--request-timeout", "60", "--suppress-health-check", "all"),
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.search(r"^\s*([\d,]+) generated, ([\d,]+) passed$", done.stdout, re.MULTILINE)
    if found is None or found[1] != found[2] or done.returncode not in (0, 1):
        raise SystemExit(f"seed {seed}:\n{done.stdout[-8000:]}{done.stderr[-2000:]}")
    if done.returncode:  # hypothesis could not make more cases of an operation
        print(f"seed {seed}: schemathesis itself failed:\n{done.stdout[-3000:]}", flush=True)
    return int(found[1].replace(",", ""))


if __name__ == "__main__":
    main()
