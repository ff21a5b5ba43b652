"""Requests drawn from the server's own OpenAPI document get no server error."""

import subprocess
import sys

from server_process import KEY, Server


def test_no_request_that_schemathesis_makes_of_the_document_is_a_server_error(server: Server) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", "-H"]
    command += [f"Authorization: Bearer {KEY}", "--checks", "not_a_server_error", "--max-examples", "8", "--seed", "7"]
    command += ["--request-timeout", "60", "--phases", "coverage,fuzzing"]
    done = subprocess.run([*command, "--no-color"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: " in done.stdout
    assert server.is_idle(30)
