import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow as pa
import pytest

from onelabel.configs.load import dump, load
from onelabel.configs.schema import RunConfig
from onelabel.errors import DataError
from onelabel.orchestrator import driver, page, sections
from onelabel.orchestrator.rounds import plan
from onelabel.orchestrator.select import select
from onelabel.orchestrator.summary import summarise
from onelabel.orchestrator.tracking import Tracker, open_client
from onelabel.tasks.score import SCHEMA

SIZE = (12, 14, 10)
HOSTILE = "<script>alert('x')</script>"
# Score and true Dice by key; the best two are selected.
SCANS: dict[str, tuple[float | None, float | None]] = {
    "a": (0.91, 0.95),
    "b": (0.82, 0.91),
    "c": (0.73, 0.93),
    HOSTILE: (0.64, 0.7),
    "e": (0.55, 0.8),
}
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """What a page holds; tags that do not close each other are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.parts: dict[str, str] = {}
        self.headings: list[str] = []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h2", "h3"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h2", "h3"):
            self.headings[-1] += data
        elif self.headings:
            self.parts[self.headings[-1]] = self.parts.get(self.headings[-1], "") + data

    def words(self, heading: str) -> str:
        return " ".join(self.parts[heading].split())

    def cells(self, heading: str) -> list[list[str]]:
        """The rows of all tables below a heading."""
        (_, _, after) = self.html.partition(f">{heading}</h")
        below = re.split("<h[23]>", after)[0]
        rows = re.findall("<tr>(<td.*?)</tr>", below, flags=re.DOTALL)
        return [re.findall("<td[^>]*>(.*?)</td>", row) for row in rows]

    def attributes(self, name: str) -> Iterator[str]:
        return (value for _, attributes in self.tags if (value := attributes.get(name)) is not None)


def write_head(folder: Path, name: str, radius: float = 0.25) -> dict[str, str]:
    """A ball in a ball, and its mask."""
    away = np.linalg.norm((np.indices(SIZE).T / (np.array(SIZE) - 1) - 0.5), axis=-1).T
    noise = np.random.default_rng(0).uniform(0, 9, SIZE)
    paths = {}
    for kind, data in (("image", np.where(away < 0.4, 80, 0) + noise), ("label", away < radius)):
        paths[kind] = str(folder / f"{name}_{kind}.nii.gz")
        nib.save(nib.Nifti1Image(data.astype(np.float32), np.diag([14.0, 14.0, 14.0, 1.0])), paths[kind])
    return paths


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Manifests of one labelled scan, and of those in SCANS."""
    folder = tmp_path_factory.mktemp("data")
    lines = ["key,image,label"]
    for place, key in enumerate(SCANS):
        paths = write_head(folder, f"scan{place}")
        lines.append(f"{key},{paths['image']},{paths['label']}")
    (folder / "unlabelled.csv").write_text("\n".join(lines))
    paths = write_head(folder, "labelled")
    (folder / "labelled.csv").write_text(f"image,label\n{paths['image']},{paths['label']}")
    return folder


def configure(data: Path, folder: Path, *more: str) -> RunConfig:
    sources = [f"data.{name}={data / name}.csv" for name in ("labelled", "unlabelled")]
    sizes = ["stages.1.rounds=1", "stages.0.steps=6", "stages.1.steps=6", f"storage={folder.parent}"]
    config = load(["singlestrip", "smoke", f"name={folder.name}", *sources, *sizes, *more])
    folder.mkdir(parents=True)
    dump(config, folder / "config.yaml")
    return config


