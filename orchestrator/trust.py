"""What the report of a run says of the scores: how far they rank masks, and whether the Dice came that was expected."""

from collections import defaultdict

import numpy as np

from onelabel.orchestrator import plots
from onelabel.orchestrator.plots import Expected, Ranked
from onelabel.orchestrator.sections import Run, Section, numbers
from onelabel.tasks.score import EXPECTED

ENOUGH_SCANS = 3  # for a plot


def ranking(run: Run, /) -> Section:
    """Scores against true Dice; where truths are unknown, how the scores are distributed."""
    if not run.scored:
        return Section(notes=["No round has scored masks yet."])
    faults: dict[str, list[str]] = defaultdict(list)
    pictures = []
    judged = [one.ranked.known for one in run.scored if not _no_correlation(one.ranked)]
    for one in run.scored:
        ranked, ranker = one.ranked, one.round.stage.ranker
        axis = f"score of the mask ({ranker.type})" if ranker else "score of the mask"
        fault = _no_distribution(ranked)
        if not fault and not (fault := _no_correlation(ranked)):
            pictures.append(plots.against_dice(f"{ranked.round}-score-and-dice", ranked, axis=axis, like=judged))
        if fault:
            faults[fault].append(ranked.round)
        if not _no_distribution(ranked) and not ranked.all_known:
            pictures.append(plots.distribution(f"{ranked.round}-scores", ranked, axis=axis))
    about = (
        "A score ranks the masks of one round and is no estimate of their Dice. Among masks of like quality any"
        " correlation is small. CI: confidence interval by Fisher's transformation."
    )
    return Section(about, [f"{', '.join(names)}: {fault}" for fault, names in faults.items()], pictures)


def _no_distribution(ranked: Ranked) -> str:
    """Why the scores cannot be plotted, or nothing."""
    score = ranked.score[np.isfinite(ranked.score)]
    if len(score) < ENOUGH_SCANS:
        return f"{_count(len(score))} a score, too few for a plot."
    return f"all {len(score)} scores are {score[0]:.3f}, so they rank nothing." if np.ptp(score) == 0 else ""


def _no_correlation(ranked: Ranked) -> str:
    """Why score and Dice cannot be compared, or nothing."""
    score, dice = ranked.known.score, ranked.known.dice
    if not len(dice):
        return "no scan has both a score and a true mask, so nothing says how far the ranking is right."
    if len(dice) < ENOUGH_SCANS:
        return f"{_count(len(dice))} a score and a true mask, too few for a correlation."
    return "" if np.ptp(score) > 0 and np.ptp(dice) > 0 else f"{len(dice)} scans have one and the same score or Dice."


def expectation(run: Run, /) -> Section:
    """The expected Dice against the true one; where truths are unknown, how many masks are flagged."""
    pictures, notes = [], []
    for one in run.scored:
        known = (numbers(one.table, name) for name in (*EXPECTED, "dice"))
        found = Expected(one.round.folder.name, one.round.stage.expect.bad, *known)
        if not np.isfinite(found.expected).any():
            continue
        flagged = int((found.expected < found.bad).sum())
        notes.append(
            f"{found.round}: {flagged} of {len(one.table)} masks are expected to have a Dice below {found.bad}."
        )
        if len(found.known.dice) >= ENOUGH_SCANS:
            pictures.append(plots.reliability(f"{found.round}-expected-and-true-dice", found))
    if not notes:
        return Section(notes=["No Dice was expected of any mask: set stages.*.expect.images above 0."])
    about = (
        "The Dice to expect of a mask was learned from masks of synthetic images, made of the labelled scan. Bars: nine"
        " in ten masks of such a score."
    )
    return Section(about, notes, pictures)


def _count(scans: int) -> str:
    return "1 scan has" if scans == 1 else f"{scans or 'no'} scans have"
