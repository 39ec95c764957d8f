"""What the recoveries make of the same models: images side by side, and how well they do what they minimise."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from metapool.bank import RecoveredTask
from metapool.base.errors import MetapoolError
from metapool.base.functional import widen
from metapool.base.images import LabelledImages, to_bytes, to_float
from metapool.base.store import Store, generator_for
from metapool.blackbox import BlackBox, ZeroOrderRecovery, wanted_loss
from metapool.evaluate import Interval, mean_interval
from metapool.interface.figures import recovered_sheet
from metapool.interface.figures.pools import SheetRow, contact_sheet
from metapool.interface.recipe import open_pool, training_images
from metapool.interface.studies.study import Findings, Row, Study, tgr_recipe
from metapool.methods.free import FREE, MetaGenerator, Visit
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import VERSION as RECOVER_VERSION
from metapool.recover import GeneratorRecovery, PixelRecovery, batch_norm_distances
from metapool.student import Student

VERSION = 1
MADE_BY = [VERSION, RECOVER_VERSION, FREE.version]
REAL = "real images"
Way = GeneratorRecovery | PixelRecovery | ZeroOrderRecovery | FREE
"""Settings of a way to recover; of FREE, the visit of its meta-generator."""


Recovery = Literal[
    "paper's generator", "recipe's generator", "pixels", "meta-generator", "answers alone", "untrained generator"
]
RECOVERIES: tuple[Recovery, ...] = get_args(Recovery)


def ways(recipe: GeneratorRecovery | PixelRecovery) -> dict[Recovery, Way]:
    """Every recovery there is.

    Args:
        recipe: the recipe's own.

    Returns:
        Settings by the name of the row.
    """
    like = {"width": recipe.width, "code": recipe.code} if isinstance(recipe, GeneratorRecovery) else {}
    return {
        "paper's generator": GeneratorRecovery(learning_rate=1e-3, shift=4),
        "recipe's generator": recipe,
        "pixels": PixelRecovery(),
        "meta-generator": FREE(),
        "answers alone": ZeroOrderRecovery(),
        "untrained generator": GeneratorRecovery(steps=0, **like),
    }


@dataclass(frozen=True)
class Material:
    """What workers need.

    Attributes:
        pool: the models.
        ways: recoveries by name.
        images: of every class.
        seed: of everything random.
        meta: folder of the meta-generator's weights, where one of the ways needs it.
    """

    pool: ModelPool
    ways: Mapping[str, Way]
    images: int
    seed: int
    meta: Path | None


class RecoveriesStudy(Study):
    """Images of one class by every recovery, and three numbers about all images of several models."""

    title: ClassVar[str] = "What do the recoveries make of the same models?"
    source: ClassVar[str] = "TGR, section 3.1; FREE; DeepInversion; BiDf-MKD"
    named: ClassVar[tuple[str, ...]] = ("recovery", "model")

    pool: str = "icons-30"
    """A shipped pool's name or a folder."""
    recipe: str = "main"
    """Recipe whose recovery is one of the rows."""
    recoveries: tuple[Recovery, ...] = pydantic.Field(default=RECOVERIES, min_length=1)
    """Which recoveries."""
    models: int = pydantic.Field(default=3, ge=1)
    """Models, from the pool's start, that the numbers are averaged over; the sheet shows the first."""
    label: str | None = None
    """Class of the first model that the sheet shows; its first one when not given."""
    images: int = pydantic.Field(default=8, ge=1)
    """Images of every class that are compared, and shown."""
    data: str | None = "icons"
    """Where real images of the models' classes come from, for the last row; None leaves it out."""
    seed: int = 0
    """Of everything random."""

    def sample(self) -> Self:
        """The cheapest recoveries of the first model.

        Returns:
            The study, cut down.
        """
        cheap = tuple(name for name in self.recoveries if name in ("recipe's generator", "untrained generator"))
        return self.model_copy(update={"models": 1, "recoveries": cheap or self.recoveries[:1]})

    def measure(self, store: Store) -> Findings:
        """Recovers the models in every way and looks at as many images of each class.

        Args:
            store: finished stages.

        Returns:
            A row for each recovery and model.

        Raises:
            MetapoolError: when the first model does not know the class.
        """
        pool = open_pool(self.pool)
        chosen = pool[: self.models]
        first = pool.manifest.models[0]
        label = first.classes[0] if self.label is None else self.label
        if label not in first.classes:
            raise MetapoolError(f"label: model {first.id!r} knows {', '.join(first.classes)}, not {label!r}")
        known = ways(tgr_recipe(self.recipe)[1].recovery)
        wanted: dict[str, Way] = {name: way for name, way in known.items() if name in self.recoveries}
        tasks = recover_all(pool, chosen.ids, wanted, self.images, self.seed, store)
        if self.data is not None:
            data = training_images(self.data, first.input.height, first.input.channels)
            for model in chosen:
                tasks[REAL, model.id] = real_task(data, model, self.images, self.seed, self.data)
        entries = {entry.id: entry for entry in chosen.manifest.models}
        rows: list[Row] = [
            {
                "recovery": name,
                "real": name == REAL,
                "model": id,
                "architecture": f"{entries[id].network.architecture}:{entries[id].network.width}",
                "images": len(task.labels),
                **{key: None if value != value else round(value, 4) for key, value in task.record.items()},
            }
            for (name, id), task in tasks.items()
        ]
        number = first.classes.index(label)
        shown = {
            name: task.images[task.labels == number].numpy() for (name, id), task in tasks.items() if id == first.id
        }
        summary = {
            "class": label,
            "model": first.id,
            "recoveries": {
                name: {column: vars(found) for column, found in _means(rows, name).items()} for name in shown
            },
            "sheets": {name: recovered_sheet(images) for name, images in shown.items()},
        }
        return Findings(rows, _answer(rows, list(shown), len(chosen)), summary)

    def draw(self, findings: Findings) -> dict[str, str]:
        """The contact sheet.

        Args:
            findings: what :meth:`measure` gave.

        Returns:
            One SVG.
        """
        rows = []
        for name, images in findings.summary["sheets"].items():
            own = next(r for r in findings.rows if (r["recovery"], r["model"]) == (name, findings.summary["model"]))
            distance = "no batch norm" if own["batch_norm"] is None else f"batch-norm loss {own['batch_norm']:.1f}"
            note = f"{own['agreement']:.0f} % as wanted, {distance}"
            rows.append(SheetRow(f"{name} (not recovered)" if own["real"] else name, note, images, bool(own["real"])))
        about = findings.summary
        return {"": contact_sheet(f"“{about['class']}” out of {about['model']}, by every recovery", rows)}


