import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from onelabel.errors import DataError
from onelabel.orchestrator import qc

HOSTILE = "<script>alert('x')</script>"
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in (*qc.WORDS, "mask", "grid")),
        *((name, pa.float64()) for name in (*qc.NUMBERS, "peak_memory_mb")),
        ("flag", pa.bool_()),
        ("picture", pa.binary()),
    ]
)


def png(value: int = 0, size: tuple[int, int] = (30, 10)) -> bytes:
    content = io.BytesIO()
    Image.new("L", size, value % 256).save(content, "PNG")
    return content.getvalue()


def row(key: str, expected: float | None = None, **more: Any) -> dict[str, Any]:
    seconds = dict.fromkeys(qc.SECONDS, 0.5)
    known = {"expected_dice": expected, "flag": False, "volume_ml": 1400.0, "picture": png(hash(key))}
    if expected is not None:
        known |= {"expected_low": expected - 0.1, "expected_high": expected + 0.01}
    return {"key": key, "image": f"/data/{key}.nii.gz"} | seconds | known | more


def failure(key: str, words: str, **more: Any) -> dict[str, Any]:
    return {
        "key": key,
        "image": f"/data/{key}.nii",
        "error_class": "DataError",
        "error": f"/data/{key}.nii {words}",
    } | more


class Cards(HTMLParser):
    """The cards of a page, in their order: their words, and whether they have a picture."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.html = page.read_text(encoding="utf-8")
        self.words: list[str] = []
        self.pictures: list[str | None] = []
        self.keys: list[str] = []
        self.scripts, self.inside = 0, ""
        self.feed(self.html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag == "article":
            self.words.append("")
            self.pictures.append(None)
            self.keys.append("")
        if tag in ("article", "h3"):
            self.inside = tag
        if tag == "img":
            self.pictures[-1] = dict(attrs)["src"]
            assert self.keys[-1] in (dict(attrs)["alt"] or "")

    def handle_endtag(self, tag: str) -> None:
        self.inside = {"h3": "article", "article": ""}.get(tag, self.inside)

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.words[-1] += data
        if self.inside == "h3":
            self.keys[-1] += data


def write(folder: Path, rows: list[dict[str, Any]], schema: pa.Schema = SCHEMA) -> Cards:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "strip.parquet", row_group_size=100)
    return Cards(qc.write(folder / "strip.parquet", folder / "qc.html"))


def test_the_worst_comes_first_with_its_own_picture(tmp_path: Path) -> None:
    rows = [
        row("good", 0.97),
        row("fair", 0.91),
        row("unknown", None, score=0.1),
        row("unknown and better", None, score=0.2),
        row("flagged", 0.95, flag=True, flags="empty"),
        failure("broken", "is damaged"),
        row("low", 0.5),
        row("nothing known", volume_ml=None, picture=None),
    ]
    cards = write(tmp_path, rows)
    assert cards.keys == [
        *("broken", "flagged", "low", "fair", "good"),
        *("unknown", "unknown and better", "nothing known"),
    ]
    assert [picture is None for picture in cards.pictures] == [True] + 6 * [False] + [True]
    for key, picture in zip(cards.keys, cards.pictures, strict=True):
        if picture:
            assert picture == "data:image/png;base64," + qc.markup.base64.b64encode(png(hash(key))).decode()
    words = dict(zip(cards.keys, cards.words, strict=True))
    assert "failed" in words["broken"] and "/data/broken.nii is damaged" in words["broken"]
    assert "flagged" in words["flagged"] and "empty" in words["flagged"]
    assert "0.910 (0.810 to 0.920)" in words["fair"] and "1,400 ml" in words["fair"] and "2.0 s" in words["fair"]
    assert "0.100" in words["unknown"] and "ml" not in words["nothing known"]
    assert "7 of 8" in cards.html and not re.search("nan|None", cards.html)


def test_what_a_scan_is_called_is_no_code(tmp_path: Path) -> None:
    cards = write(
        tmp_path, [row(HOSTILE, 0.9, flag=True, flags=HOSTILE), failure(HOSTILE, HOSTILE), row('a" onload="', 1)]
    )
    assert cards.scripts == 1 and "<script>alert" not in cards.html and 'onload="' not in cards.html
    assert cards.keys == [HOSTILE, HOSTILE, 'a" onload="']
    assert not re.search(r"url\((?!#)|@import|https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", cards.html))


def test_reasons_are_counted_whatever_the_path_and_the_numbers(tmp_path: Path) -> None:
    rows = [failure(f"a{n}", f"has shape {(n,) * (1 + n % 3)}: too few axes.") for n in range(5)]
    rows += [failure("b", "is damaged."), failure("c", "is empty."), failure("d", "is empty."), failure("e", "is red.")]
    rows += [row(f"f{n}", 0.5, flag=True, flags="low; cut" if n else "low") for n in range(3)]
    found = re.findall(r'<li><span class="state (\w+)">(\d+) \w+</span> (.*?)</li>', write(tmp_path, rows).html)
    assert found == [
        ("failed", "5", "… has shape (0,): too few axes."),
        ("failed", "2", "… is empty."),
        ("failed", "1", "… is damaged."),
        ("flagged", "3", "low"),
        ("flagged", "2", "cut"),
    ]


@pytest.mark.parametrize("rows", [[], [failure("a", "is bad")], [row("a", None, flag=None)], [row("a", 0.9)]])
def test_few_scans_make_a_page(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    cards = write(tmp_path, rows)
    assert len(cards.keys) == len(rows) and "<svg" not in cards.html


def test_a_table_of_keys_is_enough(tmp_path: Path) -> None:
    cards = write(tmp_path, [{"key": "b"}, {"key": "a"}], pa.schema([("key", pa.string())]))
    assert cards.keys == ["a", "b"] and "2 of 2" in cards.html


def test_a_thousand_scans_make_a_small_page(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [row(f"sub-{n:04d}_ses-01_T1w", float(rng.uniform(0.5, 1)), volume_ml=float(n)) for n in range(1000)]
    cards = write(tmp_path, rows)
    pictures = sum(len(picture or "") for picture in cards.pictures)
    assert len(cards.keys) == 1000 and len(cards.html) < pictures + 700 * 1000
    assert cards.html.count("<svg") == 2


def test_the_page_of_a_large_cohort_shows_the_worst(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qc, "MOST_CARDS", 2)
    rows = [*(row(f"m{n}", 0.9 - n / 100) for n in range(5)), *(failure(f"f{n}", "is bad") for n in range(4))]
    cards = write(tmp_path, rows)
    assert cards.keys == ["f0", "f1", "m4", "m3"]
    assert "5 more scans" in cards.html and "5 of 9" in cards.html


def test_what_is_no_table_is_a_sentence(tmp_path: Path) -> None:
    table = tmp_path / "strip.parquet"
    for content in (None, b"", b"words", b"PAR1" + bytes(40) + b"PAR1"):
        if content is not None:
            table.write_bytes(content)
        with pytest.raises(DataError, match="cannot be read as a table of masks"):
            qc.write(table, tmp_path / "qc.html")
    pq.write_table(pa.table({"scan": ["a"]}), table)
    with pytest.raises(DataError, match="needs 'key'"):
        qc.write(table, tmp_path / "qc.html")
    assert list(tmp_path.iterdir()) == [table]
