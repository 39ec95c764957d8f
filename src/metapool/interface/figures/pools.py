"""Figures about pools and banks: similarity of models, what embeddings tell apart, recovered images side by side."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class OverlapPanel:
    """One measure of pairs of models."""

    name: str
    overlap: NDArray[np.int64]
    """``[n]``, shared classes of every pair."""
    values: Floats
    """``[n]``; NaN where the measure is not defined."""
    same: NDArray[np.bool_]
    """``[n]``, whether the pair has one architecture."""
    means_of_same: Mapping[str, Mapping[str, float]]
    """``value``, ``low`` and ``high`` by number of shared classes."""
    means_of_different: Mapping[str, Mapping[str, float]]


def by_overlap(title: str, panels: Sequence[OverlapPanel]) -> str:
    """Measures of pairs of models by the number of classes that the two share, side by side.

    A dot is a pair, a line joins the means, which have their intervals; pairs of one architecture and of two are drawn
    apart.

    Args:
        title: unique in the page.
        panels: at least one.

    Returns:
        An inline SVG.
    """
    wide, high, count = 300, 300, len(panels)
    with panel(wide * count, high, title) as (figure, draw):
        for place, one in enumerate(panels):
            axes = figure.add_axes(((place + 0.17) / count, 52 / high, 0.79 / count, (high - 112) / high))
            for kind, means, colour, side in (
                (one.same, one.means_of_same, PALETTE[0], -0.16),
                (~one.same, one.means_of_different, ACCENT, 0.16),
            ):
                kept = kind & np.isfinite(one.values)
                values = one.values[kept]
                # Spread by rank, not at random: the same data, the same bytes.
                spread = 0.22 * (np.argsort(np.argsort(values)) * 0.618 % 1 - 0.5)
                axes.plot(one.overlap[kept] + side + spread, values, ".", color=colour, markersize=3, alpha=0.3)
                xs = [int(shared) + side for shared in means]
                for x, mean in zip(xs, means.values()):
                    axes.plot((x, x), (mean["low"], mean["high"]), color=colour, linewidth=1.6)
                axes.plot(
                    xs, [mean["value"] for mean in means.values()], "o-", color=colour, markersize=5, linewidth=1.2
                )
            axes.set_xticks(range(int(one.overlap.max()) + 1))
            axes.set_xlim(-0.5, one.overlap.max() + 0.5)
            round_ticks(axes.yaxis)
            bare(axes, "")
            axes.set_title(one.name, loc="left", fontsize=11, color=INK, x=-0.1, pad=10)
            axes.set_xlabel("shared classes", labelpad=4)
        figure.text(0.012, 1 - 15 / high, "● pairs of one architecture", color=PALETTE[0], fontsize=10.5, va="center")
        figure.text(0.25, 1 - 15 / high, "● pairs of two architectures", color=ACCENT, fontsize=10.5, va="center")
        return draw()


def by_architecture(title: str, means: Mapping[str, Mapping[str, float]]) -> str:
    """Mean dissimilarity of pairs by their two architectures, with intervals.

    Args:
        title: unique in the page.
        means: ``value``, ``low`` and ``high`` by the pair's architectures.

    Returns:
        An inline SVG.
    """
    high = 64 + 26 * len(means)
    with panel(440, high, title) as (figure, draw):
        axes = figure.add_axes((0.4, 42 / high, 0.56, (high - 52) / high))
        for place, (name, mean) in enumerate(means.items()):
            one, other = name.split(" / ")
            colour = PALETTE[0] if one == other else ACCENT
            axes.plot((mean["low"], mean["high"]), (place, place), color=colour, linewidth=1.6)
            axes.plot(mean["value"], place, "o", color=colour, markersize=6)
        axes.set_yticks(range(len(means)), [short(name, 26) for name in means], fontsize=10)
        axes.set_ylim(len(means) - 0.4, -0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#b9c0c9")
        axes.tick_params(length=0)
        round_ticks(axes.xaxis)
        axes.set_xlabel("mean dissimilarity of pairs, 95 % interval", labelpad=4)
        return draw()


def coloured_maps(plane: Floats, labels: Mapping[str, Sequence[str]], axes_names: tuple[str, str]) -> str:
    """Models in the plane, once for every way to colour them, with a legend below each.

    Args:
        plane: ``[M, 2]``.
        labels: ``M`` labels by what they are.
        axes_names: what the two coordinates are.

    Returns:
        An inline SVG.
    """
    wide, legend = 300, 18 * max(-(-len(set(own)) // 2) for own in labels.values())
    high = 300 + legend
    with panel(wide * len(labels), high, "Task embeddings in the plane") as (figure, draw):
        for place, (name, own) in enumerate(labels.items()):
            axes = figure.add_axes(((place + 0.16) / len(labels), (52 + legend) / high, 0.8 / len(labels), 214 / high))
            for number, label in enumerate(sorted(set(own))):
                members = np.array([one == label for one in own])
                marker = MARKERS[number // len(PALETTE) % len(MARKERS)]
                colour = PALETTE[number % len(PALETTE)]
                axes.plot(*plane[members].T, marker, color=colour, markersize=6, alpha=0.85, markeredgewidth=0)
                where = (place + (0.16, 0.58)[number % 2]) / len(labels), (legend - 9 - 18 * (number // 2)) / high
                figure.text(*where, f"{SIGNS[marker]} {short(label, 15)}", color=colour, fontsize=10, va="center")
            axes.margins(0.08)
            round_ticks(axes.xaxis)
            round_ticks(axes.yaxis)
            bare(axes, "")
            axes.set_title(f"by {name}", loc="left", fontsize=11, color=INK, x=0, pad=8)
            axes.set_xlabel(axes_names[0], labelpad=3, fontsize=10)
            if place == 0:
                axes.set_ylabel(axes_names[1], labelpad=3, fontsize=10)
        return draw()


MARKERS = ("o", "s", "^")
SIGNS = {"o": "●", "s": "■", "^": "▲"}


@dataclass(frozen=True)
class SheetRow:
    """One row of a contact sheet."""

    name: str
    note: str
    """Below the name, smaller."""
    images: str
    """A ``data:image/png`` URI of the row."""
    real: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels, as the PNG's header has them."""
        header = base64.b64decode(self.images.partition(",")[2])[16:24]
        return int.from_bytes(header[:4]), int.from_bytes(header[4:])