def recover_all(
    pool: ModelPool, ids: Sequence[str], ways: Mapping[str, Way], images: int, seed: int, store: Store
) -> dict[tuple[str, str], RecoveredTask]:
    """Every model in every way.

    Args:
        pool: the models; the meta-generator learns on all of them.
        ids: of those that are recovered.
        ways: recoveries by name.
        images: of every class that are kept.
        seed: of everything random.
        store: keeps what was recovered.

    Returns:
        Recovered tasks by recovery and model id; their records hold what :func:`judged` measures.
    """
    meta: Path | None = None
    for free in (way for way in ways.values() if isinstance(way, FREE)):
        key: dict[str, Any] = {"method": free.model_dump(mode="json"), "pool": pool.digest(), "seed": seed}
        build = partial(_write_meta_generator, pool, free, seed)
        meta = store.artifact("study-meta-generator", {**key, "version": MADE_BY}, build)
    units: dict[str, dict[str, Any]] = {}
    for name, way in ways.items():
        for id in ids:
            units[f"{name}/{id}"] = {
                "way": [type(way).__name__, way.model_dump(mode="json")],
                "model": pool.model_digest(id), "id": id, "images": images, "seed": seed, "version": MADE_BY,
                "meta": meta.name if meta is not None and isinstance(way, FREE) else None,
            }  # fmt: skip
    folders = store.units("study-recoveries", units, partial(_unit, Material(pool, ways, images, seed, meta)))
    return {(unit.split("/")[0], unit.split("/")[1]): RecoveredTask.load(folder) for unit, folder in folders.items()}


def judged(model: PretrainedModel, images: Tensor, labels: Tensor, kept: int, seconds: float) -> RecoveredTask:
    """The first images of every class, and what the model says of them.

    Args:
        model: that they come from.
        images: uint8 [N, C, H, W].
        labels: int64 [N], as wanted.
        kept: images of a class that are judged, so that batch statistics are over equal numbers.
        seconds: that they took.

    Returns:
        The task. Its record: percent that the model labels as wanted, the batch-norm part of the inversion loss (NaN
        without batch norm), cross-entropy to the wanted label, seconds.
    """
    rows = torch.cat([(labels == label).nonzero()[:kept, 0] for label in range(len(model.classes))])
    images, labels = images[rows], labels[rows]
    with torch.no_grad(), batch_norm_distances(model.network) as distances:
        logits = widen(model(to_float(images)))
    record = {
        "agreement": 100 * (logits.argmax(1) == labels).double().mean().item(),
        "batch_norm": torch.stack(distances).sum().item() if distances else float("nan"),
        "cross_entropy": F.cross_entropy(logits, labels).item(),
        "seconds": seconds,
    }
    return RecoveredTask(images, labels, logits, model.classes, record)


