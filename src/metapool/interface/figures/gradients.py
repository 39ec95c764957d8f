"""Figures of gradient regularization: how aligned gradients are over training, and single steps compared."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from metapool.interface.figures import PALETTE, smoothed
from metapool.interface.figures.drawing import ACCENT, INK, MUTED, bare, panel, plain_log_ticks, round_ticks

MEASURES = {"relative": "R / mean |g|²", "cosine": "mean cosine of two gradients"}
STEP_NAMES = {"mean": "no regularization", "implicit": "implicit", "attached": "attached", "explicit": "explicit"}


def curves_of_alphas(curves: Mapping[str, Mapping[str, Sequence[float]]], loss: str) -> str:
    """Discrepancy and cosine over the steps of training, for several displacements.

    Args:
        curves: the measures at every step, by displacement and measure; displacement 0 is no regularization.
        loss: name of the task loss.

    Returns:
        An inline SVG.
    """
    with panel(800, 320, f"Gradients over training, task loss {loss}") as (figure, draw):
        colours = dict(zip(curves, (MUTED, PALETTE[0], PALETTE[1], ACCENT, *PALETTE[2:])))
        for place, (measure, title) in enumerate(MEASURES.items()):
            axes = figure.add_axes((0.055 + 0.5 * place, 0.235, 0.43, 0.645))
            for alpha, found in curves.items():
                values = np.array(found[measure])
                steps = np.arange(1, len(values) + 1)
                axes.plot(steps, values, color=colours[alpha], linewidth=0.7, alpha=0.25)
                name = "no regularization" if alpha == "0" else f"α = {alpha}"
                axes.plot(steps, _trend(values), color=colours[alpha], linewidth=1.8, label=name)
            axes.margins(x=0.01)
            round_ticks(axes.xaxis, whole=True)
            round_ticks(axes.yaxis)
            bare(axes, f"{loss}: {title}")
            axes.set_xlabel("step", labelpad=3)
        figure.legend(
            *axes.get_legend_handles_labels(),
            loc="lower center",
            ncols=len(curves),
            frameon=False,
            fontsize=10,
            labelcolor=INK,
        )
        return draw()


def step_errors(single: Mapping[str, Any], cost: Mapping[str, Mapping[str, float]]) -> str:
    """How far the implicit and the attached step are from the explicit one, and what each takes.

    Args:
        single: ``alphas``, and by task loss and quantity one interval for each.
        cost: seconds by task loss and kind of step.

    Returns:
        An inline SVG.
    """
    with panel(880, 340, "Single steps compared") as (figure, draw):
        colours = dict(zip(cost, (PALETTE[0], ACCENT)))
        axes = figure.add_axes((0.06, 0.15, 0.47, 0.73))
        styles = {"implicit": "-", "attached": (0, (5, 2)), "none": (0, (1, 2))}
        names = {"implicit": "implicit", "attached": "attached", "none": "without any"}
        for loss, colour in colours.items():
            for quantity, style in styles.items():
                means = [interval["mean"] for interval in single[loss][quantity]]
                label = f"{loss}: {names[quantity]}"
                axes.plot(single["alphas"], means, color=colour, linestyle=style, linewidth=1.7, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 8, high)
        plain_log_ticks(axes.xaxis, float(np.log10(max(single["alphas"]) / min(single["alphas"]))))
        plain_log_ticks(axes.yaxis, float(np.log10(8 * high / low)))
        bare(axes, "relative distance from the explicit step")
        axes.set_xlabel("displacement α", labelpad=3)
        axes.legend(loc="lower right", ncols=2, frameon=False, fontsize=9.5, labelcolor=INK)
        bars = figure.add_axes((0.68, 0.15, 0.28, 0.73))
        for place, (loss, seconds) in enumerate(cost.items()):
            heights = np.arange(len(STEP_NAMES)) * 3 + (1 - place)
            spent = [1000 * seconds[name] for name in STEP_NAMES]
            bars.barh(heights[::-1], spent, height=0.85, color=colours[loss])
            for height, value in zip(heights[::-1], spent):
                bars.annotate(
                    f" {value:.0f}", (value, height), va="center", fontsize=9.5, color=INK, annotation_clip=False
                )
        bars.set_yticks(np.arange(len(STEP_NAMES))[::-1] * 3 + 0.5, list(STEP_NAMES.values()))
        bare(bars, "milliseconds of a step")
        bars.grid(visible=False)
        bars.spines["bottom"].set_visible(False)
        bars.set_xticks([])
        bars.margins(x=0.12)
        return draw()


def _trend(values: Any) -> Any:
    """Centred mean over an eighth of the steps, cut at both ends; long series as in the report."""
    if len(values) > 400:
        return smoothed(values)
    half = max(1, len(values) // 16)
    return [values[max(0, place - half) : place + half + 1].mean() for place in range(len(values))]
