import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from onelabel.configs.selection import SelectConfig, ThresholdConfig, TopKConfig, TopShareConfig
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
    assert selection.drop_columns("weight").schema == scores.schema
    assert selection.drop_columns("weight").to_pylist() == before[1:]
    assert scores.to_pylist() == before


def of(scores: pa.Table, config: SelectConfig, number: int = 0) -> list[str]:
    return list(select(scores, config, number)["key"].to_pylist())


FOUR = (("a", 0.1), ("b", 0.4), ("c", 0.3), ("d", 0.2))


def test_k_may_grow_from_round_to_round() -> None:
    config = TopKConfig(k=(1, 3))
    assert [len(of(table(*FOUR), config, number)) for number in range(4)] == [1, 3, 3, 3]


def test_a_share_of_the_whole_cohort_failures_included() -> None:
    scores = table(*FOUR, ("e", None, None, "broken"), ("f", None, None, "broken"))
    assert of(scores, TopShareConfig(share=0.5)) == ["b", "c", "d"]
    assert of(scores, TopShareConfig(share=0.01)) == ["b"]
    assert of(scores, TopShareConfig(share=(0.2, 1.0)), 1) == ["b", "c", "d", "a"]


def test_a_threshold_takes_all_that_reach_it_in_the_order_of_scores() -> None:
    scores = table(*FOUR).append_column("expected_dice", pa.array([0.95, 0.9, None, 0.97]))
    assert of(scores, ThresholdConfig(expected_dice=0.95)) == ["d", "a"]


def test_a_threshold_that_none_reaches_takes_the_best_one() -> None:
    scores = table(*FOUR).append_column("expected_dice", pa.array([0.5, 0.6, 0.7, 0.8]))
    assert of(scores, ThresholdConfig(expected_dice=0.9)) == ["b"]
    assert of(scores.slice(0, 0), ThresholdConfig(expected_dice=0.9)) == []


def test_of_scans_that_are_alike_the_better_one_is_taken() -> None:
    rng = np.random.default_rng(0)
    one, other = (rng.integers(0, 200, 512).astype(np.uint8) for _ in range(2))
    brighter = one + np.uint8(40)
    images = [image.tobytes() for image in (one, brighter, other, one)]
    scores = table(*FOUR).append_column("thumbnail", pa.array(images, pa.binary()))
    assert of(scores, TopKConfig(k=4, alike=0.99)) == ["b", "c"]
    assert of(scores, TopKConfig(k=4)) == ["b", "c", "d", "a"]
    assert of(scores, TopKConfig(k=1, alike=0.99)) == ["b"]


def test_an_image_of_one_value_is_like_no_other() -> None:
    flat = np.full(512, 7, np.uint8).tobytes()
    scores = table(*FOUR).append_column("thumbnail", pa.array([flat] * 4, pa.binary()))
    assert len(of(scores, TopKConfig(k=4, alike=0.5))) == 4


def test_weights() -> None:
    equal = select(table(*FOUR), TopKConfig(k=2))["weight"].to_pylist()
    assert equal == [1, 1]
    by_score = select(table(*FOUR), TopKConfig(k=3, weight="score"))["weight"].to_pylist()
    assert by_score == pytest.approx([1, 0.75, 0.5])
    assert select(table(("a", 0.0), ("b", 0.0)), TopKConfig(k=2, weight="score"))["weight"].to_pylist() == [1, 1]
