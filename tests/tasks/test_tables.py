import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from onelabel.tasks.tables import from_rows

SCHEMA = pa.schema(
    [("key", pa.string()), ("ml", pa.float64()), ("picture", pa.binary()), ("flag", pa.bool_()), ("n", pa.int64())]
)
ROWS = [
    {"key": 'Kopf "ü"\n', "ml": 1474, "picture": b"\x00\xff\n", "flag": True, "n": 2**53 + 1},
    {"key": "2020-01-01T00:00:00", "ml": math.inf, "picture": None, "flag": None},
    {"key": None, "ml": -0.1, "picture": b"", "flag": False, "n": None, "more": "is left out"},
]


def test_a_table_is_what_pyarrow_makes_of_its_rows() -> None:
    for rows in (ROWS, ROWS[:1], [], [{"key": "x" * 3_000_000}] * 2):
        made = from_rows(rows, SCHEMA)
        made.validate(full=True)
        assert made.equals(pa.Table.from_pylist(rows, SCHEMA))
    assert from_rows(ROWS, SCHEMA).schema.equals(SCHEMA)


@pytest.mark.parametrize("row", [{"ml": "a word"}, {"flag": 3}, {"n": 0.5}])
def test_a_value_of_another_type_is_an_error(row: dict[str, object]) -> None:
    with pytest.raises(pa.ArrowInvalid):
        from_rows([row], SCHEMA)


def test_stripping_one_scan_imports_no_pandas(trained: Path, write_scan: Callable[..., Path], tmp_path: Path) -> None:
    """It would be a tenth of the time."""
    scan, out = write_scan(tmp_path / "head.nii.gz"), tmp_path / "out"
    script = "import sys; from pathlib import Path; from onelabel.orchestrator.strip import strip"
    script += f"; assert strip([{str(scan)!r}], out={str(out)!r}, checkpoint=Path({str(trained)!r})).stripped == 1"
    script += "; assert 'pandas' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
