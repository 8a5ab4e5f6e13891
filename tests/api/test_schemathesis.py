"""Generated calls, good and bad, from our own OpenAPI document: none makes the server fail."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import REPOSITORY, Running, chat


def test_no_generated_call_makes_the_server_fail(server: Running, tmp_path) -> None:
    """Schemathesis in a process of its own, as anybody would run it; its check is `not_a_server_error`.

    One 5xx is right: 504 is what HTTP prescribes for `only-if-cached` without a recording (RFC 9111, 5.2.1.7).
    """
    expected = '[checks.not_a_server_error]\nexpected-statuses = ["2xx", "3xx", "4xx", "504"]\n'
    (tmp_path / "schemathesis.toml").write_text(expected)
    command = [
        sys.executable,
        "-m",
        "schemathesis.cli",
        "run",
        f"{server.url}/openapi.json",
        "--checks",
        "not_a_server_error",
    ]
    command += ["--max-examples", "12", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    command += [
        "--max-time",
        "30",  # `benchmarks fuzz` takes its time
        "--suppress-health-check",
        "all",
        "--request-timeout",
        "20",
        "--generation-database",
        "none",
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=480,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    with server.client() as client:
        assert client.post("/v1/chat/completions", json=chat()).status_code == 200
