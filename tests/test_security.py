"""What docs/security.md promises."""

import ast
import os
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from onelabel.configs.load import load
from onelabel.configs.schema import RunConfig
from onelabel.errors import CheckpointError, ConfigError, DataError
from onelabel.imaging import places
from onelabel.models import checkpoint
from onelabel.tasks.cohort import open_cohort

REPO = Path(__file__).parent.parent
RUNS_DATA = {"eval", "exec", "os.system", "pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load"}
CODE = [path for top in REPO.glob("*/__init__.py") for path in sorted(top.parent.rglob("*.py"))]
DATA = ("data.labelled=a.nii.gz", "data.unlabelled=b/")


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.place),)


def test_weights_run_no_code(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "meta.json").write_bytes((trained / "meta.json").read_bytes())
    torch.save({"weights": Trap(tmp_path / "sprung")}, folder / "weights.pt")
    with pytest.raises(CheckpointError):
        checkpoint.load(folder)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("form", ["file", "key"])
def test_settings_run_no_code(tmp_path: Path, form: str) -> None:
    text = f"!!python/object/apply:os.mkdir ['{tmp_path}/sprung']"
    (tmp_path / "evil.yaml").write_text(f"name: {text}\n")
    with pytest.raises(ConfigError):
        load(["singlestrip", *DATA, str(tmp_path / "evil.yaml") if form == "file" else f"name={text}"])
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("key", ["../out", "/etc/out", "..", ".", "a/b", "a\\b"])
def test_keys_stay_in_the_output_folder(tmp_path: Path, key: str) -> None:
    (tmp_path / "list.csv").write_text(f"key,image\n{key},scan.nii.gz\n")
    with pytest.raises(DataError, match="cannot be the key"):
        open_cohort(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("name", ["../out", "/out", "..", ".hidden", "a/b", "a\n", ""])
def test_names_stay_in_the_storage(name: str) -> None:
    settings = load(["singlestrip", *DATA]).model_dump()
    with pytest.raises(ValidationError):
        RunConfig.model_validate(settings | {"name": name})
    with pytest.raises(ValidationError):
        RunConfig.model_validate(settings | {"stages": [settings["stages"][0] | {"name": name}]})


def test_passwords_in_manifests_are_refused_and_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image\ns3://KEY:secret@bucket/scan.nii.gz\n")
    for look in (open_cohort, places.filesystem):
        place = str(tmp_path / "list.csv") if look is open_cohort else "s3://KEY:secret@bucket/scan.nii.gz"
        with pytest.raises(DataError, match="was given with a password") as caught:
            look(place)
        assert "secret" not in str(caught.value)


def test_nothing_is_recorded_that_names_a_token() -> None:
    recorded = yaml.safe_dump(load(["singlestrip", *DATA]).model_dump(mode="json"))
    assert "token" not in recorded and "password" not in recorded


@pytest.mark.parametrize("path", CODE, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_code_is_made_of_data(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in RUNS_DATA
            words = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert words.get("shell", "False") == "False"
            if called == "torch.load":
                assert words.get("weights_only") == "True"
            if called in {"np.load", "numpy.load"}:
                assert words.get("allow_pickle", "False") == "False"
