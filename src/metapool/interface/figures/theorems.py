"""Figures of the theorems: remainders of the implicit step, and what a second task is worth."""

from collections.abc import Mapping
from typing import Any

from metapool.interface.figures import PALETTE
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, round_ticks

Line = Mapping[float, tuple[float, float, float]]
"""Mean, low and high by the place on the horizontal axis."""

CASE_NAMES = {
    "logistic": "logistic regression",
    "tanh": "two layers, tanh",
    "relu": "two layers, ReLU",
    "conv4": "Conv4: ReLU, max-pooling, batch norm",
}


def remainders_of_step(cases: Mapping[str, Mapping[str, Line]]) -> str:
    """Theorem 4.1: the remainder against the displacement, for several networks.

    Args:
        cases: quantities of ``small_tasks.remainders`` by case.

    Returns:
        An inline SVG.
    """
    title = "What the implicit step misses of the regularized gradient"
    with panel(560, 400, title) as (figure, draw):
        axes = figure.add_axes((0.105, 0.115, 0.87, 0.80))
        colours = dict(zip(cases, (PALETTE[0], PALETTE[1], PALETTE[3], ACCENT)))
        for case, quantities in cases.items():
            _band(axes, quantities["detached"], colours[case], CASE_NAMES[case])
        if "bound" in cases["logistic"]:
            bound = cases["logistic"]["bound"]
            axes.plot(
                list(bound),
                [mean for mean, _, _ in bound.values()],
                color=colours["logistic"],
                linewidth=1.2,
                linestyle=(0, (4, 3)),
                label="logistic regression: the bound α²ρR",
            )
        regularizer = cases["conv4"]["regularizer"]
        axes.plot(
            list(regularizer),
            [mean for mean, _, _ in regularizer.values()],
            color=MUTED,
            linewidth=1.2,
            linestyle=(0, (1, 2)),
            label="Conv4: the regularizer α∇R itself",
        )
        _log_log(axes, "displacement α")
        bare(axes, title + ", in units of |ḡ|")
        axes.legend(frameon=False, fontsize=9.5, loc="lower right", labelcolor=INK)
        return draw()


def attached_remainders(quantities: Mapping[str, Line]) -> str:
    """The companion of theorem 4.1: the released code's step is that of twice the regularization.

    Args:
        quantities: of a smooth problem.

    Returns:
        An inline SVG.
    """
    title = "Distance from a regularized gradient (tanh, units of |ḡ|)"
    with panel(440, 340, title) as (figure, draw):
        axes = figure.add_axes((0.135, 0.135, 0.84, 0.76))
        for quantity, colour, name in (
            ("attached to α", MUTED, "attached, from ∇[L̄ + αR]"),
            ("attached to 2α", PALETTE[0], "attached, from ∇[L̄ + 2αR]"),
            ("detached", ACCENT, "detached, from ∇[L̄ + αR]"),
        ):
            _band(axes, quantities[quantity], colour, name)
        _log_log(axes, "displacement α")
        bare(axes, title)
        axes.legend(frameon=False, fontsize=9.5, loc="lower right", labelcolor=INK)
        return draw()


def accuracy_gain(sizes: Mapping[int, Mapping[str, Line]], basic: int) -> str:
    """Theorem 3.2: accuracy gain against the distance of two tasks, for several numbers of auxiliary images.

    Args:
        sizes: quantities by number of auxiliary images.
        basic: images of the basic task.

    Returns:
        An inline SVG.
    """
    title = f"Accuracy gain on a task of {basic} images (points)"
    with panel(440, 340, title) as (figure, draw):
        axes = figure.add_axes((0.095, 0.135, 0.88, 0.76))
        axes.axhline(0, color=INK, linewidth=0.9)
        for (size, quantities), colour in zip(sizes.items(), (PALETTE[1], PALETTE[0], ACCENT, *PALETTE[2:])):
            _band(axes, quantities["gain"], colour, f"{size} auxiliary images", marker=True)
        _plain(axes, "distance of the auxiliary task")
        round_ticks(axes.yaxis)
        bare(axes, title)
        axes.legend(frameon=False, fontsize=9.5, loc="lower left", labelcolor=INK)
        return draw()


def excess_risk(quantities: Mapping[str, Line], basic: int, size: int) -> str:
    """Theorem 3.2: excess risk in its two parts, beside what the bounds say.

    Args:
        quantities: of one number of auxiliary images.
        basic: images of the basic task.
        size: images of the auxiliary task.

    Returns:
        An inline SVG.
    """
    title = f"Excess risk with {basic} + {size} images (nats, logarithmic)"
    with panel(440, 380, title) as (figure, draw):
        axes = figure.add_axes((0.115, 0.12, 0.86, 0.79))
        for quantity, colour, name, style in (
            ("bound together", INK, "bound for both tasks together", (0, (4, 3))),
            ("bound alone", MUTED, "bound for the basic task alone", (0, (1, 2))),
            ("risk alone", MUTED, "measured: the basic task alone", "-"),
            ("risk together", INK, "measured: both together", "-"),
            ("variance", PALETTE[0], "its part from few images", "-"),
            ("bias", ACCENT, "its part from the distance", "-"),
        ):
            line = {at: values for at, values in quantities[quantity].items() if values[0] > 1e-9}
            _band(axes, line, colour, name, style=style)
        axes.set_yscale("log")
        _powers(axes.yaxis)
        axes.set_ylim(*(limit * factor for limit, factor in zip(axes.get_ylim(), (0.06, 1))))
        _plain(axes, "distance of the auxiliary task")
        bare(axes, title)
        axes.legend(frameon=False, fontsize=9.5, loc="lower right", labelcolor=INK, ncols=2, columnspacing=1.2)
        return draw()


def _band(axes: Any, line: Line, colour: str, name: str, *, style: Any = "-", marker: bool = False) -> None:
    """A line of means over its 95 % interval."""
    means, lows, highs = zip(*line.values())
    axes.fill_between(list(line), lows, highs, color=colour, alpha=0.15, linewidth=0)
    mark = {"marker": "o", "markersize": 3.5} if marker else {}
    axes.plot(list(line), means, color=colour, linewidth=1.7, linestyle=style, label=name, **mark)


def _log_log(axes: Any, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes, label)
    for axis in (axes.xaxis, axes.yaxis):
        _powers(axis)


def _powers(axis: Any) -> None:
    """Label powers of ten without mathematics' own fonts."""
    from matplotlib import ticker

    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def _plain(axes: Any, label: str) -> None:
    axes.margins(x=0.02)
    axes.set_xlabel(label, labelpad=5)
