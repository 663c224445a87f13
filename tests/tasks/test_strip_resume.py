"""A command that was cut off, or met faults, goes on where it was."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
from stripped import files, other_network, table

from onelabel.errors import DataError
from onelabel.imaging.places import HIDDEN, Folder
from onelabel.tasks import strip_record, strip_worker
from onelabel.tasks.strip import in_process, strip
from onelabel.tasks.strip_plan import Job
from onelabel.tasks.strip_record import TABLE, Outcome, Record
from onelabel.tasks.strip_worker import SCHEMA, Settings

Row = dict[str, Any]
WriteScan = Callable[..., Path]


@pytest.fixture
def scans(tmp_path: Path, write_scan: WriteScan) -> Path:
    for number in range(5):
        write_scan(tmp_path / "scans" / f"{number}.nii.gz", seed=number)
    return tmp_path / "scans"


def test_the_same_command_does_only_what_is_missing(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    (scans / "3.nii.gz").rename(tmp_path / "away")
    (scans / "3.nii.gz").write_bytes(b"broken")
    assert strip([str(scans)], out=out, checkpoint=trained).failed == 1
    before = files(out)
    (out / "1_mask.nii.gz").unlink()
    (tmp_path / "away").replace(scans / "3.nii.gz")
    os.utime(scans / "0.nii.gz")
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert (outcome.scans, outcome.stripped, outcome.failed, outcome.kept) == (5, 5, 0, 2)
    after = files(out)
    assert {name for name in after if after[name] != before.get(name)} == {
        *(f"{number}_mask.nii.gz" for number in (0, 1, 3)),
        TABLE,
    }
    assert [row["key"] for row in table(out)] == list("01234")
    assert strip([str(scans)], out=out, checkpoint=trained).kept == 5


def test_of_a_pair_both_files_count(trained: Path, tmp_path: Path, write_scan: WriteScan) -> None:
    image = nib.load(write_scan(tmp_path / "whole.nii"))
    pair, out = tmp_path / "pair.hdr", tmp_path / "out"
    nib.save(nib.Nifti1Pair(np.asarray(image.dataobj), image.affine), pair)
    assert strip([str(pair)], out=out, checkpoint=trained).stripped == 1
    assert strip([str(pair)], out=out, checkpoint=trained).kept == 1
    later = (out / "pair_mask.nii.gz").stat().st_mtime_ns + 1_000_000_000
    os.utime(pair.with_suffix(".img"), ns=(later, later))
    assert strip([str(pair)], out=out, checkpoint=trained).stripped == 1


def test_a_folder_lists_all_that_was_stripped_into_it(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    (scans / "0.nii.gz").write_bytes(b"broken")
    strip([str(scans / "0.nii.gz"), str(scans / "1.nii.gz")], out=out, checkpoint=trained)
    outcome = strip([str(scans / "2.nii.gz")], out=out, checkpoint=trained)
    assert (outcome.scans, outcome.stripped, outcome.kept) == (1, 1, 0)
    assert [row["key"] for row in table(out)] == ["1", "2"]  # what failed, and was not asked for again, is forgotten


def test_a_mask_drawn_by_hand_is_not_overwritten(trained: Path, tmp_path: Path, scans: Path) -> None:
    drawn = scans / "1_mask.nii.gz"
    drawn.write_bytes(b"a week's work")
    scan = [str(scans / "1.nii.gz")]
    for _ in range(2):
        with pytest.raises(DataError, match="1_mask.nii.gz' is there already, and no result of onelabel strip"):
            strip(scan, out=scans, checkpoint=trained)
    strip([str(scans / "0.nii.gz")], out=scans, checkpoint=trained)
    with pytest.raises(DataError, match="1_mask.nii.gz' is there already"):
        strip(scan, out=scans, checkpoint=trained)
    assert drawn.read_bytes() == b"a week's work"
    assert strip(scan, out=scans, checkpoint=trained, overwrite=True).stripped == 1


def test_no_mask_of_before_is_left_of_a_scan_that_fails(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    strip([str(scans)], out=out, checkpoint=trained, distance=True)
    (scans / "2.nii.gz").write_bytes(b"broken")
    assert strip([str(scans)], out=out, checkpoint=trained, distance=True).failed == 1
    assert not list(out.glob("2_*")) and len(list(out.glob("1_*"))) == 2


def test_masks_made_in_another_way_are_not_mixed(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    strip([str(scans)], out=out, checkpoint=trained)
    before = files(out)
    with pytest.raises(DataError, match="made with border 0.0, not 2.0: give another output folder, or --overwrite"):
        strip([str(scans)], out=out, checkpoint=trained, settings=Settings(border_mm=2.0))
    other = other_network(tmp_path / "other", trained)
    with pytest.raises(DataError, match="made with checkpoint"):
        strip([str(scans)], out=out, checkpoint=other)
    assert files(out) == before
    outcome = strip([str(scans)], out=out, checkpoint=other, overwrite=True)
    assert (outcome.stripped, outcome.kept) == (5, 0)
    assert strip([str(scans)], out=out, checkpoint=other).kept == 5


def test_a_table_of_another_program_is_not_touched(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    pq.write_table(pq.ParquetFile(_some_table(tmp_path)).read(), out / TABLE)
    with pytest.raises(DataError, match="another program"):
        strip([str(scans)], out=out, checkpoint=trained)
    assert list(files(out)) == [TABLE]


def _some_table(folder: Path) -> Path:
    import pyarrow as pa

    pq.write_table(pa.table({"key": ["a"]}), folder / "some.parquet")
    return folder / "some.parquet"


def interrupted(after: int) -> Any:
    """Strips so many scans and is cut off."""

    def spread(jobs: Sequence[Job], checkpoint: Path, settings: Settings, out: Folder) -> Iterator[Row]:
        for number, row in enumerate(in_process(jobs, checkpoint, settings, out)):
            if number == after:
                raise KeyboardInterrupt
            yield row

    return spread


def test_what_was_done_before_an_interrupt_is_kept(trained: Path, tmp_path: Path, scans: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        strip([str(scans)], out=out, checkpoint=trained, spread=interrupted(3))
    assert not (out / TABLE).exists()
    leftover = out / HIDDEN / "unfinished" / "x" / "half_mask.nii.gz"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert (outcome.stripped, outcome.kept) == (5, 3)
    assert not (out / HIDDEN).exists()


def test_parts_are_joined_in_any_number(
    trained: Path, tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strip_record, "PART_ROWS", 2)
    monkeypatch.setattr(strip_record, "EVERY_S", 0)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        strip([str(scans)], out=out, checkpoint=trained, spread=interrupted(3))
    assert len(list((out / HIDDEN).glob("part-*"))) == 2
    assert strip([str(scans)], out=out, checkpoint=trained).kept == 3
    assert [row["key"] for row in table(out)] == list("01234")


def found(name: str, volume_ml: float | None, flags: str = "", error: str | None = None) -> Row:
    flag = None if error else flags == "empty"
    row = {"key": name, "image": name, "volume_ml": volume_ml, "flags": flags, "flag": flag, "error": error}
    return dict.fromkeys(SCHEMA.names) | row


def test_a_volume_is_flagged_while_it_is_unlike_the_others(tmp_path: Path) -> None:
    edge = "touches the edge of the field of view"
    first = [found(str(i), 1000 + i) for i in range(4)] + [found("small", 600, edge), found("none", 0, "empty")]
    more = [found(f"child {i}", 600 + 10 * i) for i in range(9)]
    out, rows = Folder(str(tmp_path)), [*first, found("broken", None, error="damaged")]
    for new, flagged in ((rows, {"small", "none"}), (more, {"none", *"0123"})):
        record = Record(out, {})
        for row in new:
            record.add(row)
        outcome = record.finish([Job(row["key"], row["image"], "") for row in new])
        record.close()
        assert {row["key"] for row in table(tmp_path) if row["flag"]} == flagged
        flags = {row["key"]: row["flags"] for row in table(tmp_path)}
        assert flags["small"] == f"{edge}; volume unlike the others' 1001 ml" * ("small" in flagged) or edge
        assert outcome.flagged == len(flagged & {row["key"] for row in new})


def test_two_commands_do_not_write_to_one_folder(trained: Path, tmp_path: Path, scans: Path) -> None:
    began, go_on = threading.Event(), threading.Event()

    def waiting(*job: Any) -> Iterator[Row]:
        began.set()
        go_on.wait(60)
        yield from in_process(*job)

    first: list[Outcome] = []
    options: dict[str, Any] = {"out": tmp_path / "out", "checkpoint": trained}
    other = threading.Thread(target=lambda: first.append(strip([str(scans)], spread=waiting, **options)))
    other.start()
    try:
        assert began.wait(60)
        with pytest.raises(DataError, match="another onelabel strip writes to"):
            strip([str(scans)], **options)
    finally:
        go_on.set()
        other.join()
    assert first[0].stripped == 5


# Faults


class Failing:
    """Saves a mask, but for the first calls, which fail."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0
        self.save = strip_worker.outputs.save

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        self.save(*arguments, **options)


