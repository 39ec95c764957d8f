"""Figures of the report: pure functions from data to inline SVG (or, for images, to a PNG data URI).

The same data gives the same bytes: no dates, fixed salts, matplotlib's own defaults instead of the user's. Text stays
text, so a page's own font applies and figures can be searched; it is laid out with DejaVu Sans, which is wider than
most fonts, so what does not overlap here does not overlap there. One panel is one SVG of about 440 pixels: the page
sets panels side by side on a desk and one below the other on a phone, at the same size of type.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from metapool.base.errors import MetapoolError
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, round_ticks
from metapool.interface.figures.drawing import standalone as standalone
from metapool.interface.figures.labels import Box, Label, short, write_labels

PALETTE = ("#2d6a9f", "#4c8a57", "#84629f", "#a3812b", "#57808c", "#96566b")
LARGEST_TILE, SMALLEST_TILE = 96, 48
LARGEST_LABELLED = 60


@dataclass(frozen=True)
class Point:
    """One method in the plane of cost and accuracy."""

    name: str
    cost: float
    """Milliseconds per image."""
    accuracy: float
    """Percent."""
    ci95: float
    """Half width of the 95 % interval, in points."""
    data_free: bool = True
    transductive: bool = False
    highlight: bool = False


def pareto_frontier(points: Sequence[Point]) -> list[Point]:
    """Methods that no other method beats at equal or lower cost.

    Only data-free, inductive methods compete: what reads real images, or all queries at once, solves an easier task.

    Args:
        points: any number of methods.

    Returns:
        The frontier, cheapest first; accuracy rises strictly along it.
    """
    competitors = [point for point in points if point.data_free and not point.transductive]
    frontier: list[Point] = []
    for point in sorted(competitors, key=lambda point: (point.cost, -point.accuracy)):
        if not frontier or point.accuracy > frontier[-1].accuracy:
            frontier.append(point)
    return frontier


def method_colours(names: Sequence[str], highlight: str) -> dict[str, str]:
    """One colour per method, the same in every panel.

    Args:
        names: methods, in order of appearance.
        highlight: the method that gets the accent colour.

    Returns:
        Hexadecimal colours by method.
    """
    rest = [name for name in names if name != highlight]
    colours = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(rest)}
    return {name: colours.get(name, ACCENT) for name in names}


def floor_of(points: Sequence[Point]) -> float:
    """Where the axis of accuracy starts, so that one hopeless method does not squeeze all others together.

    Args:
        points: at least one method.

    Returns:
        An accuracy in percent, never above the highlighted method; methods below it are shown at the edge.
    """
    best = max(point.accuracy for point in points)
    low = best - 2.2 * max(best - median(point.accuracy for point in points), 2.0)
    shown = [
        point.accuracy - point.ci95
        for point in points
        if point.accuracy >= low or point.highlight or not point.data_free
    ]
    return min(shown) - max(0.08 * (best - min(shown)), 0.5)


def accuracy_against_cost(points: Sequence[Point], title: str) -> str:
    """Accuracy against milliseconds per image (logarithmic), with intervals, labels and the Pareto frontier.

    Methods that need real images are dashed lines, since their accuracy is a reference and not an offer. Methods far
    below all others are triangles at the lower edge, with their accuracy beside the name.

    Args:
        points: at least one method.
        title: what the vertical axis shows.

    Returns:
        An inline SVG.
    """
    with panel(440, 400, title) as (figure, draw):
        axes = figure.add_axes((0.085, 0.12, 0.895, 0.81))
        costs = [max(point.cost, 1e-6) for point in points if point.data_free] or [1.0]
        spread = float(np.log10(max(costs) / min(costs)))
        pads = max(0.6, 0.33 * spread), max(0.5, 0.24 * spread)
        axes.set_xscale("log")
        axes.set_xlim(min(costs) * 10 ** -pads[0], max(costs) * 10 ** pads[1])
        floor, highest = floor_of(points), max(point.accuracy + point.ci95 for point in points)
        axes.set_ylim(floor, highest + max(0.08 * (highest - floor), 0.5))
        bare(axes, title)
        plain_log_ticks(axes.xaxis, spread + sum(pads))
        round_ticks(axes.yaxis)
        axes.set_xlabel("milliseconds per image, one thread (logarithmic)", labelpad=5)

        def pixels(cost: float, accuracy: float) -> tuple[float, float]:
            x, y = axes.transData.transform((max(cost, 1e-6), accuracy))
            return float(x), float(y)

        frontier = pareto_frontier(points)
        obstacles: list[Box] = []
        labels: list[Label] = []
        if frontier:
            xs = [max(point.cost, 1e-6) for point in frontier] + [axes.get_xlim()[1]]
            ys = [point.accuracy for point in frontier] + [frontier[-1].accuracy]
            axes.step(xs, ys, where="post", color="#b9c3cf", linewidth=1.6, zorder=1)
            corners = [pixels(x, y) for x, y in zip(xs, ys)]
            for (x0, y0), (x1, y1) in pairwise(corners):
                obstacles.extend([(x0, y0 - 1, x1, y0 + 1), (x1 - 1, min(y0, y1), x1 + 1, max(y0, y1))])
        for point in points:
            colour = ACCENT if point.highlight else INK if point in frontier else MUTED
            if not point.data_free:
                axes.axhline(point.accuracy, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1)
                y = pixels(1, point.accuracy)[1]
                obstacles.append((0, y - 1, 1e4, y + 1))
                labels.append(Label(f"{short(point.name)} (real images)", 0, y, MUTED, line=True))
                continue
            below = point.accuracy < floor
            x, y = pixels(point.cost, floor if below else point.accuracy)
            y += 7 if below else 0
            reach = 0 if below else pixels(1, point.accuracy + point.ci95)[1] - y
            obstacles.extend([(x - 5, y - 5, x + 5, y + 5), (x - 1.5, y - reach, x + 1.5, y + reach)])
            text = f"{short(point.name)} {point.accuracy:.1f}" if below else short(point.name)
            labels.append(Label(text, x, y, colour, bold=point.highlight))
            style = {"color": colour, "markerfacecolor": "white" if point.transductive else colour}
            x, y = (float(value) for value in axes.transData.inverted().transform((x, y)))
            axes.errorbar(
                *(x, y, None if below else point.ci95),
                fmt="v" if below else "o",
                markersize=7 if point.highlight else 5.5,
                elinewidth=1.2,
                zorder=4 if point.highlight else 3,
                **style,
            )
        write_labels(axes, labels, obstacles)
        return draw()


def recovered_sheet(images: NDArray[np.uint8]) -> str:
    """A row of images as one PNG, with a narrow gap between them.

    Args:
        images: uint8 ``[N, C, H, W]`` with one or three channels; small ones are doubled, so that they stay crisp, and
            large ones are shrunk to 96 pixels.

    Returns:
        A ``data:image/png`` URI.

    Raises:
        MetapoolError: when the array is no batch of grey or RGB images.
    """
    if images.ndim != 4 or images.shape[0] == 0 or images.shape[1] not in {1, 3} or images.dtype != np.uint8:
        raise MetapoolError(f"recovered images must be uint8 [N, 1 or 3, H, W], not {images.dtype} {images.shape}")
    longest = max(images.shape[2:])
    scale = 2.0 if longest <= SMALLEST_TILE else min(1.0, LARGEST_TILE / longest)
    height, width = (max(1, round(side * scale)) for side in images.shape[2:])
    mode, gap = "L" if images.shape[1] == 1 else "RGB", 2
    sheet = Image.new(mode, (len(images) * (width + gap) - gap, height), "white")
    how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX
    for i, image in enumerate(images):
        tile = Image.fromarray(np.ascontiguousarray(image[0] if mode == "L" else image.transpose(1, 2, 0)))
        sheet.paste(tile.resize((width, height), how), (i * (width + gap), 0))
    buffer = io.BytesIO()
    sheet.save(buffer, "png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def dissimilarity_map(dissimilarity: NDArray[np.float64], groups: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """The matrix of dissimilarities with models ordered by group and the groups framed.

    Args:
        dissimilarity: ``[M, M]``; the diagonal is left blank, since its zeros would take up the colour scale.
        groups: indices of models; models in no group come last.
        names: ``M`` names.

    Returns:
        An inline SVG.
    """
    grouped = [i for group in groups for i in group]
    order = grouped + [i for i in range(len(names)) if i not in grouped]
    matrix = np.ma.masked_array(dissimilarity[np.ix_(order, order)], np.eye(len(order), dtype=bool))
    labels = [short(names[i], 18) for i in order] if len(order) <= LARGEST_LABELLED else []
    size = min(9.0, max(6.0, 380 / max(len(order), 1)))
    margin = 16 + 0.62 * size * max((len(label) for label in labels), default=0)
    side = 470.0
    full_width, full_height = margin + side + 82, side + margin + 24
    with panel(full_width, full_height, "Dissimilarity of the pool's models, ordered by group") as (figure, draw):
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.patches import Rectangle

        box = (margin / full_width, margin / full_height, side / full_width, side / full_height)
        axes = figure.add_axes(box)
        colours = LinearSegmentedColormap.from_list("paper", ["#f7f5ef", "#c9d6df", "#5d8cae", "#173f5f"])
        colours.set_bad("#ffffff")
        shown = axes.imshow(matrix, cmap=colours, interpolation="nearest", aspect="equal")
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(labels)), labels, fontsize=size)
        axes.tick_params(length=0, pad=5)
        axes.spines[:].set_visible(False)
        start = -0.5
        for number, group in enumerate(groups, start=1):
            end = start + len(group)
            axes.add_patch(
                Rectangle((start, start), len(group), len(group), fill=False, edgecolor=ACCENT, linewidth=1.8, zorder=3)
            )
            if end < len(order) - 0.5:
                axes.axvline(end, color="white", linewidth=1.4)
                axes.axhline(end, color="white", linewidth=1.4)
            axes.annotate(
                str(number) if len(groups) > 8 else f"group {number}",
                ((start + end) / 2, -0.5),
                xytext=(0, 5),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=9.5,
                color=ACCENT,
            )
            start = end
        bar = figure.colorbar(shown, cax=figure.add_axes((box[0] + box[2] + 20 / full_width, box[1], 0.02, box[3])))
        bar.outline.set_visible(False)
        bar.ax.tick_params(length=0, labelsize=9.5)
        return draw()


def training_curves(
    curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], title: str, colours: Mapping[str, str]
) -> str:
    """One measure over the steps of training, for several methods: a smoothed line over the faint raw values.

    Args:
        curves: steps and values, each ``[T]``, by method.
        title: what is shown.
        colours: by method.

    Returns:
        An inline SVG.
    """
    with panel(440, 240, title) as (figure, draw):
        axes = figure.add_axes((0.105, 0.185, 0.87, 0.69))
        seen: list[NDArray[np.float64]] = []
        for name, (steps, values) in curves.items():
            good = np.isfinite(values)
            steps, values = steps[good], values[good]
            if not len(values):
                continue
            line = smoothed(values)
            # A page of a hundred thousand points would be megabytes; a panel is 400 pixels wide.
            every = max(1, len(values) // 500)
            few = len(values) <= 50
            if not few:
                axes.plot(steps[::every], values[::every], color=colours[name], linewidth=0.7, alpha=0.22)
            axes.plot(
                *(steps[::every], line[::every]),
                color=colours[name],
                linewidth=1.7,
                marker="o" if few else "",
                markersize=3.2,
            )
            seen.extend((line, values if few else np.percentile(values, [2, 98])))
        span = np.concatenate(seen) if seen else np.array([0.0, 1.0])
        if span.min() > 0 and span.max() / span.min() > 25:
            axes.set_yscale("log")
            axes.set_ylim(span.min() / 1.25, span.max() * 1.25)
            plain_log_ticks(axes.yaxis, float(np.log10(span.max() / span.min())))
        else:
            room = 0.06 * max(float(np.ptp(span)), 1e-9)
            axes.set_ylim(span.min() - room, span.max() + room)
            round_ticks(axes.yaxis)
        axes.margins(x=0.01)
        round_ticks(axes.xaxis, whole=True)
        bare(axes, title)
        axes.set_xlabel("step", labelpad=4)
        return draw()


def smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving average over a twenty-fifth of the values; a short series is left alone.

    Args:
        values: ``[T]``.

    Returns:
        ``[T]``; at both ends the window is cut, not padded.
    """
    if len(values) <= 50:
        return values
    half = max(1, len(values) // 50)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    means: NDArray[np.float64] = (sums[high] - sums[low]) / (high - low)
    return means
