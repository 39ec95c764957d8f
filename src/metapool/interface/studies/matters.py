"""Does each part of TGR matter? What it trains on, how it groups, and its gradient regularization, one change each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self, get_args

import pydantic

from metapool.base.errors import MetapoolError
from metapool.base.store import Store
from metapool.evaluate import Interval, Scores
from metapool.interface.figures.differences import Difference, differences
from metapool.interface.recipe import meta_train_images
from metapool.interface.studies.inputs import KINDS, Kind, bank_of
from metapool.interface.studies.study import CLASSIFY, Findings
from metapool.interface.studies.trials import (
    Shape,
    Trial,
    TrialStudy,
    gap_over_episodes,
    gap_over_seeds,
    in_words,
    interval_of,
    over_seeds,
    rounded,
    scores_of,
)
from metapool.methods.tgr import TGR

_NO_REPLAY, _REPLAY = "without replay", "with replay"

Asked = Literal["images", "groups", "regularization", "task loss"]
ASKED: tuple[Asked, ...] = get_args(Asked)


@dataclass(frozen=True)
class Variant:
    """One change.

    Attributes:
        name: in table and figure.
        changed: settings of the method.
        inputs: images to train on, where not those recovered.
    """

    name: str
    changed: dict[str, Any] = field(default_factory=dict)
    inputs: Kind | None = None


@dataclass(frozen=True)
class Question:
    """Variants that answer one question.

    Attributes:
        name: of the question.
        asked: the question itself.
        variants: all of them.
        claimed: name of the variant that is to be better.
        rivals: names of those that it is to be better than; what decides.
        replay: whether stage 5 takes part.
    """

    name: Asked
    asked: str
    variants: tuple[Variant, ...]
    claimed: str
    rivals: tuple[str, ...]
    replay: tuple[str, ...] = (_NO_REPLAY, _REPLAY)

    def pairs(self) -> Iterator[tuple[str, Variant]]:
        """Every variant, without and with replay as asked."""
        return ((replay, variant) for replay in self.replay for variant in self.variants)


class MattersStudy(TrialStudy):
    """Trainings that differ in one thing; differences are paired by seed, to the variant that is claimed to be best."""

    title: ClassVar[str] = "Do recovery, grouping and gradient regularization matter?"
    source: ClassVar[str] = "TGR, sections 3.1 to 3.3 and their ablations"
    named: ClassVar[tuple[str, ...]] = ("question", "replay", "variant", "shot")

    asked: tuple[Asked, ...] = pydantic.Field(default=ASKED, min_length=1)
    """Which questions."""
    models: int = pydantic.Field(default=12, ge=2)
    """Models of the pool, from its start."""
    steps: int = pydantic.Field(default=40, ge=1)
    """Steps of stage 4 where there is no replay."""
    replay_steps: int = pydantic.Field(default=10, ge=1)
    """Steps of stage 4 with the recipe's replay after each."""
    strengths: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(default=(1e-3, 1e-2, 1e-1), min_length=1)
    """Strengths of the gradient regularization beside none; the first is what is claimed to help."""

    @pydantic.field_validator("strengths")
    @classmethod
    def _each_once(cls, strengths: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(strengths)) < len(strengths):
            raise ValueError(f"every strength once: {strengths}")
        return strengths

    def questions(self) -> tuple[Question, ...]:
        """What is asked.

        Returns:
            Those that are asked, in the order of the table.
        """
        strengths = [f"α = {alpha:g}" for alpha in (0.0, *self.strengths)]
        alphas = zip(strengths, (0.0, *self.strengths))
        known = (
            # Noise has no class names to agree on, so no kind of images may use them.
            Question(
                "images",
                "Does recovery matter?",
                tuple(Variant(kind, {"names": 0.0}, kind) for kind in KINDS),
                "recovered",
                ("untrained generators", "drawn strokes"),
                (_REPLAY,),
            ),
            Question(
                "groups",
                "Does grouping matter?",
                tuple(Variant(kind, {"grouping": kind}) for kind in ("dissimilar", "similar", "random")),
                "dissimilar",
                ("similar", "random"),
            ),
            Question(
                "regularization",
                "Does gradient regularization matter?",
                tuple(Variant(name, {"alpha": alpha}) for name, alpha in alphas),
                strengths[1],
                (strengths[0],),
            ),
            Question(
                "task loss",
                "Does the relational task loss matter?",
                (
                    Variant("relational", {"task_loss": "relational"}),
                    Variant("episodic", {"task_loss": "episodic"}),
                    Variant("classify", dict(CLASSIFY)),
                ),
                "relational",
                ("classify",),
                (_NO_REPLAY,),
            ),
        )
        return tuple(question for question in known if question.name in self.asked)

    def sample(self) -> Self:
        """Gradient regularization alone, at the strength that is claimed to help.

        Returns:
            The study, cut down.
        """
        asked = ("regularization",) if "regularization" in self.asked else self.asked[:1]
        return self.model_copy(update={"asked": asked, "strengths": self.strengths[:1]})

    def measure(self, store: Store) -> Findings:
        """Trains and scores all variants with all seeds.

        Args:
            store: keeps banks, views, models and scores.

        Returns:
            A row for each variant and number of shots.

        Raises:
            MetapoolError: when the pool has fewer models than asked for.
        """
        recipe, method, pool = self.opened()
        if len(pool) < self.models:
            raise MetapoolError(f"models: the pool has {len(pool)}, not {self.models}")
        pool = pool[: self.models]
        input = pool.input
        shapes = [(recipe.evaluation.way, shot) for shot in recipe.evaluation.shots]
        exam = self.exam(recipe, pool, shapes)
        real = meta_train_images(recipe.evaluation, input)
        kinds = {variant.inputs for question in self.questions() for variant in question.variants} - {None}
        banks = {kind: bank_of(kind, pool, method.recovery, real, store) for kind in KINDS if kind in kinds}
        trials: dict[str, Trial] = {}
        for question in self.questions():
            for replay, variant in question.pairs():
                changed = self._shortened(method, replay, variant)
                inputs = None if variant.inputs is None else banks[variant.inputs]
                for seed in range(self.seeds):
                    trials[_name(question, replay, variant.name, seed)] = Trial(pool, changed, seed, inputs)
        scores = scores_of(trials, exam, store)

        def runs(question: Question, replay: str, name: str, shape: Shape) -> list[Scores]:
            return [scores[_name(question, replay, name, seed)][shape] for seed in range(self.seeds)]

        rows: list[dict[str, Any]] = []
        sentences: list[str] = []
        for question in self.questions():
            for replay, variant in question.pairs():
                for shape in shapes:
                    own, best = (runs(question, replay, name, shape) for name in (variant.name, question.claimed))
                    row: dict[str, Any] = {"question": question.name, "replay": replay}
                    row |= {"variant": variant.name, "shot": shape[1], **rounded(over_seeds(own))}
                    row |= rounded(gap_over_seeds(own, best), "difference")
                    among = gap_over_episodes(own, best)
                    row |= {"episodes low": round(among.low, 3), "episodes high": round(among.high, 3)}
                    rows.append({**row, "seeds": self.seeds})
            gaps = {
                (replay, rival, shape[1]): gap_over_seeds(
                    runs(question, replay, question.claimed, shape), runs(question, replay, rival, shape)
                )
                for replay in question.replay
                for rival in question.rivals
                for shape in shapes
            }
            sentences.append(_sentence(question, gaps))
        said = f"Mean difference in points (95 % interval over {self.seeds} seeds). "
        summary = {"episodes": exam.key()["episodes"], "models": pool.ids}
        return Findings(rows, said + " ".join(sentences), summary)

    def _shortened(self, method: TGR, replay: str, variant: Variant) -> TGR:
        # The last weights are kept, so checkpoints only let a killed training go on.
        steps = self.replay_steps if replay == _REPLAY else self.steps
        update: dict[str, Any] = {"steps": steps, "check_every": steps}
        if replay == _NO_REPLAY:
            update["replay"] = "none"
        return method.model_validate(method.model_dump() | update | variant.changed)

    def draw(self, findings: Findings) -> dict[str, str]:
        """Differences to the claimed variant, a row of panels for each question.

        Args:
            findings: what was measured.

        Returns:
            One figure.
        """
        found = [
            Difference(
                question=str(row["question"]),
                variant=str(row["variant"]),
                condition=str(row["replay"]),
                column=f"{row['shot']}-shot",
                interval=interval_of(row, "difference"),
            )
            for row in findings.rows
        ]
        references: dict[str, str] = {question.name: question.claimed for question in self.questions()}
        return {"": differences(found, references, "points of accuracy, with 95 % intervals over seeds")}


