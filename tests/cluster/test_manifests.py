"""What is handed to KubeRay, `ray up`, Slurm and Docker, against the rules of those who read it."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from onelabel import __version__
from onelabel.cluster.resources import asked_for, fits, of_stage
from onelabel.configs.load import load

jsonschema = pytest.importorskip("jsonschema")

REPO = Path(__file__).parent.parent.parent
CLUSTER = REPO / "cluster"
SCHEMAS = json.loads(gzip.decompress((Path(__file__).parent / "data" / "kuberay-1.7.0.json.gz").read_bytes()))


def read(name: str) -> Any:
    return yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))


def closed(schema: Any) -> Any:
    """The same schema, which also refuses keys that it does not know: Kubernetes would drop them in silence."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = {key: closed(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        result.setdefault("additionalProperties", False)
    return result


def faults(manifest: Any) -> list[str]:
    validator = jsonschema.Draft202012Validator(closed(SCHEMAS[manifest["kind"]]))
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay-cluster.yaml"])
def test_kuberay_takes_the_manifests(name: str) -> None:
    assert faults(read(name)) == []


def test_a_fault_is_found() -> None:
    manifest = read("kuberay-cluster.yaml")
    manifest["spec"]["workerGroupSpecs"][0] |= {"maxReplica": 1, "minReplicas": "two"}
    del manifest["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert len(faults(manifest)) == 3


def test_the_job_and_the_cluster_are_of_the_same_nodes() -> None:
    assert read("kuberay.yaml")["spec"]["rayClusterSpec"] == read("kuberay-cluster.yaml")["spec"]


def test_nodes_are_closed_by_a_token_and_come_by_need() -> None:
    spec = read("kuberay-cluster.yaml")["spec"]
    assert spec["authOptions"] == {"mode": "token"}
    assert spec["enableInTreeAutoscaling"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    gpus = {
        name: group["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
        for name, group in groups.items()
    }
    assert gpus == {"synthesis": None, "training": "1"}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups.values())


def test_the_autoscaler_can_add_what_the_job_asks_for() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    config = load(read("kuberay.yaml")["spec"]["entrypoint"].split()[2:])
    cluster = read("kuberay-cluster.yaml")
    cluster["metadata"] |= {"namespace": "default"}
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    nodes = [kind["resources"] for kind in kinds.values() for _ in range(kind["max_workers"])]
    for demand in of_stage(config.compute, actor_bytes=1e9, store_bytes=1e9):
        assert fits([asked_for(bundle) for bundle in demand.bundles], nodes)


def test_the_job_runs_a_config_that_loads() -> None:
    program, command, *items = read("kuberay.yaml")["spec"]["entrypoint"].split()
    assert (program, command) == ("onelabel", "run")
    config = load(items)
    group = read("kuberay.yaml")["spec"]["rayClusterSpec"]["workerGroupSpecs"][1]
    there = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert config.compute.cpus_per_worker <= float(there["cpu"])
    assert config.compute.train_workers <= group["maxReplicas"]
    assert Path(config.storage).is_absolute()


def test_ray_up_takes_its_file() -> None:
    config = read("ray-up.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(config)] == []


def test_versions_agree() -> None:
    pinned = re.findall(r"^ray==(.+)$", (REPO / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert [read("kuberay-cluster.yaml")["spec"]["rayVersion"]] == pinned
    for path in CLUSTER.iterdir():
        if path.is_file() and path.suffix != ".py":
            assert set(re.findall(r"onelabel:(\d[\w.]*)", path.read_text(encoding="utf-8"))) <= {__version__}, path


def test_the_image_holds_the_whole_package() -> None:
    lines = (CLUSTER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = {source for line in lines if line.startswith("COPY") for source in line.split()[1:-1]}
    packages = {path.parent.name for path in REPO.glob("*/__init__.py")} - {"tests"}
    assert packages | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} == copied
    assert lines[-3] == "USER 1000"


@pytest.mark.parametrize(
    ("linter", "file"), [("shellcheck", "slurm.sh"), ("hadolint", "Dockerfile")], ids=["shell", "Dockerfile"]
)
def test_linters_find_nothing(linter: str, file: str) -> None:
    program = shutil.which(linter, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"{linter} is not installed")
    done = subprocess.run([program, CLUSTER / file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


FAKES = {
    "scontrol": "echo 127.0.0.1; echo other",
    # what would start Ray on a node says so, and listens as a head would
    "srun": """echo "$@ $RAY_AUTH_MODE ${#RAY_AUTH_TOKEN}" >> "$LOG"
for word in "$@"; do case $word in --port=*) exec python3 -m http.server --bind 127.0.0.1 "${word#--port=}";; esac; done
exec sleep 60""",
    "onelabel": 'until [ "$(wc -l < "$LOG")" = 2 ]; do sleep 0.1; done; echo onelabel "$@" >> "$LOG"; exit 7',
}


def test_slurm_starts_a_head_then_the_others_then_the_run(tmp_path: Path) -> None:
    for name, script in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "LOG": str(tmp_path / "log"), "SLURM_CPUS_PER_TASK": "3"}
    environment |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "some[1-2]"}
    done = subprocess.run(
        ["bash", CLUSTER / "slurm.sh", "singlestrip", "name=a b"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    run = "onelabel run compute.wait_s=300 singlestrip name=a b compute.address=127.0.0.1:23456"
    node = "--nodes=1 --ntasks=1 --cpus-per-task=3 --nodelist={} ray start --block --num-cpus=3 {} token 64"
    head = node.format("127.0.0.1", "--head --port=23456 --include-dashboard=false")
    assert set((tmp_path / "log").read_text().splitlines()) == {
        head,
        node.format("other", "--address=127.0.0.1:23456"),
        run,
    }
