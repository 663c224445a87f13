"""Runs as jobs of a real head with a token, started from the shell."""

import os
import pty
import re
import signal
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from ray_head import Head

from onelabel.orchestrator.rounds import MARKER

pytestmark = pytest.mark.e2e

REPO = Path(__file__).parent.parent.parent
CLI = (sys.executable, "-m", "onelabel.orchestrator")
RAY = (sys.executable, "-m", "ray.scripts.scripts")


@pytest.fixture
def settings(heads: Path, tmp_path: Path) -> list[str]:
    """A run of one round on the cores of the head."""
    data = [f"data.labelled={heads}/labelled.csv", f"data.test={heads}/test.csv"]
    return ["supervised", "smoke", *data, f"storage={tmp_path}/runs", "compute.synth_cpus=0.5"]


def call(head: Head, *command: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    given = head.environment | {"PYTHONPATH": str(REPO)} | environment
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True, check=False, timeout=1500)


def assert_done(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== round-00 supervised" in done.stdout
    assert (folder / "runs/supervised/round-00" / MARKER).is_file()


def test_a_checkout_is_submitted_and_followed(head: Head, settings: list[str], tmp_path: Path) -> None:
    done = call(head, *CLI, "submit", *settings, "--address", head.url, cwd=tmp_path)
    assert_done(tmp_path, done)
    job = re.findall(r"^job (\w+)$", done.stderr, flags=re.MULTILINE)[0]
    assert f"job {job} succeeded" in done.stderr
    for option in ("--status", "--stop"):
        asked = call(head, *CLI, "submit", option, job, "--address", head.url, cwd=tmp_path)
        assert (asked.returncode, asked.stdout.strip()) == (0, f"{job}: succeeded"), asked.stderr


def test_ray_itself_submits_a_checkout(head: Head, settings: list[str], tmp_path: Path) -> None:
    command = ("job", "submit", "--address", head.url, "--working-dir", str(REPO), "--")
    done = call(head, *RAY, *command, "python", "-m", "onelabel.orchestrator", "run", *settings, cwd=tmp_path)
    assert_done(tmp_path, done)


def test_storage_that_ends_with_the_job_is_refused(head: Head, settings: list[str], tmp_path: Path) -> None:
    command = ("job", "submit", "--address", head.url, "--working-dir", str(REPO), "--")
    run = ("python", "-m", "onelabel.orchestrator", "run", *settings, "storage=runs")
    done = call(head, *RAY, *command, *run, cwd=tmp_path)
    assert "storage 'runs' lies in the folder of a submitted job" in done.stdout


@pytest.mark.parametrize("token", ["", "wrong" * 8])
def test_a_wrong_token_is_one_sentence(head: Head, settings: list[str], tmp_path: Path, token: str) -> None:
    submitted = call(head, *CLI, "submit", *settings, "--address", head.url, cwd=tmp_path, RAY_AUTH_TOKEN=token)
    joined = call(head, *CLI, "run", *settings, f"compute.address={head.gcs}", cwd=tmp_path, RAY_AUTH_TOKEN=token)
    for done in (submitted, joined):
        assert done.returncode == 2, done.stderr
        assert "refuses the token; give the cluster's own in RAY_AUTH_TOKEN" in done.stderr.splitlines()[-1]


def test_no_such_job_is_one_sentence(head: Head, tmp_path: Path) -> None:
    done = call(head, *CLI, "submit", "--status", "nobody", "--address", head.url, cwd=tmp_path)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "nobody does not exist" in done.stderr


@pytest.mark.parametrize(("answer", "state"), [("y\n", "stopped"), ("n\n", "running")])
def test_ctrl_c_asks_whether_to_stop(head: Head, settings: list[str], tmp_path: Path, answer: str, state: str) -> None:
    ours, theirs = pty.openpty()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children inherit it where a test runner ignores it
    with subprocess.Popen(
        [*CLI, "submit", *settings, "--address", head.url],
        cwd=tmp_path,
        env=head.environment | {"PYTHONPATH": str(REPO)},
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout and process.stderr
        job = next(line.split()[1] for line in process.stderr if line.startswith("job "))
        next(line for line in process.stdout if "Running entrypoint" in line)
        process.send_signal(signal.SIGINT)
        os.write(ours, answer.encode())
        assert process.wait(timeout=300) == 130
    os.close(ours)
    os.close(theirs)
    asked = call(head, *CLI, "submit", "--status", job, "--address", head.url, cwd=tmp_path)
    assert asked.stdout.strip() == f"{job}: {state}"
    stopped = call(head, *CLI, "submit", "--stop", job, "--address", head.url, cwd=tmp_path)
    assert stopped.stdout.strip() == f"{job}: stopped"


@pytest.fixture
def blind(head: Head, tmp_path: Path) -> Iterator[None]:
    """A second node, in whose eyes the storage, and what Ray keeps, are empty folders of its own."""
    (tmp_path / "runs").mkdir()
    mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in (tmp_path / "runs", head.temp))
    script = f"{mounts} exec {sys.executable} -m ray.scripts.scripts start --block"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to make mount namespaces")
    process = subprocess.Popen(
        ["unshare", "--mount", "bash", "-c", f"{script} --address={head.gcs} --num-cpus=1"],
        env=head.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    yield
    head.end(process)


def test_storage_of_one_node_is_refused(head: Head, blind: None, settings: list[str], tmp_path: Path) -> None:
    need = "compute.score_actors=3"  # of which one finds room on the second node alone
    done = call(head, *CLI, "submit", *settings, need, "compute.wait_s=300", "--address", head.url, cwd=tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"storage '.*' is not shared: node \S+ \(\w+\) does not see", done.stdout), done.stdout


def test_what_is_large_or_private_does_not_travel(tmp_path: Path) -> None:
    """With .rayignore alone: .gitignore need not be there, nor heeded."""
    stays = [".git/config", ".venv/bin/python", "runs/study/weights.pt", "mlruns/0/meta.yaml", "mlflow.db", "build/x"]
    stays += [".data/head.nii.gz", "dist/onelabel.whl", "onelabel/__pycache__/x.pyc"]
    travels = ["onelabel/__init__.py", "configs/smoke.yaml", "models/brain/weights.pt", "pyproject.toml"]
    for name in (*stays, *travels):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).touch()
    (tmp_path / "checkout" / ".rayignore").write_bytes((REPO / ".rayignore").read_bytes())
    create_package(str(tmp_path / "checkout"), tmp_path / "package.zip", include_gitignore=False)
    names = {name for name in zipfile.ZipFile(tmp_path / "package.zip").namelist() if not name.endswith("/")}
    assert names == {*travels, ".rayignore"}