def verdict(gaps: Sequence[Interval]) -> str:
    """What intervals of a claimed improvement say together.

    Args:
        gaps: of the claimed variant to its rivals.

    Returns:
        The answer to "does it matter?".
    """
    better, worse = [gap.low > 0 for gap in gaps], [gap.high < 0 for gap in gaps]
    if all(better):
        return "Yes"
    if any(worse):
        return "No, it is in part worse" if any(better) else "No, it is worse"
    return "In part" if any(better) else "No difference is seen"


def _sentence(question: Question, gaps: dict[tuple[str, str, int], Interval]) -> str:
    """The first of ``replay`` decides: there nothing but the part in question is trained on."""
    deciding = [gap for (replay, _, _), gap in gaps.items() if replay == question.replay[0]]
    parts: list[str] = []
    for replay in question.replay:
        for rival in question.rivals:
            shots = [f"{s}-shot {in_words(gap)}" for (r, v, s), gap in gaps.items() if (r, v) == (replay, rival)]
            parts.append(f"against {rival} {replay} {', '.join(shots)}")
    return f"{question.asked} {verdict(deciding)}: {question.claimed} {'; '.join(parts)}."


def _name(question: Question, replay: str, variant: str, seed: int) -> str:
    return f"{question.name}/{replay}/{variant}/{seed}"
