"""The page's drawing habits: colours, bare axes, and a figure that turns into inline SVG."""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

from metapool.base.errors import MetapoolError

INK, MUTED, RULE, ACCENT = "#23272e", "#6a717c", "#dfe3e8", "#b4431a"


def bare(axes: Any, title: str) -> None:
    """Leave horizontal rules only, and set the title where the eye begins.

    Args:
        axes: matplotlib's axes.
        title: what they show.
    """
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#b9c0c9")
    axes.grid(axis="y", which="major", color=RULE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", which="both", length=0)
    axes.tick_params(axis="x", which="both", length=3, color="#b9c0c9")
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=10, x=-0.085)


def plain_log_ticks(axis: Any, decades: float) -> None:
    """Label a logarithmic axis with plain numbers; within two decades also at 2 and 5.

    Args:
        axis: matplotlib's axis.
        decades: its length.
    """
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.2 else (1.0,), numticks=12))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(ticker.NullLocator())


def round_ticks(axis: Any, whole: bool = False) -> None:
    """Label a linear axis at about five round numbers.

    Args:
        axis: matplotlib's axis.
        whole: integers only.
    """
    from matplotlib import ticker

    axis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10], integer=whole))


@contextmanager
def panel(width: float, height: float, title: str) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Open a figure measured in pixels, under fixed settings instead of the user's.

    Args:
        width: in pixels.
        height: in pixels.
        title: unique in the page: it names the figure to screen readers and salts its ids.

    Yields:
        The figure, and the function that turns it into inline SVG.

    Raises:
        MetapoolError: when matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetapoolError("figures need matplotlib: pip install 'metapool[report]'") from error
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names in scripts that DejaVu lacks are only measured with it; the browser has the glyphs.
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": f"metapool {title}",
                "text.parse_math": False,
                "font.size": 11,
                "text.color": INK,
                "axes.labelcolor": MUTED,
                "xtick.color": MUTED,
                "ytick.color": MUTED,
                "axes.unicode_minus": True,
            }
        )
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        FigureCanvasAgg(figure)

        def draw() -> str:
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            return _inline(buffer.getvalue(), title)

        yield figure, draw


def standalone(svg: str) -> str:
    """An inline figure as a file of its own, on white.

    Args:
        svg: what :func:`panel` draws.

    Returns:
        Content of an ``.svg`` file.
    """
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background: white" ', 1) + "\n"


def _inline(svg: str, title: str) -> str:
    """Strip what only a file of its own needs, and make ids unique within a page of several figures."""
    prefix = re.sub(r"\W+", "-", title)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    head = f'<svg {view.group(0) if view else ""} role="img" aria-label="{escape(title)}">'
    return head + svg[svg.index(">") + 1 :].strip()
