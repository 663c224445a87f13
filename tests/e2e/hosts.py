"""Hosts out of namespaces: each its own network address, processes, /tmp and shared memory; killed as a whole."""

import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

REPO = Path(__file__).parents[2]
_RAY = (sys.executable, "-m", "ray.scripts.scripts", "start", "--block")
# What lies under /tmp is seen no more, but for the checkout.
_BEGIN = f"""
mount --rbind {REPO} /mnt && mount -t tmpfs none /tmp && mount -t tmpfs none /dev/shm
mkdir -p {REPO} /tmp/home && mount --rbind /mnt {REPO} && ip link set lo up && exec sleep infinity
"""
_START_S = 600


class Host:
    """One host on a bridge. Its first process ends all others with it."""

    def __init__(self, net: "Net", number: int) -> None:
        self.address = f"{net.prefix}.{number}"
        flags = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
        self._holder = subprocess.Popen(["unshare", *flags, "bash", "-ec", _BEGIN], stdin=subprocess.DEVNULL)
        _await(lambda: any(child.name() == "sleep" for child in psutil.Process(self._holder.pid).children()))
        (first,) = psutil.Process(self._holder.pid).children()
        self._first, self._started = first.pid, list[subprocess.Popen[bytes]]()
        self._space = os.readlink(f"/proc/{first.pid}/ns/pid")
        _ip("link", "add", f"{net.name}-{number}", "type", "veth", "peer", "name", "eth0", "netns", str(first.pid))
        _ip("link", "set", f"{net.name}-{number}", "master", net.name, "up")
        for command in (("address", "add", f"{self.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            subprocess.run(self._inside("ip", *command), check=True)

    def start(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
        """A process there, whose output goes to a file here."""
        own = {
            "HOME": "/tmp/home",
            "PYTHONPATH": str(REPO),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                self._inside(*command),
                env=os.environ | environment | own,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._started.append(process)
        return process

    def ray(self, environment: Mapping[str, str], log: Path, *options: str) -> None:
        """Start Ray there."""
        more = (f"--node-ip-address={self.address}", "--object-store-memory=100000000")
        process = self.start([*_RAY, *more, *options], environment, log)
        _await(lambda: "Ray runtime started" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()

    def runs(self, title: str) -> bool:
        """Whether a process with this in its title is there."""
        for process in psutil.process_iter():
            try:
                if os.readlink(f"/proc/{process.pid}/ns/pid") == self._space and title in " ".join(process.cmdline()):
                    return True
            except (psutil.Error, OSError):
                continue
        return False

    def kill(self) -> None:
        """As if the power went."""
        if self._holder.poll() is None:
            os.kill(self._first, 9)
            for process in (self._holder, *self._started):
                process.wait()

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--target={self._first}", "--net", "--mount", "--pid", "--", *command]


class Net:
    """A bridge, with an address on this side, and hosts on it."""

    def __init__(self) -> None:
        self.name, self.prefix = f"ol{secrets.token_hex(3)}", f"10.{secrets.randbelow(100) + 100}.77"
        self.address = f"{self.prefix}.254"
        self.hosts: list[Host] = []

    def host(self) -> Host:
        """One more."""
        self.hosts.append(Host(self, len(self.hosts) + 1))
        return self.hosts[-1]


@contextmanager
def net() -> Iterator[Net]:
    """A bridge; at the end all is gone.

    Raises
    ------
    PermissionError : this user may not make such things.
    """
    found = Net()
    try:
        _ip("link", "add", found.name, "type", "bridge")
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        raise PermissionError("no right to make bridges, or no iproute2") from error
    try:
        _ip("address", "add", f"{found.address}/24", "dev", found.name)
        _ip("link", "set", found.name, "up")
        yield found
    finally:
        for host in found.hosts:
            host.kill()
        _ip("link", "delete", found.name)


def _ip(*command: str) -> None:
    subprocess.run(["ip", *command], check=True, capture_output=True)


def _await(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + _START_S
    while not reached():
        assert time.monotonic() < end, "a host did not come up"
        time.sleep(0.1)
