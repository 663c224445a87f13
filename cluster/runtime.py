"""Join a Ray cluster, or start one on this machine."""

import logging
import os
import platform
import re
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Protocol, Self, TypeVar

import ray
from ray._private import ray_constants
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import onelabel
from onelabel.configs.schema import ComputeConfig
from onelabel.errors import ClusterError, OnelabelError, sentence

log = logging.getLogger(__name__)
T = TypeVar("T")

TOKEN = "give the cluster's own in RAY_AUTH_TOKEN, or a file that holds it in RAY_AUTH_TOKEN_PATH"
PARTS = ("configs", "imaging", "models", "tasks", "cluster", "orchestrator")
_REACH_S = 10
_NODES_S = 300
_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the end of training is noticed at the next poll
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # what Ray warns will be its default
}


@contextmanager
def connect(compute: ComputeConfig, /) -> Iterator[bool]:
    """Join the cluster that `compute.address` or RAY_ADDRESS names, else start one of this machine's cores.

    What was started is stopped at the end; a connection that was there before is used and left open. A cluster of our
    own is closed to others by a token that lives in the environment of its processes, never in a file, unless the user
    has a token or has set RAY_AUTH_MODE. A cluster that is joined has its own rule: RAY_AUTH_MODE, RAY_AUTH_TOKEN.

    Yields
    ------
    bool
        Whether the cluster is not our own, so that somebody may add nodes to it.

    Raises
    ------
    ClusterError : the cluster cannot be reached, refuses the token, or its nodes run another Python, Ray or onelabel.
    """
    if ray.is_initialized():
        yield True
        return
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = compute.address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        if address == "local":
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine back
            _start()
        else:
            _join(address)
        yield address != "local"
    finally:
        ray.shutdown()


def same_versions(here: Mapping[str, str], nodes: Mapping[str, Mapping[str, str]], /) -> None:
    """Refuse nodes (by name) whose versions differ from the driver's.

    Raises
    ------
    ClusterError : naming the first such node and what differs.
    """
    for node, there in nodes.items():
        differing = [name for name in here if there.get(name) != here[name]]
        if differing:
            pairs = " and ".join(f"{name} {there.get(name)} (here {here[name]})" for name in differing)
            raise ClusterError(f"node {node} runs {pairs}; give all nodes the same versions")


def versions() -> dict[str, str]:
    """What must be the same on all nodes."""
    return {"python": platform.python_version(), "ray": ray.__version__, "onelabel": onelabel.__version__}


def in_job() -> bool:
    """Whether this process is the driver of a submitted job, which brought its code with it."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class Place(Protocol):
    """A folder or a file, on a disk or in a store, as a path."""

    def __truediv__(self, name: str, /) -> Self: ...
    def touch(self) -> None: ...
    def unlink(self) -> None: ...
    def is_file(self) -> bool: ...


def check_shared(folder: Place, /) -> None:
    """Refuse a folder that some node does not see.

    Raises
    ------
    ClusterError : naming the first such node.
    """
    probe = folder / f".shared-{secrets.token_hex(8)}"
    probe.touch()
    try:
        blind = {node: why for node, why in _on_all_nodes(_unseen, probe).items() if why}
    finally:
        probe.unlink()
    for node, why in blind.items():
        raise ClusterError(
            f"storage '{folder}' is not shared: node {node} {why}; set storage=FOLDER to one that all nodes mount, or"
            " to a store whose credentials all nodes have"
        )


def package(scratch: Path, /) -> Path:
    """The folder of the whole package as a wheel lays it out; a checkout's parts are copied together in `scratch`."""
    root = Path(onelabel.__file__).parent
    if (root / "orchestrator").is_dir():
        return root
    whole, clutter = scratch / "onelabel", shutil.ignore_patterns("__pycache__")
    shutil.copytree(root, whole, ignore=clutter)
    for part in PARTS:
        shutil.copytree(root.parent / part, whole / part, ignore=clutter)
    return whole


def _start() -> None:
    """A cluster of our own."""
    # Ray would write a token to ~/.ray, and say so.
    given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    if not given and not (Path.home() / ".ray" / "auth_token").is_file():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    # Ray would listen on all interfaces; on systems where it makes no clusters it keeps to 127.0.0.1.
    clusters, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = clusters


def _join(address: str) -> None:
    """Connect to a cluster, hand it this code and compare versions."""
    if "://" in address:
        raise ClusterError(
            f"cluster address '{address}' is a URL: give host:port on a node of the cluster, or submit the run as a job"
        )
    _reach(address)
    with TemporaryDirectory() as scratch:
        environment = {} if in_job() else {"py_modules": [str(package(Path(scratch)))]}
        try:
            ray.init(address=address, runtime_env=environment, log_to_driver=False, logging_level=logging.WARNING)
            same_versions(versions(), _on_all_nodes(versions))
        except (ConnectionError, ray.exceptions.AuthenticationError) as error:
            raise ClusterError(  # something listens there
                f"cluster '{address}' is no Ray head, or refuses the token; {TOKEN}"
            ) from error
        except (RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise ClusterError(f"cluster '{address}' cannot be used: {_reason(error)}") from error


def _reach(address: str) -> None:
    """Fail in seconds where Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # `auto`
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ClusterError(
            f"cluster '{address}' cannot be reached ({error}): check compute.address, RAY_ADDRESS and the firewall"
        ) from error


def _reason(error: BaseException) -> str:
    """What Ray says, as one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = re.findall(r"^(Ray|Python): (\S+)$", "\n".join(lines), flags=re.MULTILINE)
    if len(found) == 4:  # theirs, then ours
        there, here = (" and ".join(f"{name} {version}" for name, version in two) for two in (found[:2], found[2:]))
        return f"it runs {there} (here {here}); give all nodes the same versions"
    return lines[-1]


def _unseen(path: Place) -> str:
    """Why this node does not see a file; nothing if it does."""
    try:
        return "" if path.is_file() else "does not see what this one writes there"
    except (OnelabelError, OSError) as error:
        return f"cannot reach it ({sentence(error)})"


def _on_all_nodes(function: Callable[..., T], *arguments: Any) -> dict[str, T]:
    """What a function returns on every node, which also shows that this code got there."""
    ask = ray.remote(num_cpus=0)(function)
    asked = {
        f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})": ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(*arguments)
        for node in ray.nodes()
        if node["Alive"]
    }
    return dict(zip(asked, ray.get(list(asked.values()), timeout=_NODES_S), strict=True))
