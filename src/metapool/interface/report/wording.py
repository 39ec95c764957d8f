"""Who won, at what cost, and whether chance explains it: from scores to plain sentences."""

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from metapool.interface import figures
from metapool.interface.report.files import MethodScore, Scores


class Gap(NamedTuple):
    """A paired difference seen from its first method."""

    mean: float
    low: float
    high: float


def common_shots(scores: Scores) -> list[int]:
    """Shots at which every method was tested, so that means over shots compare like with like.

    Args:
        scores: of all methods.

    Returns:
        Numbers of shots, ascending; those of any method when none is common to all.
    """
    tested = [set(method.shots) for method in scores.methods.values()]
    return sorted(set.intersection(*tested) or set.union(*tested))


def ranked(scores: Scores) -> list[str]:
    """Methods by mean accuracy over the common shots, best first.

    Args:
        scores: of all methods.

    Returns:
        Their names.
    """
    shots = common_shots(scores)

    def mean(name: str) -> float:
        known = [method.shots[shot].mean for method in [scores.methods[name]] for shot in shots if shot in method.shots]
        return sum(known) / len(known) if known else -math.inf

    return sorted(scores.methods, key=mean, reverse=True)


def winner(scores: Scores) -> str:
    """The most accurate method among those that need no real data and judge each query alone.

    Args:
        scores: of all methods.

    Returns:
        Its name; the most accurate of all when none competes.
    """
    order = ranked(scores)
    competing = [name for name in order if scores.methods[name].data_free and not scores.methods[name].transductive]
    return (competing or order)[0]


def rival(scores: Scores, first: str) -> str | None:
    """Whom to measure a method against: the ensemble of the whole pool, or else the best of the others.

    Args:
        scores: of all methods.
        first: the method that is compared.

    Returns:
        A name, or None when nothing else was tested.
    """
    if "ensemble" in scores.methods and first != "ensemble":
        return "ensemble"
    rest = [name for name in ranked(scores) if name != first and scores.methods[name].data_free]
    return rest[0] if rest else None


def paired_gap(scores: Scores, first: str, second: str, shot: int) -> Gap | None:
    """The paired difference of two methods, whichever way round it is stored.

    Args:
        scores: of all methods.
        first: the method whose advantage is positive.
        second: the other.
        shot: number of shots.

    Returns:
        The difference, or None when it was not computed.
    """
    for pair in scores.paired:
        if (pair.a, pair.b, pair.shot) == (first, second, shot):
            return Gap(pair.mean, pair.low, pair.high)
        if (pair.b, pair.a, pair.shot) == (first, second, shot):
            return Gap(-pair.mean, -pair.high, -pair.low)
    return None


def time_ratio(own: float, other: float) -> str:
    """How long another method takes, in words.

    Args:
        own: milliseconds per image.
        other: the other method's milliseconds per image.

    Returns:
        For example ``at 32 times the time``.
    """
    if own <= 0 or other <= 0:
        return "at a cost that was not measured"
    ratio = other / own
    if 0.95 < ratio < 1.05:
        return "in the same time"
    if ratio >= 1:
        return f"at {ratio:.0f} times the time" if ratio >= 10 else f"at {ratio:.1f} times the time"
    return f"in 1/{1 / ratio:.0f} of the time" if ratio < 0.1 else f"in {ratio:.0%} of the time".replace("%", " %")


def headline_sentence(scores: Scores, headline: str) -> str:
    """Which method won and at what cost: the page's first sentence.

    Args:
        scores: of all methods.
        headline: our learner, which the sentence sets beside the winner.

    Returns:
        One sentence.
    """
    first = winner(scores)
    second = headline if headline in scores.methods and headline != first else rival(scores, first)
    best, shots = scores.methods[first], common_shots(scores)
    leads = all(shot in best.shots and best.shots[shot].mean >= _best_mean(scores, shot) for shot in shots)
    named = " (" + " / ".join(f"{shot}-" for shot in shots) + "shot)"
    sentence = (
        f"{called(scores, first)} is the most accurate data-free method{'' if leads else ' on average'}: "
        f"{_reached(best, shots)}{named} with {networks(best.models_at_inference)}, {counted(best.parameters)} "
        f"parameters and {significant(best.ms_per_image)} ms per image"
    )
    if second is not None:
        other = scores.methods[second]
        how_many = "" if second == "ensemble" else f" with {networks(other.models_at_inference)}"
        ratio = time_ratio(best.ms_per_image, other.ms_per_image)
        sentence += f"; {called(scores, second)} reaches {_reached(other, shots)}{how_many} {ratio}"
    return sentence[0].upper() + sentence[1:] + "." if sentence.startswith("the ") else sentence + "."


