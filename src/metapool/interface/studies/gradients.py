"""What gradient regularization does to the gradients of a step's models, and what each way to it costs."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import pydantic
from numpy.typing import NDArray

from metapool.base.errors import MetapoolError
from metapool.base.store import Key, Store, generator_for
from metapool.evaluate import mean_interval
from metapool.interface.figures.gradients import curves_of_alphas, step_errors
from metapool.interface.recipe import open_pool
from metapool.interface.run import fit_key
from metapool.interface.run.files import write_json
from metapool.interface.studies.single_steps import SingleStep, step_differences, step_seconds
from metapool.interface.studies.study import CLASSIFY, Findings, Row, Study, tgr_recipe
from metapool.meta_model import MetaModel
from metapool.methods.tgr import TGR
from metapool.methods.tgr.tasks import Tasks
from metapool.pool import ModelPool
from metapool.student import Student

VERSION = 1
Loss = Literal["classify", "relational"]
LOSSES: tuple[Loss, ...] = ("classify", "relational")
CHANGES: Mapping[Loss, Mapping[str, Any]] = {
    "classify": CLASSIFY,
    "relational": {"task_loss": "relational"},
}
"""What each task loss needs beside the main recipe."""
SEEN = ("discrepancy", "relative", "cosine", "loss")

Alpha = Annotated[float, pydantic.Field(gt=0, le=10)]


class GradientsStudy(Study):
    """Meta-training with and without implicit gradient regularization, on equal batches from equal weights.

    Stage 4 alone: no replay, no block frozen, the paper's task loss and ours, everything else as in the main recipe.
    """

    title: ClassVar[str] = "Does gradient regularization align the models' gradients, and what does it cost?"
    source: ClassVar[str] = "TGR, figure 5"
    named: ClassVar[tuple[str, ...]] = ("task_loss", "alpha", "seed")

    pool: str = "icons-30"
    """A shipped pool's name or a pool's folder."""
    models: int = pydantic.Field(default=10, ge=2)
    """Only so many models of the pool, from its start."""
    steps: int = pydantic.Field(default=30, ge=4)
    """Steps of meta-training; averages are taken over the last quarter."""
    seeds: int = pydantic.Field(default=5, ge=2)
    """Runs of every kind; with and without regularization they are paired."""
    alphas: tuple[Alpha, ...] = pydantic.Field(default=(1e-3, 1e-2, 1e-1), min_length=1)
    """Displacements beside 0, which turns the regularization off."""
    halvings: int = pydantic.Field(default=3, ge=1, le=14)
    """How often the largest of them is halved when single steps are compared."""
    repeats: int = pydantic.Field(default=5, ge=1)
    """Times that each kind of step is timed, in turn; the median counts."""

    @pydantic.field_validator("alphas")
    @classmethod
    def _each_once(cls, alphas: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(alphas)) < len(alphas):
            raise ValueError("every displacement once")
        return alphas

    def sample(self) -> Self:
        """One displacement and two seeds.

        Returns:
            The study, cut down.
        """
        return self.model_copy(update={"alphas": self.alphas[:1], "seeds": 2})

    def measure(self, store: Store) -> Findings:
        """Trains, compares single steps, times them.

        Args:
            store: keeps recovered tasks, trained models, comparisons and times.

        Returns:
            One row for each run; the curves, the paired differences and the single steps stand in the summary.

        Raises:
            MetapoolError: when the pool has too few models.
        """
        pool = open_pool(self.pool)[: self.models]
        if len(pool.ids) < 2:
            raise MetapoolError(f"pool: {self.pool} has {len(pool.ids)} models; gradients are compared between two")
        for loss in LOSSES:
            self.method(loss, 0.0).prepare(pool, store, 0)  # what opens the pool has workers of its own
        trained = self._train(pool, store)
        records = {run: MetaModel.load(folder).history for run, folder in trained.items()}
        seen = {run: {name: _seen(name, history) for name in SEEN} for run, history in records.items()}
        tail = max(1, self.steps // 4)
        rows: list[Row] = [
            {
                "task_loss": run.loss,
                "alpha": run.alpha,
                "seed": run.seed,
                **{name: float(values[-tail:].mean()) for name, values in found.items()},
            }
            for run, found in seen.items()
        ]
        summary: dict[str, Any] = {
            "pairs": self.seeds,
            "changes": changes(rows),
            "curves": {
                loss: {
                    f"{alpha:g}": {
                        name: _rounded(np.mean([seen[Run(loss, alpha, seed)][name] for seed in range(self.seeds)], 0))
                        for name in ("relative", "cosine")
                    }
                    for alpha in (0.0, *self.alphas)
                }
                for loss in LOSSES
            },
            "single_steps": self._single_steps(pool, store, trained),
            "cost": self._cost(pool, store, trained),
        }
        return Findings(rows, answer_of(summary), summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """Figures, from the findings alone.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            The curves of each task loss, and the comparison of single steps.
        """
        summary = findings.summary
        curves = {loss: curves_of_alphas(found, loss) for loss, found in summary["curves"].items()}
        return {**curves, "steps": step_errors(summary["single_steps"], summary["cost"])}

    def method(self, loss: Loss, alpha: float) -> TGR:
        """What is trained.

        Args:
            loss: the task loss.
            alpha: displacement.

        Returns:
            The main recipe's method, with stage 4 alone.
        """
        _, base = tgr_recipe("main")
        alone = {"replay": "none", "freeze": (), "steps": self.steps, "check_every": self.steps, "alpha": alpha}
        return base.model_copy(update={**alone, **CHANGES[loss]})

    def _train(self, pool: ModelPool, store: Store) -> dict["Run", Path]:
        """Every run's trained model, with its record."""
        runs = [Run(*run) for run in product(LOSSES, (0.0, *self.alphas), range(self.seeds))]
        named = {" ".join(map(str, run)): run for run in runs}
        keys = {name: self._key(run, pool) for name, run in named.items()}
        folders = store.units("gradients-run", keys, partial(self._train_one, pool, store.root, named))
        return {run: folders[name] for name, run in named.items()}

    def _key(self, run: "Run", pool: ModelPool) -> Key:
        return {**fit_key(self.method(run.loss, run.alpha), pool, run.seed, None), "study": ["gradients", VERSION]}

    def _train_one(self, pool: ModelPool, root: Path, named: Mapping[str, "Run"], name: str, folder: Path) -> None:
        run, store = named[name], Store(root)
        method = self.method(run.loss, run.alpha)
        bank, groups, views = method.prepare(pool, store, run.seed)
        input = pool.input
        method.train(bank, groups, views, input, store, run.seed, None, self._key(run, pool), folder)

    def _single_steps(self, pool: ModelPool, store: Store, trained: Mapping["Run", Path]) -> dict[str, Any]:
        """How unlike the directions of single steps are, where training without regularization ends."""
        alphas = [max(self.alphas) / 2**k for k in range(self.halvings + 1)]
        starts = {f"{run.loss} {run.seed}": (run, folder) for run, folder in trained.items() if run.alpha == 0}
        keys = {
            name: {"trained": folder.name, "alphas": alphas, "version": VERSION} for name, (_, folder) in starts.items()
        }
        folders = store.units("gradients-steps", keys, partial(self._compare, pool, store.root, starts, alphas))
        found = {name: json.loads((folder / "found.json").read_text()) for name, folder in folders.items()}
        means: dict[str, Any] = {}
        for loss in LOSSES:
            of_seeds = [found[f"{loss} {seed}"] for seed in range(self.seeds)]
            means[loss] = {
                quantity: [vars(mean_interval(np.array(at))) for at in zip(*(one[quantity] for one in of_seeds))]
                for quantity in of_seeds[0]
            }
        return {"alphas": alphas, **means}

    def _compare(
        self,
        pool: ModelPool,
        root: Path,
        starts: Mapping[str, tuple["Run", Path]],
        alphas: Sequence[float],
        name: str,
        folder: Path,
    ) -> None:
        step = self._step(pool, Store(root), *starts[name])
        write_json(folder / "found.json", step_differences(step.doubled(), alphas))

    def _cost(self, pool: ModelPool, store: Store, trained: Mapping["Run", Path]) -> dict[str, dict[str, float]]:
        """Seconds of each kind of step by task loss, timed in turn in one process with no worker beside it."""
        starts = {run: folder for run, folder in trained.items() if (run.alpha, run.seed) == (0, 0)}
        key = {"trained": [folder.name for folder in starts.values()], "repeats": self.repeats, "version": VERSION}

        def build(folder: Path) -> None:
            seconds = {
                run.loss: step_seconds(self._step(pool, store, run, start), max(self.alphas), self.repeats)
                for run, start in starts.items()
            }
            write_json(folder / "seconds.json", seconds)

        made = store.artifact("gradients-cost", key, build)
        found: dict[str, dict[str, float]] = json.loads((made / "seconds.json").read_text())
        return found

    def _step(self, pool: ModelPool, store: Store, run: "Run", trained: Path) -> SingleStep:
        """A step of a method at the weights where a training ended."""
        method = self.method(run.loss, run.alpha)
        bank, groups, views = method.prepare(pool, store, run.seed)
        input = pool.input
        images = bank.labelled("distinct", input).images if views is None else views.images
        student = Student(method.width, method.way, method.learner, input, images, run.seed, method.whiten)
        tasks = Tasks(method, student, bank, groups, views)
        largest = max(range(len(groups)), key=lambda group: len(groups[group]))
        batches, task_loss = tasks.draw(largest, generator_for(run.seed, "gradients", "single-step"))
        found = MetaModel.load(trained).network.named_parameters()
        params = {name: value.detach().requires_grad_() for name, value in found}
        return SingleStep(task_loss, tasks.together, params, batches)


