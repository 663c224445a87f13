"""Tables of a round to a few figures."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.stats import spearmanr

from onelabel.orchestrator.select import best_first


def summarise(tables: dict[str, pa.Table], /) -> dict[str, Any]:
    """Figures of a round: `failures`, and for each of `scores`, `selection` and `test` what can be said.

    Dice is over all scans with a truth, a miss counting as 0; of several structures there is one for each, too.
    `expected_dice_error` is its mean distance from what was expected. `rank_correlation` is Spearman's, of score and
    Dice; `predict_cpu_s_mean` and `rank_cpu_s_mean` are CPU seconds a scan.
    """
    figures: dict[str, Any] = {"failures": 0}
    for name, table in tables.items():
        part = _describe(table)
        if name in ("scores", "test"):
            figures["failures"] += int(part["failed"])
        figures["unlabelled" if name == "scores" else name] = part
    return figures


def _describe(table: pa.Table) -> dict[str, float]:
    failed = table["error"].is_valid().to_numpy(zero_copy_only=False)
    part = {"scans": float(len(table)), "failed": float(failed.sum())}
    score, dice = _numbers(table, "score"), _numbers(table, "dice")
    if np.isfinite(score).any():
        part |= {"score_mean": float(np.nanmean(score)), "score_min": float(np.nanmin(score))}
    if np.isfinite(dice).any():
        part |= {"dice_mean": float(np.nanmean(dice)), "dice_median": float(np.nanmedian(dice))}
        part |= {"dice_min": float(np.nanmin(dice)), "hd95_mm_mean": float(np.nanmean(_numbers(table, "hd95_mm")))}
        part["asd_mm_mean"] = float(np.nanmean(_numbers(table, "asd_mm")))
        part["misses"] = float(np.nansum(_numbers(table, "miss")))
    for name in table.column_names:
        if name.startswith("dice_") and np.isfinite(found := _numbers(table, name)).any():
            part[f"{name}_mean"] = float(np.nanmean(found))
    expected = (
        _numbers(table, "expected_dice") if "expected_dice" in table.column_names else np.full(len(table), np.nan)
    )
    if np.isfinite(expected).any():
        part |= {
            "expected_dice_mean": float(np.nanmean(expected)),
            "flagged": float(np.nansum(_numbers(table, "flag"))),
        }
    if (judged := np.isfinite(expected) & np.isfinite(dice)).any():
        part["expected_dice_error"] = float(np.abs(expected - dice)[judged].mean())
    for name in ("predict_cpu_s", "rank_cpu_s"):
        if name in table.column_names and np.isfinite(seconds := _numbers(table, name)).any():
            part[f"{name}_mean"] = float(np.nanmean(seconds))
    both = np.isfinite(score) & np.isfinite(dice)
    if both.sum() > 2 and np.ptp(score[both]) > 0 and np.ptp(dice[both]) > 0:
        part["rank_correlation"] = float(spearmanr(score[both], dice[both]).statistic)
    return part


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    return np.asarray(pc.fill_null(table[name].cast(pa.float64()), np.nan).to_numpy(), np.float64)


def extremes(scores: pa.Table, k: int, /) -> pa.Table:
    """The rows with a mask that have the k highest scores, and the k lowest."""
    shown = pc.and_(pc.is_valid(scores["mask"]), pc.is_finite(pc.fill_null(scores["score"], np.nan)))
    order = best_first(scores, shown)
    return scores.take(order if len(order) <= 2 * k else pa.concat_arrays([order[:k], order[-k:]]))
