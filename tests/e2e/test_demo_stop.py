"""Ending the demo ends the server that it started, however impatiently it is told."""

import os
import re
import signal
import subprocess
import sys

import httpx
import pytest

DASHBOARD = re.compile(r"dashboard: (http://127\.0\.0\.1:\d+)/")


@pytest.mark.timeout(120)
def test_a_second_signal_does_not_leave_a_server_behind() -> None:
    environment = {
        **os.environ,
        "KIMERA_EMBEDDING__PROVIDER": "hashing",
        "KIMERA_SCORING__VERIFIER": "off",
        "PYTHONUNBUFFERED": "1",
    }
    command = [sys.executable, "-m", "kimera_stream.api.cli.main", "demo", "--pace", "1", "--quiet"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        try:
            found = None
            while found is None:
                line = demo.stdout.readline()
                assert line, "the demo ended before it had a dashboard"
                found = DASHBOARD.search(line)
            assert httpx.get(f"{found[1]}/livez").status_code == 200
            demo.send_signal(signal.SIGTERM)
            demo.send_signal(signal.SIGTERM)
            demo.stdout.read()
            demo.wait()
        finally:
            demo.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found[1]}/livez")