def contact_sheet(title: str, rows: Sequence[SheetRow]) -> str:
    """Rows of images with their names on the left; rows of real images are marked and set apart.

    Args:
        title: what all rows show; written above them.
        rows: at least one.

    Returns:
        An inline SVG with the images inside.
    """
    left, gap, top = 226, 12, 36
    width = left + max(row.size[0] for row in rows) + 8
    parts = [f'<text x="8" y="20" font-size="13" fill="{INK}">{escape(title)}</text>']
    y = top
    for row in rows:
        if row.real:
            parts.append(f'<line x1="8" x2="{width - 8}" y1="{y}" y2="{y}" stroke="{ACCENT}" stroke-width="1"/>')
            y += gap
        middle = y + row.size[1] / 2
        colour = ACCENT if row.real else INK
        parts.append(f'<text x="8" y="{middle - 5:g}" font-size="12" fill="{colour}">{escape(row.name)}</text>')
        parts.append(f'<text x="8" y="{middle + 11:g}" font-size="10.5" fill="{MUTED}">{escape(row.note)}</text>')
        size = f'width="{row.size[0]}" height="{row.size[1]}"'
        style = 'style="image-rendering: pixelated"'
        parts.append(f'<image x="{left}" y="{y}" {size} {style} href="{row.images}"/>')
        y += row.size[1] + gap
    head = (
        f'<svg viewBox="0 0 {width} {y}" role="img" aria-label="{escape(title)}" font-family="DejaVu Sans, sans-serif">'
    )
    return head + "".join(parts) + "</svg>"
