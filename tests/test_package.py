"""The wheel, installed away from the checkout and started beside a folder that carries one of its names."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ray_head import Head

REPO = Path(__file__).parent.parent
SOURCES = ("onelabel", "configs", "imaging", "models", "tasks", "cluster", "orchestrator")
FILES = ("pyproject.toml", "README.md", "LICENSE")

IN_ACTOR = """
import pathlib
import ray
import onelabel

@ray.remote(num_cpus=1)
class Probe:
    def where(self):
        from onelabel.models import losses
        return losses.__file__

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
found = ray.get(Probe.remote().where.remote(), timeout=120)
expected = pathlib.Path(onelabel.__file__).parent / "models" / "losses.py"
assert pathlib.Path(found) == expected, (found, expected)
ray.shutdown()
"""


def call(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "RAY_ADDRESS"}}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools would pick up what an earlier build left behind in build/."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in SOURCES:
        shutil.copytree(REPO / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(REPO / file, source)
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    call(*pip, "--wheel-dir", out, source, cwd=source)
    return next(out.glob("onelabel-*.whl"))


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that holds the wheel and borrows the dependencies of the running one."""
    venv = tmp_path_factory.mktemp("venv")
    call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    python = venv / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet")
    call(*pip, wheel, cwd=venv)
    # The borrowed folder's own .pth files are not read, hence not its editable install either.
    site = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=venv))
    borrowed = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return venv


@pytest.fixture
def decoy(tmp_path: Path) -> Path:
    """A current folder with packages of the same bare names, which fail when imported."""
    for folder in ("models", "tasks", "cluster"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text("raise ImportError('the decoy was imported')\n")
    return tmp_path


@pytest.mark.e2e
def test_the_wheel_is_complete(fresh: Path, decoy: Path) -> None:
    where = call(fresh / "bin" / "python", "-c", "import onelabel; print(onelabel.__file__)", cwd=decoy)
    assert Path(where).is_relative_to(fresh)
    for folder in SOURCES:
        installed = Path(where).parent if folder == "onelabel" else Path(where).parent / folder
        for file in (REPO / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert (installed / file.relative_to(REPO / folder)).is_file(), f"{file} is not in the wheel"


@pytest.mark.e2e
def test_an_actor_imports_the_wheel_beside_a_decoy(fresh: Path, decoy: Path) -> None:
    (decoy / "probe.py").write_text(IN_ACTOR, encoding="utf-8")
    call(fresh / "bin" / "python", "probe.py", cwd=decoy)


@pytest.mark.e2e
def test_the_console_script_starts_beside_a_decoy(fresh: Path, decoy: Path) -> None:
    assert "onelabel" in call(fresh / "bin" / "onelabel", "--help", cwd=decoy)


@pytest.mark.e2e
def test_a_wheel_submits_itself(fresh: Path, decoy: Path, head: "Head") -> None:
    """Its job finds no scan: the sentence that says so comes from the head."""
    settings = ("singlestrip", "data.labelled=none.nii.gz", "data.unlabelled=scans", f"storage={decoy}")
    command = (fresh / "bin" / "onelabel", "submit", *settings, "--address", head.url)
    done = subprocess.run(
        command, cwd=decoy, env=head.environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"{decoy}/none.nii.gz" in done.stdout.splitlines()[-1]
