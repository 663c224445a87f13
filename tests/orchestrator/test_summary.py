import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from onelabel.orchestrator.summary import extremes, summarise

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("score", pa.float64()),
        ("dice", pa.float64()),
        ("hd95_mm", pa.float64()),
        ("asd_mm", pa.float64()),
        ("miss", pa.bool_()),
        ("error", pa.string()),
        ("rank_cpu_s", pa.float64()),
        ("expected_dice", pa.float64()),
        ("flag", pa.bool_()),
    ]
)


def table(*rows: dict[str, Any]) -> pa.Table:
    complete = [{"key": str(i)} | row for i, row in enumerate(rows)]
    return pa.Table.from_pylist(complete, schema=SCHEMA)


def judged(dice: float, score: float | None = None, **more: Any) -> dict[str, Any]:
    return {"dice": dice, "hd95_mm": 2.0, "asd_mm": 1.0, "miss": False, "score": score} | more


def test_a_miss_counts_as_zero() -> None:
    miss = judged(0.0, hd95_mm=200.0, asd_mm=200.0, miss=True)
    figures = summarise({"test": table(judged(0.9), judged(0.6), miss)})["test"]
    assert figures["dice_mean"] == pytest.approx(0.5)
    assert figures["dice_median"] == pytest.approx(0.6)
    assert figures["dice_min"] == 0
    assert figures["misses"] == 1
    assert figures["hd95_mm_mean"] == pytest.approx(68)
    assert figures["asd_mm_mean"] == pytest.approx(202 / 3)


def test_failures_are_counted_and_no_part_of_the_figures() -> None:
    scores = table(judged(0.8, 0.5), {"error": "DataError: damaged"}, judged(0.6, 0.7), {"error": "DataError: empty"})
    figures = summarise({"scores": scores})
    assert figures["failures"] == 2
    assert figures["unlabelled"]["scans"] == 4
    assert figures["unlabelled"]["failed"] == 2
    assert figures["unlabelled"]["dice_mean"] == pytest.approx(0.7)
    assert figures["unlabelled"]["score_mean"] == pytest.approx(0.6)
    assert figures["unlabelled"]["score_min"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("dice", "expected"),
    [((0.1, 0.2, 0.3, 0.9), 1.0), ((0.9, 0.5, 0.4, 0.3), -1.0), ((0.1, 0.3, 0.2, 0.9), 0.8)],
)
def test_the_rank_correlation_is_spearmans(dice: tuple[float, ...], expected: float) -> None:
    rows = [judged(value, score) for value, score in zip(dice, (1.0, 2.0, 3.0, 40.0), strict=True)]
    # Scans without a truth or without a score take no part.
    more = [{"score": 0.0}, judged(1.0), {"error": "x"}]
    figures = summarise({"scores": table(*rows, *more)})["unlabelled"]
    assert figures["rank_correlation"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "rows",
    [
        [judged(0.5, 0.5), judged(0.6, 0.6)],
        [judged(0.5, 0.5), judged(0.6, 0.5), judged(0.7, 0.5)],
        [judged(0.5, 0.1), judged(0.5, 0.2), judged(0.5, 0.3)],
        [judged(0.5), judged(0.6), judged(0.7)],
    ],
    ids=["two scans", "one score", "one dice", "no score"],
)
def test_no_correlation_where_there_is_none_to_speak_of(rows: list[dict[str, Any]]) -> None:
    assert "rank_correlation" not in summarise({"scores": table(*rows)})["unlabelled"]


def test_without_a_truth_there_is_no_dice() -> None:
    figures = summarise({"scores": table({"score": 0.5}, {"score": 0.7})})["unlabelled"]
    assert figures == {"scans": 2, "failed": 0, "score_mean": pytest.approx(0.6), "score_min": pytest.approx(0.5)}


def test_each_table_is_described_under_its_name() -> None:
    scores = table(judged(0.5, 0.2), judged(0.9, 0.8))
    figures = summarise({"scores": scores, "selection": scores.slice(1), "test": table(judged(0.4))})
    assert set(figures) == {"failures", "unlabelled", "selection", "test"}
    assert figures["selection"]["dice_mean"] == pytest.approx(0.9)
    assert figures["test"]["dice_mean"] == pytest.approx(0.4)


@pytest.mark.parametrize("tables", [{}, {"scores": table()}, {"scores": table({"error": "x"}), "test": table()}])
def test_nothing_to_describe(tables: dict[str, pa.Table]) -> None:
    figures = summarise(tables)
    assert figures["failures"] == sum(len(one) for one in tables.values())
    assert all(part.keys() == {"scans", "failed"} for part in figures.values() if isinstance(part, dict))


def test_figures_are_plain_and_finite() -> None:
    figures = summarise({"scores": table(*[judged(0.1 * i, 0.3 * i) for i in range(5)], {"error": "x"})})
    assert all(type(value) is float and math.isfinite(value) for value in figures["unlabelled"].values())


def test_seconds_are_a_mean_over_the_scans_that_were_ranked() -> None:
    rows = table(judged(0.9, 0.5, rank_cpu_s=1.0), judged(0.8, 0.4, rank_cpu_s=2.0), {"error": "torn"})
    assert summarise({"scores": rows})["unlabelled"]["rank_cpu_s_mean"] == 1.5
    assert "rank_cpu_s_mean" not in summarise({"scores": table(judged(0.9))})["unlabelled"]


def test_what_was_expected_is_held_against_the_truth() -> None:
    rows = [judged(0.9, 0.1, expected_dice=0.8, flag=True), judged(0.7, 0.1, expected_dice=0.9, flag=False)]
    rows += [{"score": 0.1, "expected_dice": 0.4, "flag": True}, {"error": "DataError: damaged"}]
    figures = summarise({"scores": table(*rows)})["unlabelled"]
    assert figures["expected_dice_mean"] == pytest.approx(0.7)
    assert figures["expected_dice_error"] == pytest.approx(0.15)
    assert figures["flagged"] == 2
    assert "flagged" not in summarise({"scores": table(judged(0.9, 0.1))})["unlabelled"]


def test_each_structure_has_its_mean() -> None:
    rows = pa.table({"dice_wall": pa.array([0.5, None, 0.7]), "dice_lumen": pa.array([None, None, None], pa.float64())})
    scans = table(judged(0.8), judged(0.6), judged(0.7))
    for name in rows.column_names:
        scans = scans.append_column(name, rows[name])
    figures = summarise({"test": scans})["test"]
    assert figures["dice_wall_mean"] == pytest.approx(0.6) and "dice_lumen_mean" not in figures


@pytest.mark.parametrize("count", [0, 3, 4, 5, 20])
def test_the_extremes_show_the_same_scans_as_the_whole(count: int) -> None:
    rng = np.random.default_rng(count)
    rows = [
        {"key": str(i), "mask": None if i % 7 == 3 else "m", "score": None if i % 5 == 4 else float(score)}
        for i, score in enumerate(rng.integers(0, 4, count))  # many are equal
    ]
    names = {"key": pa.string(), "mask": pa.string(), "score": pa.float64()}
    found = extremes(pa.Table.from_pylist(rows, schema=pa.schema(names)), 2).to_pylist()
    shown = sorted(
        (row for row in rows if row["mask"] and row["score"] is not None), key=lambda r: (-r["score"], r["key"])
    )
    assert found == (shown if len(shown) <= 4 else shown[:2] + shown[-2:])
