"""What a change of one part does to accuracy: differences to a reference, a row of panels for each question."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metapool.evaluate import Interval
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, RULE, panel, round_ticks

_COLOURS = ("#2d6a9f", ACCENT)
_MARKERS = ("o", "D")
_LINE, _HEAD, _FOOT, _LEFT = 24, 44, 62, 165


@dataclass(frozen=True)
class Difference:
    """One variant against its question's reference.

    Attributes:
        question: whose panel it stands in.
        variant: what was changed to.
        condition: what colour and marker mean.
        column: of the panel.
        interval: difference in points.
    """

    question: str
    variant: str
    condition: str
    column: str
    interval: Interval


def differences(found: Sequence[Difference], references: Mapping[str, str], unit: str) -> str:
    """Points with intervals around a line at zero, which is the reference.

    Args:
        found: at least one; in the order of questions, variants and columns.
        references: by question, the variant that the others are compared with.
        unit: what the horizontal axes show.

    Returns:
        An inline SVG, 760 pixels wide.
    """
    questions, columns, conditions = (
        list(dict.fromkeys(getattr(one, part) for one in found)) for part in ("question", "column", "condition")
    )
    variants = {q: list(dict.fromkeys(one.variant for one in found if one.question == q)) for q in questions}
    rows = {q: [name for name in variants[q] if name != references[q]] for q in questions}
    heights = [_HEAD + _LINE * len(rows[q]) + 28 for q in questions]
    width, height = 760, sum(heights) + _FOOT
    with panel(width, height, "Differences to the reference") as (figure, draw):
        gap = 26
        each = (width - _LEFT - gap * len(columns)) / len(columns)
        top = float(height - 8)
        for q, room in zip(questions, heights):
            shared: Any = None
            for place, column in enumerate(columns):
                left, size = _LEFT + place * (each + gap), _LINE * len(rows[q])
                bounds = (left / width, (top - _HEAD - size) / height, each / width, size / height)
                axes = figure.add_axes(bounds, sharex=shared)
                shared = shared or axes
                shown = [one for one in found if (one.question, one.column) == (q, column) and one.variant in rows[q]]
                _points(axes, shown, rows[q], conditions)
                axes.tick_params(axis="y", labelleft=place == 0)
                if place == 0:
                    figure.text(8 / width, (top - 16) / height, q, fontsize=12.5, fontweight="bold", color=INK)
                    figure.text(
                        _LEFT / width, (top - 16) / height, f"against {references[q]}", fontsize=11, color=MUTED
                    )
                axes.set_title(column, loc="right", fontsize=11, color=MUTED, pad=4)
            top -= room
        figure.text((_LEFT + width - gap) / 2 / width, 36 / height, unit, ha="center", color=MUTED)
        for place, (condition, colour, marker) in enumerate(zip(conditions, _COLOURS, _MARKERS)):
            x = (_LEFT + 150 * place) / width
            style = {"color": colour, "transform": figure.transFigure, "figure": figure, "clip_on": False}
            figure.add_artist(_line([x], [16 / height], marker, style))
            figure.text(x + 10 / width, 16 / height, condition, va="center_baseline", color=INK)
        return draw()


def _points(axes: Any, shown: Sequence[Difference], names: Sequence[str], conditions: Sequence[str]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9c0c9")
    axes.axvline(0, color="#aab2bd", linewidth=1.2, zorder=1)
    axes.grid(axis="x", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.tick_params(axis="x", length=3, color="#b9c0c9")
    several = len({one.condition for one in shown}) > 1
    for one in shown:
        place = conditions.index(one.condition)
        y = names.index(one.variant) + (0.2 * (2 * place - 1) if several else 0.0)
        colour, marker = _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]
        axes.plot(
            (one.interval.low, one.interval.high), (y, y), color=colour, linewidth=2, solid_capstyle="round", zorder=2
        )
        axes.plot([one.interval.mean], [y], marker=marker, color=colour, markersize=6, zorder=3)
    round_ticks(axes.xaxis)


def _line(x: Sequence[float], y: Sequence[float], marker: str, style: Mapping[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(x, y, marker=marker, markersize=6, linestyle="none", **style)