def verdict_sentence(scores: Scores, headline: str) -> str:
    """How our learner stands against the winner (or, as the winner, its rival) and whether chance explains it.

    Args:
        scores: of all methods.
        headline: our learner.

    Returns:
        One sentence; empty when there is nothing to compare.
    """
    first = winner(scores)
    other = first if first != headline else rival(scores, headline)
    if headline not in scores.methods or other is None:
        return ""
    parts: list[str] = []
    for shot in common_shots(scores):
        gap = paired_gap(scores, headline, other, shot)
        if gap is None:
            continue
        words = {
            "above": f"{abs(gap.mean):.1f} points above",
            "below": f"{abs(gap.mean):.1f} points below",
            "level": "level",
        }[side(gap)]
        interval = "" if parts else "95 % interval "
        parts.append(f"{words} at {shot}-shot ({interval}{signed(gap.low)} to {signed(gap.high)})")
    whom = called(scores, other)
    return f"Against {whom}, on the same episodes, {headline} is {' and '.join(parts)}." if parts else ""


def side(gap: Gap) -> str:
    """Which side of zero an interval lies on.

    Args:
        gap: a paired difference.

    Returns:
        ``above``, ``below`` or, when the interval holds zero, ``level``.
    """
    return "above" if gap.low > 0 else "below" if gap.high < 0 else "level"


def frontier_sentence(scores: Scores, headline: str) -> str:
    """Whether our learner is on the frontier of accuracy against cost.

    Args:
        scores: of all methods.
        headline: our learner.

    Returns:
        One sentence; empty when the headline was not tested.
    """
    if headline not in scores.methods:
        return ""
    on, off = [], []
    for shot in common_shots(scores):
        points = points_of(scores, shot, headline)
        frontier = figures.pareto_frontier(points)
        own = next((point for point in points if point.name == headline), None)
        if own is None:
            continue
        better = [point for point in frontier if point.cost <= own.cost and point.accuracy >= own.accuracy]
        if own in frontier:
            on.append(f"{shot}-shot")
        elif better:
            off.append(f"at {shot}-shot {better[-1].name} is at least as accurate and no slower")
    if not on:
        return f"{headline} is not on the frontier: {', '.join(off)}." if off else ""
    return "; ".join([f"{headline} is on the frontier at {' and '.join(on)}", *off]) + "."


def called(scores: Scores, name: str) -> str:
    """A method's name in a sentence.

    Args:
        scores: of all methods.
        name: the method.

    Returns:
        The name, or for the ensemble what it is made of.
    """
    return f"the ensemble of all {scores.methods[name].models_at_inference} models" if name == "ensemble" else name


def networks(count: int) -> str:
    """A number of networks in words.

    Args:
        count: how many.

    Returns:
        For example ``one network``.
    """
    return "one network" if count == 1 else f"{count} networks"


def counted(number: int | None) -> str:
    """A count with a unit that keeps it short.

    Args:
        number: for example of parameters.

    Returns:
        For example ``0.11 M``.
    """
    if number is None:
        return "–"
    return f"{number:,}".replace(",", "\u202f") if number < 10_000 else f"{significant(number / 1e6)} M"


def significant(value: float) -> str:
    """A positive number to about two digits, without exponent.

    Args:
        value: for example milliseconds.

    Returns:
        For example ``0.20``.
    """
    if value <= 0 or not math.isfinite(value):
        return "–"
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def signed(value: float) -> str:
    """A difference with its sign, to one digit.

    Args:
        value: in points.

    Returns:
        For example ``−0.8``.
    """
    return f"{value:+.1f}".replace("-", "−")


def unbroken(sentence: str) -> str:
    """A sentence whose numbers stay with their units and with each other at the end of a line.

    Args:
        sentence: plain text.

    Returns:
        The same with no-break spaces.
    """
    return re.sub(r"(?<=[\d-]) (?=[%/M]|ms |points )|(?<=/) (?=\d)|(?<=M) (?=parameters)", "\u00a0", sentence)


def duration(seconds: float) -> str:
    """A time in the unit in which a person would say it.

    Args:
        seconds: how long.

    Returns:
        For example ``3.6 min``.
    """
    return (
        f"{seconds:.1f} s"
        if seconds < 60
        else f"{seconds / 60:.1f} min"
        if seconds < 3600
        else f"{seconds / 3600:.1f} h"
    )


def points_of(scores: Scores, shot: int, headline: str) -> list[figures.Point]:
    """The methods in the plane of cost and accuracy.

    Args:
        scores: of all methods.
        shot: number of shots.
        headline: the method to highlight.

    Returns:
        Those tested at that number of shots.
    """
    return [
        figures.Point(
            *(name, method.ms_per_image, method.shots[shot].mean, method.shots[shot].ci95),
            data_free=method.data_free,
            transductive=method.transductive,
            highlight=name == headline,
        )
        for name, method in scores.methods.items()
        if shot in method.shots
    ]


def _best_mean(scores: Scores, shot: int) -> float:
    rivals = [m for m in scores.methods.values() if m.data_free and not m.transductive and shot in m.shots]
    return max((method.shots[shot].mean for method in rivals), default=-math.inf)


def _reached(method: MethodScore, shots: Sequence[int]) -> str:
    return " / ".join(f"{method.shots[shot].mean:.1f}" if shot in method.shots else "–" for shot in shots) + " %"
