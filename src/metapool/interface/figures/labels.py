"""Names beside the points of a figure, none over another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

SIZE = 10.5
"""Of the type, in pixels."""
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def place_labels(candidates: Sequence[Sequence[tuple[Box, float]]], obstacles: Sequence[Box], bounds: Box) -> list[int]:
    """Choose one place per label so that labels overlap neither each other nor anything drawn.

    Coordinate descent over the summed overlaps, which settles in a few sweeps for the tens of labels of a figure.

    Args:
        candidates: per label, its possible boxes, each with what choosing it costs (in shares of a covered label).
        obstacles: boxes to keep clear of.
        bounds: the box that labels must stay in.

    Returns:
        The index of the chosen candidate per label.
    """
    fixed = []
    for own in candidates:
        # A thin line covers next to nothing of a name and yet makes it hard to read: every touch counts.
        covered = [[share for other in obstacles if (share := _overlap(box, other))] for box, _ in own]
        fixed.append(
            [
                cost + sum(shares) + 0.3 * len(shares) + 50 * (1 - _overlap(box, bounds))
                for (box, cost), shares in zip(own, covered)
            ]
        )
    chosen = [int(np.argmin(costs)) for costs in fixed]
    for _ in range(8):
        before = list(chosen)
        for i, own in enumerate(candidates):
            others = [_grown(candidates[j][chosen[j]][0], 1.5) for j in range(len(chosen)) if j != i]
            # Either way round: a long name that hides half of a short one loses little of itself.
            costs = [
                fixed[i][c] + 4 * sum(max(_overlap(box, other), _overlap(other, box)) for other in others)
                for c, (box, _) in enumerate(own)
            ]
            chosen[i] = int(np.argmin(costs))
        if chosen == before:
            break
    return chosen


@dataclass(frozen=True)
class Label:
    """A name to write beside its anchor, or along a whole line."""

    text: str
    x: float
    """In pixels, as ``y``; ignored for a line."""
    y: float
    colour: str
    bold: bool = False
    line: bool = False


def write_labels(axes: Any, labels: Sequence[Label], obstacles: Sequence[Box]) -> None:
    """Write names beside their anchors, with a thin leader where a name had to move away.

    Args:
        axes: matplotlib's axes, with final limits and scales.
        labels: what to write.
        obstacles: boxes of what is drawn already.
    """
    from matplotlib.font_manager import FontProperties

    renderer = axes.figure.canvas.get_renderer()
    (left, bottom), (right, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    bounds = (float(left), float(bottom), float(right), float(top))
    candidates = []
    for label in labels:
        font = FontProperties(size=SIZE, weight="bold" if label.bold else "normal")
        width = float(renderer.get_text_width_height_descent(label.text, font, ismath=False)[0])
        places = _along(label.y, width, bounds) if label.line else _around(label.x, label.y, width, obstacles)
        # The highlighted name stays at its point; others make way.
        candidates.append([(box, cost * (5 if label.bold else 1)) for box, cost in places])
    chosen = place_labels(candidates, obstacles, bounds)
    to_data = axes.transData.inverted().transform
    for label, own, choice in zip(labels, candidates, chosen):
        left, low, right, high = own[choice][0]
        middle = (low + high) / 2
        # Anchored on the side of its point, so that in a narrower font the name still touches the point.
        side = "left" if label.line or left > label.x else "right" if right < label.x else "center"
        x = {"left": left, "right": right, "center": (left + right) / 2}[side]
        style = {"ha": side, "va": "center_baseline", "fontsize": SIZE, "color": label.colour, "zorder": 5}
        axes.text(*to_data((x, middle)), label.text, fontweight="bold" if label.bold else "normal", **style)
        if not label.line and side != "center" and abs(middle - label.y) > 5:
            (x0, y0), (x1, y1) = to_data((label.x, label.y)), to_data((x - 2 if side == "left" else x + 2, middle))
            axes.plot((x0, x1), (y0, y1), color="#aab2bd", linewidth=0.7, zorder=2)


def short(name: str, longest: int = 24) -> str:
    """A name cut to fit a figure.

    Args:
        name: of any length.
        longest: most characters to keep.

    Returns:
        The name, or its beginning and an ellipsis.
    """
    return name if len(name) <= longest else name[: longest - 1] + "…"


def _along(y: float, width: float, bounds: Box) -> Iterator[tuple[Box, float]]:
    """Places for the name of a horizontal line: above or below it, rather at an end than in the middle."""
    for rank, x in enumerate((bounds[2] - width - 2, bounds[0] + 2, (bounds[0] + bounds[2] - width) / 2)):
        for low in (y + 2, y - 14):
            yield (x, low, x + width, low + 12), 0.05 * rank


def _around(x: float, y: float, width: float, obstacles: Sequence[Box]) -> Iterator[tuple[Box, float]]:
    """Places for a label near a point: right, left, above, below, and further off along the vertical with a leader."""
    for sign in (1, -1):
        for shift in range(0, 91, 5):
            for up in (1, -1) if shift else (1,):
                gap = 8 if shift <= 5 else 17
                middle = y + up * shift
                start = x + gap if sign > 0 else x - gap - width
                near = start - 2 if sign > 0 else start + width + 2
                # A leader that runs over other points misleads more than a long one.
                path = [(x + t * (near - x), y + t * (middle - y)) for t in np.linspace(0.35, 1, 8)]
                hits = sum(a <= px <= c and b <= py <= d for px, py in path for a, b, c, d in obstacles)
                cost = 0.02 * (sign < 0) + 0.012 * shift + 0.05 * hits * (shift > 5)
                yield (start, middle - 6, start + width, middle + 6), cost
    for up in (1, -1):
        yield (x - width / 2, y + up * 13 - 6, x + width / 2, y + up * 13 + 6), 0.1


def _overlap(box: Box, other: Box) -> float:
    """Share of ``box`` that ``other`` covers."""
    wide = min(box[2], other[2]) - max(box[0], other[0])
    high = min(box[3], other[3]) - max(box[1], other[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    return wide * high / area if wide > 0 and high > 0 and area > 0 else 0.0


def _grown(box: Box, by: float) -> Box:
    return box[0] - by, box[1] - by, box[2] + by, box[3] + by
