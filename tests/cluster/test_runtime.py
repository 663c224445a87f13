import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray._private.utils import check_version_info

from onelabel.cluster import runtime
from onelabel.configs.schema import ComputeConfig
from onelabel.errors import ClusterError

OWN = """
import os, pathlib
import psutil
import ray
from onelabel.cluster import runtime
from onelabel.configs.schema import ComputeConfig

with runtime.connect(ComputeConfig()) as joined:
    assert not joined
    assert ray.get(ray.remote(lambda: 3).remote()) == 3
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    heard = {c.laddr.ip for one in family for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert heard and heard <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}, heard
assert not ray.is_initialized()
assert not (pathlib.Path.home() / ".ray").exists(), "a secret was written"
"""

JOIN = """
import sys
import ray
from onelabel.cluster import runtime
from onelabel.configs.schema import ComputeConfig

def where():
    from onelabel.models import losses
    return losses.__file__

with runtime.connect(ComputeConfig(address=sys.argv[1])) as joined:
    assert joined
    print(ray.get(ray.remote(where).remote()))
"""


def python(source: str, *arguments: str, cwd: Path, without: tuple[str, ...] = (), home: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in {"RAY_ADDRESS", *without}}
    if home is not None:
        environment["HOME"] = str(home)
    command = [sys.executable, "-c", source, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "uthenticat" not in done.stderr
    return done.stdout.strip()


@pytest.mark.e2e
def test_a_cluster_of_our_own_listens_here_alone_and_leaves_no_secret(tmp_path: Path) -> None:
    given = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    python(OWN, cwd=tmp_path, without=given, home=tmp_path)


@pytest.mark.e2e
def test_a_joined_cluster_gets_this_code(ray_cluster: None, tmp_path: Path) -> None:
    found = Path(python(JOIN, ray.get_runtime_context().gcs_address, cwd=tmp_path))
    assert "py_modules" in found.as_posix()
    assert found.parts[-3:] == ("onelabel", "models", "losses.py")


def test_a_connection_that_is_there_is_used_and_kept(ray_cluster: None) -> None:
    with runtime.connect(ComputeConfig(address="127.0.0.1:1")):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("127.0.0.1:1", "'127.0.0.1:1' cannot be reached"),
        ("http://127.0.0.1:8265", "is a URL"),
        ("ray://127.0.0.1:10001", "is a URL"),
    ],
)
def test_a_cluster_out_of_reach_is_one_sentence(address: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever cluster the other tests share stays as it is.
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    for place in ("compute", "environment"):
        compute = ComputeConfig(address=address if place == "compute" else None)
        if place == "environment":
            monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ClusterError, match=problem) as caught, runtime.connect(compute):
            pass
        assert "\n" not in str(caught.value)


def test_nodes_of_another_version_are_refused() -> None:
    here = runtime.versions()
    runtime.same_versions(here, {"a": dict(here), "b": dict(here)})
    with pytest.raises(ClusterError, match=r"node b runs ray 1\.0 \(here"):
        runtime.same_versions(here, {"a": dict(here), "b": here | {"ray": "1.0"}})


@pytest.mark.parametrize(("name", "version"), [("ray_version", "2.1.0"), ("python_version", "3.9.1")])
def test_a_head_of_another_version_is_one_sentence(name: str, version: str) -> None:
    here = {"ray_version": ray.__version__, "python_version": platform.python_version()}
    with pytest.raises(RuntimeError) as caught:
        check_version_info(here | {name: version}, "node 127.0.0.1")  # as Ray does when it joins
    both = (here | {name: version}, here)
    theirs, ours = (f"Ray {each['ray_version']} and Python {each['python_version']}" for each in both)
    assert runtime._reason(caught.value) == f"it runs {theirs} (here {ours}); give all nodes the same versions"


def test_a_folder_that_all_nodes_see_is_shared(ray_cluster: None, tmp_path: Path) -> None:
    runtime.check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_shipped_is_the_whole_package(tmp_path: Path) -> None:
    shipped = runtime.package(tmp_path)
    assert shipped.name == "onelabel"
    source = "import onelabel.orchestrator.cli as c, onelabel.tasks.cohort as t; print(c.__file__, t.__file__)"
    command = [sys.executable, "-c", source]
    environment = os.environ | {"PYTHONPATH": str(shipped.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert all(Path(file).is_relative_to(shipped) for file in done.stdout.split())