class Run(NamedTuple):
    """One meta-training: its task loss, displacement and seed."""

    loss: Loss
    alpha: float
    seed: int


def changes(rows: Sequence[Row]) -> dict[str, dict[str, dict[str, Any]]]:
    """What each displacement changes against none, paired over seeds.

    Args:
        rows: of the findings.

    Returns:
        By task loss and displacement: the change of R and of R / mean ‖g‖² in percent (means of logarithms), and those
        of cosine and loss as they are, each with its 95 % interval.
    """
    table = {Run(row["task_loss"], row["alpha"], row["seed"]): row for row in rows}  # type: ignore[arg-type]
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for loss, alpha in dict.fromkeys((run.loss, run.alpha) for run in table if run.alpha):
        seeds = [run.seed for run in table if run[:2] == (loss, alpha)]
        of_alpha = found.setdefault(loss, {}).setdefault(f"{alpha:g}", {})
        for name in SEEN:
            with_it, without = (np.array([table[Run(loss, a, seed)][name] for seed in seeds]) for a in (alpha, 0.0))
            if name in ("discrepancy", "relative"):
                ends = vars(mean_interval(np.log(with_it / without)))
                of_alpha[name] = {end: 100 * float(np.expm1(value)) for end, value in ends.items()}
            else:
                of_alpha[name] = vars(mean_interval(with_it - without))
    return found


