import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from onelabel.configs.schema import AutoencoderNetworkConfig, UNetConfig
from onelabel.errors import CheckpointError
from onelabel.models import checkpoint
from onelabel.models.checkpoint import Meta

Saved = Callable[..., tuple[Path, nn.Module, Meta]]
NETWORKS = [
    UNetConfig(channels=(8, 16), norm="batch"),
    UNetConfig(channels=(8,), patch=1, dims=2),
    AutoencoderNetworkConfig(size=64, width=8, latent=16),
]


def refusal(folder: Path) -> str:
    """The message with which a checkpoint is refused: one sentence on one line that names it."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    assert str(folder) in message
    return message


def example(config: Any) -> torch.Tensor:
    if isinstance(config, UNetConfig):
        return torch.rand(1, 1, *[16] * config.dims)
    return torch.rand(1, config.classes, *[config.size] * config.dims)


@pytest.mark.parametrize("config", NETWORKS, ids=lambda config: f"{config.type}-{config.dims}d")
def test_a_network_comes_back_as_it_was(saved: Saved, config: Any) -> None:
    folder, network, meta = saved(config=config)
    again, facts = checkpoint.load(folder)
    assert facts == meta
    assert not again.training
    batch = example(config)
    with torch.no_grad():
        assert torch.equal(again(batch), network(batch))


def test_a_checkpoint_from_before_heads_loads(saved: Saved) -> None:
    folder, network, _ = saved()
    facts = json.loads((folder / "meta.json").read_text())
    assert facts["network"].pop("heads") == 0
    (folder / "meta.json").write_text(json.dumps(facts))
    again = checkpoint.load(folder)[0].state_dict()
    assert again.keys() == network.state_dict().keys()


def test_facts_are_readable_by_anyone(saved: Saved) -> None:
    folder, _, meta = saved()
    facts = json.loads((folder / "meta.json").read_text())
    assert set(facts) == set(asdict(meta))
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["network"] == meta.network


def test_weights_are_not_pickled_classes(saved: Saved) -> None:
    folder, _, _ = saved()
    state = torch.load(folder / "weights.pt", weights_only=True)
    assert all(type(value) is torch.Tensor for value in state.values())


def test_nothing_but_the_checkpoint_is_left(saved: Saved) -> None:
    folder, network, meta = saved()
    checkpoint.save(folder, network, replace(meta, step=8))
    assert checkpoint.load(folder)[1].step == 8
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "weights.pt"]


def test_a_failed_save_leaves_the_old_one(saved: Saved) -> None:
    folder, network, meta = saved()
    unwritable = replace(meta, step=9, git=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        checkpoint.save(folder, network, unwritable)
    assert checkpoint.load(folder)[1] == meta
    checkpoint.save(folder, network, replace(meta, step=9))
    assert checkpoint.load(folder)[1].step == 9
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_failed_first_save_leaves_no_checkpoint(saved: Saved, tmp_path: Path) -> None:
    _, network, meta = saved()
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "new", network, replace(meta, git=object()))  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_no_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(tmp_path / "absent")
    assert "no checkpoint at" in refusal(tmp_path)


class Evil:
    """What a weights file must not be able to run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


@pytest.mark.parametrize(
    "content",
    [b"", b"not weights", b"PK\x03\x04", pickle.dumps([1, 2], protocol=2), pickle.dumps(Evil(), protocol=2)],
    ids=["empty", "text", "cut", "list", "code"],
)
def test_broken_weights(saved: Saved, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _, _ = saved()
    (folder / "weights.pt").write_bytes(content)
    refusal(folder)
    assert not Path("evil").exists()


def test_truncated_weights(saved: Saved) -> None:
    folder, _, _ = saved()
    whole = (folder / "weights.pt").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 1):
        (folder / "weights.pt").write_bytes(whole[:length])
        refusal(folder)


def test_weights_that_are_no_state(saved: Saved) -> None:
    folder, _, _ = saved()
    for odd in (torch.zeros(3), [1, 2], {"a": torch.zeros(1)}):
        torch.save(odd, folder / "weights.pt")
        refusal(folder)


def test_missing_weights(saved: Saved) -> None:
    folder, _, _ = saved()
    (folder / "weights.pt").unlink()
    refusal(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"network": {"type": "unet", "channels": [8, 8]}},
        {"network": {"type": "unet", "depth": 3}},
        {"network": {"type": "transformer"}},
        {"network": {}},
        {"network": None},
        {"classes": 3},
        {"surprise": 1},
    ],
    ids=str,
)
def test_facts_of_another_network(saved: Saved, change: dict[str, Any]) -> None:
    folder, _, _ = saved()
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | change))
    refusal(folder)


@pytest.mark.parametrize("change", [{"labels": {"newfield": 1}}, {"classes": ["background", "a", "b"]}], ids=str)
def test_classes_that_the_network_does_not_have(saved: Saved, change: dict[str, Any]) -> None:
    folder, _, _ = saved()
    facts = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps(facts | change))
    with pytest.raises(CheckpointError, match="names the classes"):
        checkpoint.load_segmenter(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", "\xff"])
def test_facts_that_are_none(saved: Saved, text: str) -> None:
    folder, _, _ = saved()
    (folder / "meta.json").write_text(text, encoding="latin-1")
    refusal(folder)


def test_weights_of_another_network(saved: Saved) -> None:
    one, _, _ = saved("one")
    two, _, _ = saved("two", UNetConfig(channels=(8, 8)))
    (one / "weights.pt").write_bytes((two / "weights.pt").read_bytes())
    refusal(one)


def test_an_autoencoder_segments_nothing(saved: Saved) -> None:
    folder, _, _ = saved(config=NETWORKS[-1])
    checkpoint.load(folder)
    with pytest.raises(CheckpointError, match="autoencoder, not a segmentation network"):
        checkpoint.load_segmenter(folder)


@pytest.mark.parametrize("last", [2, 10, 100])
def test_a_runs_folder_stands_for_its_last_trained_round(saved: Saved, tmp_path: Path, last: int) -> None:
    for index in sorted({0, 1, 9, 99, last} & set(range(last + 1))):
        saved(f"run/round-{index:02d}/checkpoint")
    (tmp_path / "run" / f"round-{last + 1:02d}" / "checkpoint").mkdir(parents=True)
    saved("run/rankers/autoencoder-00", NETWORKS[-1])
    expected = tmp_path / "run" / f"round-{last:02d}" / "checkpoint"
    assert checkpoint.find(tmp_path / "run") == expected
    assert checkpoint.find(expected) == expected
    assert checkpoint.load_segmenter(tmp_path / "run")[1].step == 7


def test_provenance_says_what_made_it() -> None:
    found = checkpoint.provenance()
    assert set(found) == {"versions", "git"}
    assert set(found["versions"]) == {"onelabel", "torch", "python"}
    assert all(found["versions"].values())
