"""A head as `ray start` makes it, with a token, on ports and in folders of its own."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import psutil

_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "metrics-export-port")
_OPTIONS = ("--num-cpus=2", "--object-store-memory=200000000", "--min-worker-port=0", "--max-worker-port=0")
_START_S = 600


class Head:
    """A running head.

    url : of its dashboard; gcs : host:port; environment : with the token; temp : where Ray keeps what a node needs
    """

    def __init__(self, home: Path, temp: Path) -> None:
        self.temp = temp
        ours = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = ours | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": os.urandom(32).hex(),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self.environment.pop("PYTHONPATH", None)
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        self.url = f"http://127.0.0.1:{ports['dashboard-port']}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={temp}"]
        self._log = home / "head.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, *_OPTIONS, *(f"--{name}={port}" for name, port in ports.items())],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self._wait()
        self.gcs = f"127.0.0.1:{ports['port']}"

    def end(self, process: "subprocess.Popen[bytes] | None" = None) -> None:
        """End a process of `ray start`, by default the head's, and all that it started."""
        process = process or self._process
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.terminate()
        for survivor in psutil.wait_procs(family, timeout=30)[1]:
            survivor.kill()
        process.wait()

    def _wait(self) -> None:
        end = time.monotonic() + _START_S
        request = urllib.request.Request(f"{self.url}/api/version")
        request.add_header("Authorization", f"Bearer {self.environment['RAY_AUTH_TOKEN']}")
        while "Ray runtime started" not in self._log.read_text():
            assert self._process.poll() is None and time.monotonic() < end, self._log.read_text()
            time.sleep(0.5)
        while True:
            try:
                urllib.request.urlopen(request, timeout=30).close()
                return
            except (urllib.error.URLError, TimeoutError):
                assert time.monotonic() < end, self._log.read_text()
                time.sleep(0.5)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]