def answer_of(summary: Mapping[str, Any]) -> str:
    """The answer in a sentence for each task loss and one about costs.

    Args:
        summary: of the findings.

    Returns:
        Text.
    """
    sentences = []
    for loss, of_alphas in summary["changes"].items():
        # R itself falls with the gradients' length too; relative to that it says how well they are aligned.
        alpha, found = min(of_alphas.items(), key=lambda item: float(item[1]["relative"]["mean"]))
        verb = _verdict(found["discrepancy"], "lowers", "raises", "does not measurably change")
        turn = _verdict(found["cosine"], "lowers", "raises", "does not measurably change")
        sentences.append(
            f"With {loss}, regularization at α = {alpha}, the best of {len(of_alphas)}, {verb} R "
            f"({_signed(found['discrepancy'], '.1f')} %, relative to the gradients' length "
            f"{_signed(found['relative'], '.1f')} %) and {turn} the mean cosine ({_signed(found['cosine'], '.3f')}), "
            f"over {summary['pairs']} paired seeds."
        )
    costs = [
        f"{cost['implicit'] / cost['mean']:.1f}, {cost['attached'] / cost['mean']:.1f} and "
        f"{cost['explicit'] / cost['mean']:.1f} times ({loss})"
        for loss, cost in summary["cost"].items()
    ]
    return " ".join(
        [*sentences, f"Implicit, attached and explicit steps take {' or '.join(costs)} as long as a step without."]
    )


def _verdict(interval: Mapping[str, float], falls: str, rises: str, neither: str) -> str:
    return falls if interval["high"] < 0 else rises if interval["low"] > 0 else neither


def _signed(interval: Mapping[str, float], form: str) -> str:
    mean, low, high = (format(interval[end], f"+{form}") for end in ("mean", "low", "high"))
    return f"{mean}, {low} to {high}"


def _seen(name: str, history: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """A measure at every step."""
    if name == "relative":
        return _seen("discrepancy", history) / _seen("squared_norm", history)
    return np.array([record[name] for record in history], dtype=np.float64)


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]
