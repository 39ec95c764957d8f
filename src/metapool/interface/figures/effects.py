"""Accuracy against one quantity after the other: small multiples with intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from metapool.evaluate import Interval
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, RULE, panel, round_ticks

_COLOURS = (ACCENT, "#2d6a9f", "#4c8a57", "#84629f")
_COLUMNS = 3


@dataclass(frozen=True)
class Level:
    """Accuracy at one value of one quantity.

    Attributes:
        factor: the quantity, as its axis is labelled.
        value: as its tick is labelled.
        series: what colour means; empty where a panel has one line alone.
        interval: in percent.
    """

    factor: str
    value: str
    series: str
    interval: Interval


def effects(levels: Sequence[Level]) -> str:
    """A panel for each quantity; values stand side by side, whatever lies between them.

    Args:
        levels: at least one; in the order of panels, values and series.

    Returns:
        An inline SVG, 780 pixels wide.
    """
    factors = list(dict.fromkeys(level.factor for level in levels))
    series = list(dict.fromkeys(level.series for level in levels if level.series))
    colours = {"": INK, **{name: _COLOURS[place % len(_COLOURS)] for place, name in enumerate(series)}}
    lines = -(-len(factors) // _COLUMNS)
    width, height, head = 780, 34 + 178 * lines, 34
    with panel(width, height, "Effects of each quantity") as (figure, draw):
        for place, factor in enumerate(factors):
            column, line = place % _COLUMNS, place // _COLUMNS
            bottom = height - head - 178 * (line + 1) + 50
            axes = figure.add_axes(((44 + 252 * column) / width, bottom / height, 200 / width, 116 / height))
            _panel(axes, [level for level in levels if level.factor == factor], colours)
            axes.set_xlabel(factor, labelpad=4)
        figure.text(12 / width, (height - 18) / height, "accuracy in percent:", color=MUTED, va="center_baseline")
        for place, name in enumerate(series):
            x = (150 + 80 * place) / width
            figure.text(x, (height - 18) / height, name, color=colours[name], fontweight="bold", va="center_baseline")
        return draw()


def _panel(axes: Any, levels: Sequence[Level], colours: dict[str, str]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9c0c9")
    axes.grid(axis="y", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", length=3, color="#b9c0c9")
    values = list(dict.fromkeys(level.value for level in levels))
    for name in dict.fromkeys(level.series for level in levels):
        own = [level for level in levels if level.series == name]
        places = [values.index(level.value) for level in own]
        axes.plot(
            places, [level.interval.mean for level in own], color=colours[name], linewidth=1.4, marker="o", ms=4.5
        )
        for place, level in zip(places, own):
            axes.plot((place, place), (level.interval.low, level.interval.high), color=colours[name], linewidth=2)
    axes.set_xticks(range(len(values)), values)
    axes.set_xlim(-0.4, len(values) - 0.6)
    round_ticks(axes.yaxis)
