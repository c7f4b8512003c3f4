"""guidellm: a short benchmark completes, and counts as many requests as the server does."""

import json
import re
import subprocess
from pathlib import Path

import httpx

from tests.clients.conftest import MODEL, Served, python

NUM_REQUESTS = 6


def num_finished(served: Served) -> int:
    """Choices that the server has ended."""
    text = httpx.get(f"{served.url}/metrics").text
    counts = re.findall(r"^cottention:request_success_total\{.*\} (.*)$", text, re.MULTILINE)
    return round(sum(map(float, counts)))


def test_a_short_benchmark(served: Served, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    before = num_finished(served)
    backend = f"kind=openai_http,target={served.url},model={served.model},api_key={served.key}"
    command = [
        *(python(), "-m", "guidellm", "run", "--disable-console"),
        *("--backend", f"{backend},request_format=/v1/completions"),
        *("--profile", "kind=concurrent,streams=2"),
        *("--constraint", f"kind=max_requests,count={NUM_REQUESTS}"),
        *("--tokenizer", f"kind=huggingface_auto,model={MODEL}"),
        *("--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=12"),
        *("--output", f"kind=json,path={report}"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert (totals["successful"], totals["errored"]) == (NUM_REQUESTS, 0)
    assert num_finished(served) - before == totals["total"]
