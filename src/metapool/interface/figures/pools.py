"""Figures about pools and banks: similarity of models, what embeddings tell apart, recovered images side by side."""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metapool.interface.figures import PALETTE
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, round_ticks
from metapool.interface.figures.labels import short

Floats = NDArray[np.float64]


def similarity_map(similarity: Floats, labels: Sequence[tuple[str, str]]) -> str:
    """The matrix of CKA with models ordered by domain and architecture, whose blocks are named and set apart.

    Args:
        similarity: ``[M, M]``; the diagonal is left blank, since its ones would take up the colour scale.
        labels: domain and architecture of every model.

    Returns:
        An inline SVG.
    """
    order = sorted(range(len(labels)), key=lambda model: (labels[model], model))
    ordered = [labels[model] for model in order]
    matrix = np.ma.masked_array(similarity[np.ix_(order, order)], np.eye(len(order), dtype=bool))
    several = len({domain for domain, _ in labels}) > 1
    left, top, side = 118.0 + 22 * several, 34.0 + 20 * several, 460.0
    width, height = left + side + 92, top + side + 16
    with panel(width, height, "CKA between the features of the pool's models") as (figure, draw):
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.add_axes((left / width, 16 / height, side / width, side / height))
        colours = LinearSegmentedColormap.from_list("paper", ["#f7f5ef", "#c9d6df", "#5d8cae", "#173f5f"])
        colours.set_bad("#ffffff")
        shown = axes.imshow(matrix, cmap=colours, interpolation="nearest", vmin=min(0.0, float(matrix.min())))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        for start, end, (_, architecture) in _runs(ordered):
            _name_block(axes, start, end, architecture, 5, MUTED)
            _divide(axes, end, len(order), "white", 1.4)
        if several:
            for start, end, domain in _runs([domain for domain, _ in ordered]):
                _name_block(axes, start, end, domain, 25, ACCENT)
                _divide(axes, end, len(order), ACCENT, 1.8)
        place = ((left + side + 18) / width, 16 / height, 12 / width, side / height)
        bar = figure.colorbar(shown, cax=figure.add_axes(place))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9.5)
        bar.set_label("CKA on the same recovered images", color=MUTED)
        return draw()


def _runs(labels: Sequence[Any]) -> list[tuple[float, float, Any]]:
    """Where runs of equal labels begin and end, in the coordinates of an image's cells."""
    found, start = [], -0.5
    for label, members in groupby(labels):
        end = start + len(list(members))
        found.append((start, end, label))
        start = end
    return found


def _name_block(axes: Any, start: float, end: float, name: str, away: float, colour: str) -> None:
    """A block's name above its columns and beside its rows."""
    style = {"textcoords": "offset points", "fontsize": 10, "color": colour}
    middle, name = (start + end) / 2, short(name, 14)
    axes.annotate(name, (middle, -0.5), xytext=(0, away), ha="center", va="bottom", **style)
    turned = {"rotation": 90, "ha": "right", "va": "center"} if away > 20 else {"ha": "right", "va": "center"}
    axes.annotate(name, (-0.5, middle), xytext=(-6 if away < 20 else -96, 0), **turned, **style)


def _divide(axes: Any, end: float, count: int, colour: str, width: float) -> None:
    if end < count - 0.5:
        axes.axvline(end, color=colour, linewidth=width)
        axes.axhline(end, color=colour, linewidth=width)
