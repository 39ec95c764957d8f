"""Points by kind, with their mean and its interval: what a second model adds to a first."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metapool.evaluate import mean_interval
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, RULE, panel, round_ticks

_POINT = "#2d6a9f"


def gains(panels: Mapping[str, Mapping[str, Sequence[float]]], unit: str) -> str:
    """Panels side by side on one scale; a panel is as wide as it has kinds.

    Args:
        panels: by the label of the horizontal axis, values by kind, one for each auxiliary model.
        unit: what the vertical axis shows.

    Returns:
        An inline SVG, 720 pixels wide.
    """
    width, height, left, gap = 720, 340, 56, 40
    counts = [len(kinds) + 0.5 for kinds in panels.values()]
    room = width - left - 16 - gap * (len(panels) - 1)
    with panel(width, height, f"Gains {unit}") as (figure, draw):
        shared: Any = None
        for place, (label, kinds) in enumerate(panels.items()):
            start = left + gap * place + room * sum(counts[:place]) / sum(counts)
            bounds = (start / width, 64 / height, room * counts[place] / sum(counts) / width, (height - 104) / height)
            axes = figure.add_axes(bounds, sharey=shared)
            shared = shared or axes
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.spines["bottom"].set_color("#b9c0c9")
            axes.grid(axis="y", color=RULE, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.axhline(0, color="#aab2bd", linewidth=1.2, zorder=1)
            axes.tick_params(axis="y", length=0, labelleft=place == 0)
            axes.tick_params(axis="x", length=0, labelcolor=INK)
            for x, values in enumerate(kinds.values()):
                found = mean_interval(np.asarray(values, dtype=np.float64))
                axes.plot([x - 0.16] * len(values), values, "o", color=_POINT, alpha=0.55, markersize=5, mew=0)
                axes.plot((x + 0.12, x + 0.12), (found.low, found.high), color=ACCENT, linewidth=2)
                axes.plot([x + 0.12], [found.mean], "D", color=ACCENT, markersize=6)
            axes.set_xlim(-0.6, len(kinds) - 0.4)
            axes.set_xticks(range(len(kinds)), list(kinds))
            axes.set_xlabel(label, labelpad=6)
            round_ticks(axes.yaxis)
        figure.text(12 / width, (height - 18) / height, unit, fontweight="bold", color=INK, va="center_baseline")
        said = "dots: auxiliary models; diamonds: their mean with its 95 % interval"
        figure.text(12 / width, 14 / height, said, color=MUTED, va="center_baseline", fontsize=10.5)
        return draw()