@pytest.mark.parametrize(
    ("error", "times", "calls"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), 1, 2),
        (ConnectionResetError(104, "Connection reset by peer"), 2, 2),
        (OSError(5, "Input/output error"), 1, 2),
        (OSError(28, "No space left on device"), 1, 1),
        (PermissionError(13, "Permission denied"), 1, 1),
        (DataError("damaged"), 1, 1),
        (IndexError("a bug of a library"), 1, 1),
    ],
)
def test_what_can_pass_is_tried_once_more(
    trained: Path,
    tmp_path: Path,
    write_scan: WriteScan,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    times: int,
    calls: int,
) -> None:
    failing = Failing(error, times)
    monkeypatch.setattr(strip_worker.outputs, "save", failing)
    monkeypatch.setattr(strip_worker, "WAIT_S", 0)
    strip([str(write_scan(tmp_path / "head.nii.gz"))], out=tmp_path / "out", checkpoint=trained)
    assert failing.calls == calls
    (row,) = table(tmp_path / "out")
    if times < calls:
        assert row["error"] is None
    else:
        assert row["error_class"] == type(error).__name__
        assert str(error) in row["error"]
        assert list(files(tmp_path / "out")) == [TABLE]


def test_a_full_disk_ends_as_a_sentence_and_is_gone_on_from(
    trained: Path, tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write, rows = strip_record.Record._write, []

    def full(self: strip_record.Record, part: list[Row]) -> None:
        rows.append(len(part))
        if len(rows) == 3:
            raise OSError(28, "No space left on device")
        write(self, part)

    monkeypatch.setattr(strip_record, "EVERY_S", 0)
    with monkeypatch.context() as patched:
        patched.setattr(strip_record.Record, "_write", full)
        with pytest.raises(DataError, match="No space left on device"):
            strip([str(scans)], out=out, checkpoint=trained)
    outcome = strip([str(scans)], out=out, checkpoint=trained)
    assert outcome.kept >= 2
    assert outcome.stripped == 5


def test_memory_does_not_grow_with_the_cohort(tmp_path: Path) -> None:
    record = strip_record.Record(Folder(str(tmp_path)), {})
    blank = dict.fromkeys(SCHEMA.names)
    picture = os.urandom(10_000)
    for number in range(300):
        record.add(blank | {"key": str(number), "image": f"/{number}", "picture": picture})
        assert len(record._rows) < strip_record.PART_ROWS
    outcome = record.finish([Job(str(number), f"/{number}", "") for number in range(300)])
    record.close()
    assert outcome.scans == 300