def score(data: Path, masks: Path, scans: dict[str, tuple[float | None, float | None]] = SCANS) -> pa.Table:
    """A table of scores, and the masks that it names."""
    masks.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    for place, (key, (value, dice)) in enumerate(scans.items()):
        mask = write_head(masks, f"mask{place}", radius=0.2)["label"]
        row = {"key": key, "image": str(data / f"scan{place}_image.nii.gz"), "mask": mask}
        row |= {"expected_dice": 0.95 - 0.01 * place, "expected_low": 0.8, "expected_high": 0.97}
        rows.append(row | {"score": value, "dice": dice, "volume_mm3": 1.5e6, "hd95_mm": 3.0, "asd_mm": 1.0})
    rows.append({"key": "broken", "image": "x.nii", "error": f"DataError: {HOSTILE} is damaged"})
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def finish(config: RunConfig, folder: Path, data: Path, rounds: int = 2, **more: Any) -> None:
    """Rounds as a run leaves them."""
    for now in plan(config, folder)[:rounds]:
        now.folder.mkdir()
        scores = score(data, now.folder / "masks", **more)
        tables = {"scores": scores, "selection": select(scores, now.stage.select)}
        for name, table in tables.items():
            now.write_table(name, table)
        training = {"seconds": 90.0, "steps_per_s": 2.5, "wait_share": 0.25, "idle_share": 0.5}
        figures = {"training": now.training(training), "seconds": {"round": 120.0, "scoring": 7.0}}
        now.commit(figures | summarise(tables))


