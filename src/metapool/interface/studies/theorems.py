"""What the two theorems of TGR say, on problems so small that every term can be measured (docs/theorems.md)."""

import json
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import pydantic
import torch
from numpy.typing import NDArray

from metapool.base.store import Store, generator_for, seed_for
from metapool.evaluate import mean_interval
from metapool.interface.figures.theorems import accuracy_gain, attached_remainders, excess_risk, remainders_of_step
from metapool.interface.run.files import write_json
from metapool.interface.studies import small_tasks, two_tasks
from metapool.interface.studies.study import Findings, Row, Study

VERSION = 1
RESAMPLES = 1000
KINKED, SMOOTH = "conv4", "tanh"

Distance = Annotated[float, pydantic.Field(ge=0, le=2 * two_tasks.NORM)]


class TheoremsStudy(Study):
    """Theorem 4.1: how far the implicit step is from the regularized gradient. Theorem 3.2: what another task is worth.

    Cost: about a minute of one core.
    """

    title: ClassVar[str] = "Do the two theorems hold in numbers, and where not?"
    source: ClassVar[str] = "TGR, theorems 3.2 and 4.1"
    named: ClassVar[tuple[str, ...]] = ("theorem", "case", "variable", "at", "quantity")

    seeds: int = pydantic.Field(default=60, ge=2)
    """Random problems of each kind for theorem 4.1."""
    alpha: float = pydantic.Field(default=0.1, gt=0)
    """The largest displacement."""
    halvings: int = pydantic.Field(default=11, ge=2, le=14)
    """How often it is halved; the smallest is then still far above rounding."""
    draws: int = pydantic.Field(default=300, ge=2)
    """Random samples of the two tasks for theorem 3.2."""
    basic: int = pydantic.Field(default=50, ge=1)
    """Images of the basic task."""
    auxiliary: tuple[Annotated[int, pydantic.Field(ge=1)], ...] = pydantic.Field(default=(50, 200, 800), min_length=1)
    """Images of the auxiliary task; every number is tried."""
    distances: tuple[Distance, ...] = pydantic.Field(
        default=(0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0), min_length=2
    )
    """Distances of the auxiliary task from the basic one, of parameters of length 4 each."""
    delta: float = pydantic.Field(default=0.05, gt=0, lt=0.5)
    """Chance with which each sample may be worse than its variance term says."""

    def measure(self, store: Store) -> Findings:
        """Measures both.

        Args:
            store: keeps the remainders of every random problem and the risks at every distance.

        Returns:
            A table in long form: one row for each quantity at each setting.
        """
        rows, summary = self._remainders(store)
        more, other = self._two_tasks(store)
        summary |= other
        return Findings([*rows, *more], answer_of(summary), summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """Figures, from the findings alone.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            Theorem 4.1, its companion, and theorem 3.2 twice.
        """
        rows = findings.rows
        cases = {case: lines(rows, "4.1", case) for case in small_tasks.CASES}
        sizes = {size: lines(rows, "3.2", f"{size} images") for size in self.auxiliary}
        largest = sizes[max(sizes)]
        return {
            "": remainders_of_step(cases),
            "attached": attached_remainders(cases[SMOOTH]),
            "gain": accuracy_gain(sizes, self.basic),
            "risk": excess_risk(largest, self.basic, max(sizes)),
        }

    @property
    def alphas(self) -> list[float]:
        """Displacements, the largest first."""
        return [self.alpha / 2**k for k in range(self.halvings + 1)]

    def _remainders(self, store: Store) -> tuple[list[Row], dict[str, Any]]:
        """Theorem 4.1: all problems, and the mean over the random ones of each kind."""
        names = {f"{case} {seed}": (case, seed) for case, seed in product(small_tasks.CASES, range(self.seeds))}
        keys = {
            name: {"case": case, "seed": seed, "alphas": self.alphas, "version": VERSION}
            for name, (case, seed) in names.items()
        }
        folders = store.units("remainders", keys, partial(_measure_remainders, self.alphas))
        found = {name: json.loads((folder / "found.json").read_text()) for name, folder in folders.items()}
        rows: list[Row] = []
        powers: dict[str, Any] = {}
        for case in small_tasks.CASES:
            of_seeds = [found[f"{case} {seed}"] for seed in range(self.seeds)]
            for quantity in of_seeds[0]:
                values = np.array([one[quantity] for one in of_seeds], dtype=float)
                if np.isnan(values).any():
                    continue  # the constant of this problem is not known
                means = resampled_means(values, case, quantity)
                low, high = np.percentile(means, [2.5, 97.5], axis=0)
                rows += _rows("4.1", case, "alpha", self.alphas, quantity, values.mean(0), low, high)
                powers.setdefault(case, {})[quantity] = _power(self.alphas, values.mean(0), means)
                if quantity == "detached":
                    middle, ratios = (part[..., :-1] / part[..., 1:] for part in (values.mean(0), means))
                    low, high = np.percentile(ratios, [2.5, 97.5], axis=0)
                    rows += _rows("4.1", case, "alpha", self.alphas[:-1], "ratio", middle, low, high)
        shares = np.array(
            [
                np.divide(one["detached"], one["bound"])
                for name, one in found.items()
                if names[name][0] == "logistic"
            ]
        )  # fmt: skip
        bound = {"checked": shares.size, "above": int((shares > 1).sum()), "largest_share": float(shares.max())}
        nearest = min(self.alphas, key=lambda alpha: abs(np.log(alpha / 1e-3)))
        return rows, {
            "power": powers,
            "bound_of_remainder": bound,
            "kinked_at": {
                "alpha": nearest,
                **{
                    quantity: lines(rows, "4.1", KINKED)[quantity][nearest][0]
                    for quantity in ("detached", "regularizer")
                },
            },
        }

    def _two_tasks(self, store: Store) -> tuple[list[Row], dict[str, Any]]:
        """Theorem 3.2: risks and accuracies at all distances, and whether they stay under the bounds."""
        settings = {"draws": self.draws, "basic": self.basic, "auxiliary": list(self.auxiliary)}
        keys = {str(distance): {**settings, "distance": distance, "version": VERSION} for distance in self.distances}
        folders = store.units("two-tasks", keys, partial(_measure_two_tasks, settings))
        rows: list[Row] = []
        above: dict[str, int] = dict.fromkeys(("alone", "together", "of both"), 0)
        looseness: dict[str, list[float]] = {"variance": [], "bias": []}
        gains: dict[int, list[tuple[float, float]]] = {}
        for size, distance in product(self.auxiliary, self.distances):
            with np.load(folders[str(distance)] / f"{size}.npz", allow_pickle=False) as file:
                measured = dict(file)
            bounds = {
                "alone": two_tasks.bound_of_basic(self.basic, 0, 0, self.delta),
                "together": two_tasks.bound_of_basic(self.basic, size, distance, self.delta),
                "of both": two_tasks.bound_of_sum(self.basic, size, distance, self.delta),
            }
            for name, bound in bounds.items():
                above[name] += int((measured[f"risk {name}"] > bound).sum())
            case = f"{size} images"
            for quantity, values in measured.items():
                interval = mean_interval(values)
                rows += _rows(
                    "3.2", case, "distance", [distance], quantity, [interval.mean], [interval.low], [interval.high]
                )
                if quantity == "gain":
                    gains.setdefault(size, []).append((interval.low, interval.high))
            for name, bound in bounds.items():
                rows += _rows("3.2", case, "distance", [distance], f"bound {name}", [bound], [bound], [bound])
            variance = 2 * two_tasks.variance_term(self.basic + size, self.delta)
            looseness["variance"].append(variance / float(measured["variance"].mean()))
            if distance:
                bias = float(measured["bias"].mean())
                looseness["bias"].append((bounds["together"] - variance) / bias)
        return rows, {
            "bound_of_risk": {
                "checked": self.draws * len(self.auxiliary) * len(self.distances),
                "above": above,
                "looseness": {
                    name: [min(values), float(np.median(values)), max(values)] for name, values in looseness.items()
                },
            },
            "gain": {str(size): _turning(self.distances, found) for size, found in gains.items()},
        }


def resampled_means(values: NDArray[np.float64], *names: str) -> NDArray[np.float64]:
    """Means over random problems drawn anew from those at hand (bootstrap).

    Args:
        values: float64 [S, A], one row for each problem.
        *names: what the numbers are for.

    Returns:
        float64 [RESAMPLES, A].
    """
    random = np.random.default_rng(seed_for(0, "theorems", "resample", *names))
    means: NDArray[np.float64] = values[random.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)
    return means


def lines(rows: Any, theorem: str, case: str) -> dict[str, dict[float, tuple[float, float, float]]]:
    """One case out of the table.

    Args:
        rows: of the findings.
        theorem: which.
        case: which.

    Returns:
        Mean, low and high, by quantity and setting.
    """
    found: dict[str, dict[float, tuple[float, float, float]]] = {}
    for row in rows:
        if (row["theorem"], row["case"]) == (theorem, case):
            found.setdefault(row["quantity"], {})[row["at"]] = (row["mean"], row["low"], row["high"])
    return found


def answer_of(summary: Mapping[str, Any]) -> str:
    """The answer in two sentences.

    Args:
        summary: of the findings.

    Returns:
        Text.
    """
    powers, bound, risk = summary["power"], summary["bound_of_remainder"], summary["bound_of_risk"]
    smooth, kinked = (powers[case]["detached"] for case in (SMOOTH, KINKED))
    says = "as theorem 4.1 says" if abs(smooth["mean"] - 2) < 0.1 else "not as theorem 4.1 says"
    at = summary["kinked_at"]
    times = at["detached"] / at["regularizer"]
    largest = max(summary["gain"], key=int)
    gain = summary["gain"][largest]
    turns = "it never hurts" if gain["hurts_from"] is None else f"it hurts from {gain['hurts_from']:g} on"
    helps = "at no distance" if gain["helps_until"] is None else f"up to a distance of {gain['helps_until']:g}"
    broken = bound["above"] + sum(risk["above"].values())
    held = "no measurement is above its bound" if not broken else f"{broken} measurements are above their bound"
    loose = [risk["looseness"][part][1] for part in ("variance", "bias")]
    return (
        f"Theorem 4.1: the remainder of the implicit step falls with the power {_between(smooth)} of α where the loss "
        f"is smooth, {says}, and with {_between(kinked)} in a Conv4, whose kinks make it {times:.2g} times the "
        f"regularizer at α = {at['alpha']:.2g}. Theorem 3.2: an auxiliary task of {largest} images raises accuracy "
        f"{helps} and {turns}; {held}, and the bound is loose, {loose[0]:.0f} times in its variance and "
        f"{loose[1]:.0f} times in its bias (medians)."
    )


def _between(interval: Mapping[str, float]) -> str:
    return "{mean:.2f} ({low:.2f} to {high:.2f})".format(**interval)


def _rows(
    theorem: str, case: str, variable: str, at: Any, quantity: str, mean: Any, low: Any, high: Any
) -> Iterator[Row]:
    for place, *values in zip(at, mean, low, high, strict=True):
        numbers = dict(zip(("mean", "low", "high"), (float(f"{value:.6g}") for value in values)))
        yield {"theorem": theorem, "case": case, "variable": variable, "at": place, "quantity": quantity, **numbers}


def _power(alphas: list[float], mean: NDArray[np.float64], means: NDArray[np.float64]) -> dict[str, float]:
    """Slope of a straight line through the logarithms, and the interval of that over resampled means."""
    x = np.log(alphas) - np.log(alphas).mean()
    slopes = np.log(np.vstack([mean, means])) @ x / (x @ x)
    low, high = np.percentile(slopes[1:], [2.5, 97.5])
    return {"mean": float(slopes[0]), "low": float(low), "high": float(high)}


def _turning(distances: tuple[float, ...], gains: list[tuple[float, float]]) -> dict[str, float | None]:
    """Up to where a gain is surely one, and from where on it is surely a loss."""
    helps = [distance for distance, (low, _) in zip(distances, gains) if low > 0]
    hurts = [distance for distance, (_, high) in zip(distances, gains) if high < 0]
    return {"helps_until": max(helps, default=None), "hurts_from": min(hurts, default=None)}


def _measure_remainders(alphas: list[float], name: str, folder: Path) -> None:
    case, seed = name.split()
    problem = small_tasks.problem(case, generator_for(int(seed), "theorems", case))
    write_json(folder / "found.json", small_tasks.remainders(problem, alphas))


def _measure_two_tasks(settings: Mapping[str, Any], name: str, folder: Path) -> None:
    """Learners of one distance; the samples of all distances have the same inputs and the same luck."""
    sizes, basic = settings["auxiliary"], settings["basic"]
    inputs = two_tasks.points(generator_for(0, "theorems", "points"))
    own, other = two_tasks.task(0), two_tasks.task(float(name))
    chance, other_chance = (torch.sigmoid(inputs @ theta) for theta in (own, other))
    drawn = two_tasks.draw(chance, [basic], settings["draws"], generator_for(0, "theorems", "basic"))[basic]
    added = two_tasks.draw(other_chance, sizes, settings["draws"], generator_for(0, "theorems", "auxiliary"))
    truth, other_truth = two_tasks.expected(chance), two_tasks.expected(other_chance)

    def excess(theta: torch.Tensor) -> torch.Tensor:
        return two_tasks.risk(inputs, theta, truth) - two_tasks.risk(inputs, own.unsqueeze(0), truth)

    alone = two_tasks.learn(inputs, drawn)
    for size in sizes:
        together = two_tasks.learn(inputs, drawn + added[size])
        limit = two_tasks.learn(inputs, two_tasks.expected(chance, basic) + two_tasks.expected(other_chance, size))
        elsewhere = two_tasks.risk(inputs, together, other_truth)
        elsewhere = elsewhere - two_tasks.risk(inputs, other.unsqueeze(0), other_truth)
        share = size / (basic + size)
        measured = {
            "gain": two_tasks.accuracy(inputs, together, chance) - two_tasks.accuracy(inputs, alone, chance),
            "risk alone": excess(alone),
            "risk together": excess(together),
            "risk of both": (1 - share) * excess(together) + share * elsewhere,
            "variance": excess(together) - excess(limit),
            "bias": excess(limit).expand(len(together)),
        }
        np.savez(folder / f"{size}.npz", **{quantity: values.numpy() for quantity, values in measured.items()})
