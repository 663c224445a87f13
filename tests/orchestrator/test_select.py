import itertools
from typing import Any

import pyarrow as pa
import pytest

from onelabel.configs.schema import TopKConfig
from onelabel.orchestrator.select import select

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("volume_mm3", pa.float64()),
        pa.field("error", pa.string()),
    ]
)
INFINITY = float("inf")


def table(*rows: tuple[Any, ...]) -> pa.Table:
    """Rows of key, score, volume and error; the last two may be left out."""
    defaults = (None, None, 1000.0, None)
    return pa.Table.from_pylist(
        [dict(zip(SCHEMA.names, (*row, *defaults[len(row) :]), strict=True)) for row in rows], schema=SCHEMA
    )


def chosen(scores: pa.Table, k: int = 10) -> list[str]:
    return list(select(scores, TopKConfig(k=k))["key"].to_pylist())


def test_the_best_come_first() -> None:
    scores = table(("a", 0.1), ("b", 0.9), ("c", 0.5), ("d", -2.0))
    assert chosen(scores, 3) == ["b", "c", "a"]
    assert chosen(scores, 1) == ["b"]


def test_ties_go_to_the_smaller_key() -> None:
    assert chosen(table(("c", 0.5), ("a", 0.5), ("b", 0.5), ("d", 0.6)), 3) == ["d", "a", "b"]


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = [("a", 0.5), ("b", 0.5), ("c", 0.7), ("d", None), ("e", 0.2, 0.0)]
    found = {tuple(chosen(table(*order), 2)) for order in itertools.permutations(rows)}
    assert found == {("c", "a")}


def test_nor_does_how_the_table_is_cut_up() -> None:
    whole = table(("a", 0.5), ("b", 0.5), ("c", 0.7), ("d", 0.1))
    pieces = pa.concat_tables([whole.slice(2), whole.slice(0, 1), whole.slice(1, 1)])
    assert chosen(pieces, 3) == chosen(whole, 3) == ["c", "a", "b"]


@pytest.mark.parametrize(
    "row",
    [
        ("bad", 0.99, 1000.0, "DataError: damaged"),
        ("bad", 0.99, None, "DataError: damaged"),
        ("bad", None, None, "DataError: damaged"),
        ("bad", 0.99, 0.0),
        ("bad", 0.99, None),
        ("bad", 0.99, float("nan")),
        ("bad", None),
        ("bad", float("nan")),
        ("bad", INFINITY),
        ("bad", -INFINITY),
    ],
    ids=str,
)
def test_what_cannot_be_trusted_is_never_chosen(row: tuple[Any, ...]) -> None:
    assert chosen(table(("a", 0.1), row, ("b", 0.2))) == ["b", "a"]
    assert chosen(table(row)) == []


def test_fewer_than_k_may_come_back() -> None:
    assert chosen(table(("a", 0.1), ("b", 0.2)), 5) == ["b", "a"]
    assert chosen(table(), 5) == []


def test_scores_of_nothing_but_failures() -> None:
    assert chosen(table(("a", None, None, "x"), ("b", None, None, "y"))) == []


def test_all_columns_are_kept_and_the_scores_left_alone() -> None:
    scores = table(("a", 0.1), ("b", 0.2)).append_column("mask", pa.array(["a.nii.gz", "b.nii.gz"]))
    before = scores.to_pylist()
    selection = select(scores, TopKConfig(k=1))
    assert selection.schema == scores.schema
    assert selection.to_pylist() == before[1:]
    assert scores.to_pylist() == before