def log(tracker: Tracker, config: RunConfig, folder: Path) -> None:
    for name in (*(now.name for now in plan(config, folder)), "ranker autoencoder"):
        with tracker.round(name) as track:
            for step in (2, 4, 6):
                track.losses({"step": step, "loss": 1 / step, "steps_per_s": 2, "wait_share": 0.25, "idle_share": 0.5})


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with its report."""
    folder = tmp_path_factory.mktemp("runs") / "trial"
    config = configure(data, folder)
    finish(config, folder, data)
    with Tracker(config, folder) as tracker:
        log(tracker, config, folder)
    assert page.write(folder) == folder / "report.html"
    return folder


@pytest.fixture(scope="module")
def whole(run: Path) -> Page:
    return Page(run / "report.html")


def test_all_parts_are_there(whole: Page) -> None:
    assert [heading for heading in whole.headings if "scans" not in heading or heading in page.SECTIONS] == [
        *page.SECTIONS
    ]
    assert "cannot be shown" not in whole.html
    plots = [value for value in whole.attributes("aria-label") if ":" in value or "." in value]
    for words in ("Training of the network", "Training of the ranker autoencoder", "Speed of training", "Who waits"):
        assert sum(words in plot for plot in plots) == 1
    assert sum("Spearman 0.80" in plot and "Pearson" in plot for plot in plots) == 2  # a round each
    assert "2 of 2" in whole.html and "0.858" in whole.html  # mean Dice


def test_what_was_expected_is_held_against_the_truth(whole: Page) -> None:
    # 0.95, 0.94, ... of 0.95, 0.91, 0.93, 0.7, 0.8
    plots = [value for value in whole.attributes("aria-label") if "Expected against true Dice" in value]
    assert len(plots) == 2 and all("5 scans. mean absolute error 0.072, 80% inside the bars" in plot for plot in plots)
    assert "round-01: 0 of 6 masks are expected to have a Dice below 0.9." in whole.words("Expected Dice")


def test_nothing_is_fetched(whole: Page) -> None:
    references = [*whole.attributes("src"), *whole.attributes("href"), *whole.attributes("xlink:href")]
    assert references and all(value.startswith(("data:image/png;base64,", "#")) for value in references)
    assert not re.search(r"url\((?!#)|@import|https?://", whole.html)


def test_ids_are_unique_and_pictures_have_words(whole: Page) -> None:
    ids = [*whole.attributes("id")]
    assert len(ids) == len(set(ids))
    referred = {value[1:] for value in (*whole.attributes("href"), *whole.attributes("xlink:href")) if value[0] == "#"}
    referred |= set(re.findall(r"url\(#(.*?)\)", whole.html))
    assert referred <= set(ids)
    assert all(attributes.get("alt") for tag, attributes in whole.tags if tag == "img")
    assert all(attributes.get("aria-label") for tag, attributes in whole.tags if tag == "svg")


def test_a_key_is_no_code(whole: Page) -> None:
    assert "<script>alert" not in whole.html
    assert sum(tag == "script" for tag, _ in whole.tags) == 1
    assert any(HOSTILE in value for value in whole.attributes("alt"))
    assert [row[0] for row in whole.cells("Failed scans")] == ["broken"]
    assert "is damaged" in whole.cells("Failed scans")[0][2] and whole.cells("Failed scans")[0][3] == "0, 1"


def test_scans_stand_where_they_belong_worst_first(whole: Page) -> None:
    selected, others = (whole.cells(name) for name in ("Selected: 2 scans", "Not selected: 3 scans"))
    assert [row[0] for row in selected] == ["b", "a"]
    assert [(row[0], row[-1]) for row in selected] == [("b", "0, 1"), ("a", "0, 1")]
    assert [row[1] for row in others] == ["0.550", "0.640", "0.730"]
    assert [value.split()[2] for value in whole.attributes("alt") if value.startswith("Mask of")][:2] == ["b", "a"]


def test_material_shows_bins_and_samples(whole: Page) -> None:
    alts = [value for value in whole.attributes("alt") if not value.startswith("Mask of")]
    assert len(alts) == 3 + sections.SAMPLES
    assert "2 bins inside" in alts[1] and "8 outside" in alts[2]
    assert ["selftrain", "1", "6", "train", "real", "selected", "0.50"] in whole.cells(
        "What the network was trained on"
    )


def test_speed_is_told(whole: Page) -> None:
    row = whole.cells("Speed and waiting")[0]
    assert row == ["round-00", "1.50", "2.50", "25.00", "50.00", "7.00", "2.00"]


def test_settings_that_differ(whole: Page, run: Path) -> None:
    listed = {row[0]: row[1:] for row in whole.cells("Settings")}
    assert listed["stages.0.steps"] == ["6", "no default"] and listed["tracking.every"] == ["2", "20"]
    assert "seed" not in listed and "compute.threads" not in listed
    assert "checkpoint_every_s: 120.0" in whole.parts["Settings"]


def test_the_record_in_mlflow(run: Path) -> None:
    client, run_id = open_client(f"sqlite:///{run}/mlflow.db"), json.loads((run / "mlflow.json").read_text())["run"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert "report.html" in {item.path for item in client.list_artifacts(run_id)}
    pictures = {item.path for item in client.list_artifacts(run_id, "report")}
    assert {"report/loss.svg", "report/round-00-score-and-dice.svg", "report/selected-00.png"} <= pictures


def test_another_file_leaves_the_run_alone(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert page.write(run, tmp_path / "new" / "page.html").is_file()
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


def test_a_copy_does_not_write_into_the_original(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = sorted(run.rglob("*"))
    folder = shutil.copytree(run, tmp_path / "copy")
    (folder / "report.html").unlink()
    assert "Training of the network" in Page(page.write(folder)).html
    assert sorted(run.rglob("*")) == before and "is a copy of the run" in caplog.text


def test_a_run_that_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    """The second round has scores and no more; the record stays open."""
    folder = tmp_path / "trial"
    config = configure(data, folder)
    finish(config, folder, data, rounds=1)
    shutil.copy(run / "mlflow.db", folder)
    tracker = Tracker(config, folder)
    second = plan(config, folder)[1]
    scores = score(
        data, second.folder / "masks", {key: (1 - value, dice) for key, (value, dice) in SCANS.items() if value}
    )
    second.write_table("scores", scores)
    made = Page(page.write(folder))
    assert "1 of 2" in made.html and "round-01 is in progress" in made.html
    assert [row[0] for row in made.cells("Selected: 2 scans")][1] == "e"
    assert "No loss was logged for round-00, round-01." in made.words("Losses")
    assert open_client(tracker.uri).get_run(tracker.run_id).info.status == "RUNNING"


def test_a_run_that_has_not_begun(data: Path, tmp_path: Path) -> None:
    configure(data, tmp_path / "trial")
    made = Page(page.write(tmp_path / "trial"))
    assert "0 of 2" in made.html and "not begun" in made.html
    assert "No round has scored masks yet." in made.words("Scores")
    assert "mlflow.json' does not exist" in made.words("Losses")
    assert "No scan failed." in made.words("Failed scans")
    assert not (tmp_path / "trial" / "mlflow.db").exists()


Change = Callable[[Path], None]


def remove(pattern: str) -> Change:
    return lambda folder: [path.unlink() for path in folder.glob(pattern)] and None


def damage(pattern: str) -> Change:
    return lambda folder: [path.write_bytes(b"damaged") for path in folder.glob(pattern)] and None


@pytest.mark.parametrize(
    ("scans", "change", "heading", "sentence"),
    [
        (SCANS, None, "Losses", "has no record in MLflow"),
        (SCANS, None, "Speed and waiting", "has no record in MLflow"),
        (SCANS, remove("round-01/masks/*"), "Selected: 2 scans", "'b' cannot be drawn: "),
        (SCANS, damage("round-01/masks/*"), "Not selected: 3 scans", "cannot be drawn: "),
        (SCANS, damage("round-01/scores.parquet"), "Scores", "This part cannot be shown"),
        (SCANS, damage("round-00/metrics.json"), "Rounds", "This part cannot be shown"),
        ({key: (0.5, dice) for key, (_, dice) in SCANS.items()}, None, "Scores", "all 5 scores are 0.500"),
        ({key: (value, 0.5) for key, (value, _) in SCANS.items()}, None, "Scores", "one and the same score or Dice"),
        ({key: (value, None) for key, (value, _) in SCANS.items()}, None, "Scores", "no scan has both"),
        ({"a": (0.9, 0.9), "b": (0.8, 0.8)}, None, "Scores", "2 scans have a score, too few for a plot."),
        ({"a": (None, None)}, None, "Scores", "no scans have a score, too few for a plot."),
        (SCANS | {key: (0.5, None) for key in "bce"}, None, "Scores", "2 scans have a score and a true mask"),
    ],
)
def test_what_is_missing_is_a_sentence(
    scans: dict[str, tuple[float | None, float | None]],
    change: Change | None,
    heading: str,
    sentence: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sections, "SAMPLES", 0)
    config = configure(data, tmp_path / "trial")
    finish(config, tmp_path / "trial", data, scans=scans)
    if change:
        change(tmp_path / "trial")
    made = Page(page.write(tmp_path / "trial"))
    assert sentence in made.words(heading)
    assert set(page.SECTIONS) <= set(made.headings)


def test_scans_that_moved(data: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(data, tmp_path / "data")
    config = configure(moved, tmp_path / "trial")
    finish(config, tmp_path / "trial", moved)
    shutil.rmtree(moved)
    made = Page(page.write(tmp_path / "trial"))
    assert "labelled scan cannot be shown" in made.words("What the network was trained on")
    assert "True masks are not drawn" in made.words("Scans")
    assert "2 of 2" in made.html and len(made.cells("Selected: 2 scans")) == 2


def test_tables_and_pictures_stay_few(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("SAMPLES", 0), ("MOST_ROWS", 2), ("MOST_TILES", 4), ("NAMED_FAULTS", 1)):
        monkeypatch.setattr(sections, name, most)
    config = configure(data, tmp_path / "trial")
    finish(config, tmp_path / "trial", data)
    damage("round-01/masks/mask[234]*")(tmp_path / "trial")
    made = Page(page.write(tmp_path / "trial"))
    assert "Table of the 2 lowest scores of 3" in made.parts["Not selected: 3 scans"]
    assert "1 more scans cannot be drawn." in made.words("Not selected: 3 scans")
    assert sum(value.startswith("Mask of") for value in made.attributes("alt")) == 2


def test_passwords_stay_out(data: Path, tmp_path: Path) -> None:
    configure(data, tmp_path / "trial", "tracking.uri=http://127.0.0.1:9")
    record = tmp_path / "trial" / "config.yaml"
    record.write_text(record.read_text().replace("127.0.0.1:9", "user:secret@127.0.0.1:9"))  # as it once was allowed
    made = Page(page.write(tmp_path / "trial"))
    assert "secret" not in made.html and "//127.0.0.1:9" in made.words("Settings")


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not the folder of a run"):
        page.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    configure(data, tmp_path / "trial")
    for out in (tmp_path, tmp_path / "trial" / "config.yaml" / "page.html"):
        with pytest.raises(DataError, match="cannot be written .*--out"):
            page.write(tmp_path / "trial", out)


def test_a_report_that_fails_does_not_fail_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    driver._report(tmp_path)
    assert [record.levelname for record in caplog.records if record.levelno > logging.INFO] == ["WARNING"]
    assert "there is no report" in caplog.text