def real_task(data: LabelledImages, model: PretrainedModel, kept: int, seed: int, name: str) -> RecoveredTask:
    """Real images of a model's classes, to be compared with; no recovery sees them.

    Args:
        data: of all classes.
        model: the model.
        kept: images of a class, at most.
        seed: of the draw.
        name: of the data.

    Returns:
        Judged as recovered ones are.

    Raises:
        MetapoolError: when the data has no images of a class.
    """
    if missing := [one for one in model.classes if one not in data.classes]:
        raise MetapoolError(
            f"data: {name} has no images of class {missing[0]!r} of model {model.id!r}; name what the pool was trained "
            "on, or None to leave real images out"
        )
    own = data.select([data.classes.index(one) for one in model.classes])
    own = own.take(torch.randperm(len(own), generator=generator_for(seed, "study-real", model.id)))
    return judged(model, own.images, own.labels, kept, 0.0)


def _write_meta_generator(pool: ModelPool, free: FREE, seed: int, folder: Path) -> None:
    """FREE's meta-generator after the method's own warm-up, in which there is no meta-model to be adverse to."""
    input = pool.input
    blank = torch.zeros(8, *input.shape, dtype=torch.uint8)
    five = MetaGenerator(free, pool, Student(4, free.way, free.learner, input, blank, seed), seed)
    for step in range(max(1, int(free.warm_up * free.steps))):
        five.step(None, generator_for(seed, "study-meta-generator", str(step)))
    save_file(
        {name: value.contiguous() for name, value in five.painters.state_dict().items()}, folder / "phi.safetensors"
    )


def _unit(material: Material, unit: str, folder: Path) -> None:
    name, id = unit.split("/")
    model, way = material.pool.get(id), material.ways[name]
    generator = generator_for(material.seed, "study-recoveries", name, id)
    started = time.perf_counter()
    images, labels = _recovered(material, model, way, generator)
    judged(model, images, labels, material.images, time.perf_counter() - started).save(folder)


def _recovered(
    material: Material, model: PretrainedModel, way: Way, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    count = material.images
    if isinstance(way, GeneratorRecovery | PixelRecovery):
        task = way.model_copy(update={"per_class": max(way.per_class, count)}).recover(model, generator)
        return task.images, task.labels
    if isinstance(way, FREE):
        assert material.meta is not None
        few = way.model_copy(update={"visit": way.visit.model_copy(update={"per_class": count})})
        prefix = f"{model.input.shape}."
        stored = load_file(material.meta / "phi.safetensors")
        phi = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
        visit = Visit(few, model, phi, None, generator)
        for _ in range(way.visit.steps):
            visit.step()
        return to_bytes(visit.best), visit.labels
    labels = torch.arange(len(model.classes)).repeat_interleave(count)
    box = BlackBox(model, way.model_copy(update={"per_class": count}).queries(len(model.classes)))
    painter = way.painter(model.input, generator)
    images = way.recover(box, painter, len(labels), lambda *_: partial(wanted_loss, labels=labels), generator)
    return images, labels


def _means(rows: Sequence[Row], name: str) -> dict[str, Interval]:
    """Means over models, with intervals by Student's t; a column that a model lacks is left out."""
    own = [row for row in rows if row["recovery"] == name]
    found: dict[str, Interval] = {}
    for column in ("agreement", "batch_norm", "cross_entropy", "seconds"):
        values = [float(value) for row in own if (value := row[column]) is not None]
        if values:
            ends = mean_interval(np.array(values))
            found[column] = Interval(*(round(end, 4) for end in (ends.mean, ends.low, ends.high)))
    return found


def _answer(rows: Sequence[Row], names: Sequence[str], models: int) -> str:
    means = {name: _means(rows, name) for name in names}
    recovered = [name for name in names if name != REAL and "batch_norm" in means[name]]

    def said(name: str) -> str:
        agreement, distance = means[name]["agreement"], means[name].get("batch_norm")
        text = f"{name} {agreement.mean:.0f} % as wanted"
        return text if distance is None else f"{text}, batch-norm loss {distance.mean:.1f}"

    parts = "; ".join(said(name) for name in names)
    over = "one model, so without intervals" if models == 1 else f"means over {models} models, 95 % intervals by t"
    if len(recovered) < 2:
        return f"{parts} ({over})."
    best, second = sorted(recovered, key=lambda name: means[name]["batch_norm"].mean)[:2]
    values = [[float(r["batch_norm"] or 0) for r in rows if r["recovery"] == name] for name in (best, second)]
    lead = mean_interval(np.array(values[1]) - np.array(values[0]))
    clearly = "clearly closest" if models > 1 and lead.low > 0 else "closest, though not clearly,"
    return (
        f"{best} comes {clearly} to the models' batch-norm statistics, by {lead.mean:.1f} [{lead.low:.1f}, "
        f"{lead.high:.1f}] before {second}. {parts} ({over})."
    )
