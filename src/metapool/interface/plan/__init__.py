"""Before a run: what it would make, what the store has of that, and what the rest costs on this machine.

Whether a piece is there is decided by the keys of the stages themselves. One thing cannot be known before its time: a
meta-model's key holds the groups, which hang on the embeddings; without them it counts as missing.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from metapool.bank import TaskBank
from metapool.base.functional import half_precision
from metapool.base.store import Progress, keep_memory, silent
from metapool.embed import embed_keys, probe_key
from metapool.interface.plan.costs import Costs
from metapool.interface.plan.parts import METHODS, Part, Plan, Stage
from metapool.interface.plan.parts import plan_summary as plan_summary
from metapool.interface.recipe import Recipe
from metapool.interface.run import Job, cost_key, fit_key, prepare, score_key
from metapool.methods import AnyMethod, recovery_of
from metapool.methods.tgr import TGR
from metapool.recover import AnyRecovery, GeneratorRecovery, common_key, recover_keys
from metapool.views import images_key, view_key

STAGES = ("common", "recover", "probe", "embed", "view-images", "view", "meta-model", "fit", "scores", "cost")
"""In the order in which a method goes through them."""
PROGRAM = 6.5e8
"""Bytes of Python, PyTorch and all that is imported, as measured."""


def plan(recipe: Recipe, progress: Progress = silent) -> Plan:
    """Says what a run of the recipe would do; makes nothing in the store.

    Minutes come from steps that are timed here and now, with the workers and threads that the run would have; whatever
    else the machine does meanwhile makes them longer.

    Args:
        recipe: what would run.
        progress: called as ``progress("plan", done, total)``.

    Returns:
        The plan.
    """
    job = prepare(recipe)
    keep_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(job.store.threads)
    try:
        walk = _Walk(job, recipe.seed)
        todo = [partial(walk.method, name) for name in job.methods]
        todo += [partial(walk.scores, name, at, at) for name, at in job.references.items()]
        for done, visit in enumerate(todo):
            progress("plan", done, len(todo))
            visit()
        progress("plan", len(todo), len(todo))
    finally:
        torch.set_num_threads(before)
    return Plan(recipe.name, walk.stages(), walk.memory)


class _Walk:
    """Goes through a job's methods as a run does, and notes every folder once."""

    def __init__(self, job: Job, seed: int) -> None:
        self.job = job
        self.seed = seed
        self.costs = Costs(job)
        self.parts: dict[tuple[str, str], Part] = {}
        self.memory = 0.0

    def stages(self) -> list[Stage]:
        """All that was noted, in the order of the pipeline."""
        found: dict[str, list[Part]] = {}
        for part in sorted(self.parts.values(), key=lambda part: STAGES.index(part.stage)):
            found.setdefault(f"meta-model {part.name}" if part.stage == "meta-model" else part.stage, []).append(part)
        jobs, models = self.job.store.jobs, len(self.job.methods) + len(self.job.references)
        return [
            Stage(name, parts, min(jobs, models) if parts[0].stage in METHODS else jobs)
            for name, parts in found.items()
        ]

    def method(self, name: str) -> None:
        """Notes all that a method makes."""
        method, job, costs = self.job.methods[name], self.job, self.costs
        kind = f"fit-{method.name}"
        fitted = job.store.folder(kind, fit_key(method, job.pool, self.seed, job.validation))
        todo = not fitted.exists()
        # The report shows the bank and the groups of the recipe's own method, so that a run asks for them in any case.
        shown = todo or method is next(iter(job.methods.values()))
        recovery, images, bank = recovery_of(method), 0, TaskBank({})
        if recovery is not None:
            bank = self._recovered(recovery, shown)
            images = sum(recovery.per_class * len(entry.classes) for entry in costs.entries.values())
        if isinstance(method, TGR):
            embedded = self._embedded(method, bank, shown)
            if method.relational:
                self._viewed(method, bank, images, todo)
            self._trained(name, method, bank, images, embedded, todo)
        size = 4 * costs.answers(method).numbers
        self._note("fit", name, ("method", ""), fitted, todo, partial(costs.fit, method, images), size)
        self.scores(name, method, fitted)

    def scores(self, name: str, method: AnyMethod | Path, fitted: Path) -> None:
        """Notes the scores of a model, whose folder need not be there yet."""
        drawn = self.job.episodes
        folder = self.job.store.folder("scores", score_key(fitted, self.job.images, drawn, self.job.store))
        shots = " and ".join(map(str, drawn))
        episodes = len(next(iter(drawn.values())))
        about = ("model", f"{episodes} episodes of {shots} shots")
        size = 8 * episodes * len(drawn)
        self._note("scores", name, about, folder, True, partial(self.costs.scoring, method), size)
        folder = self.job.store.folder("cost", cost_key(fitted, self.job.images, self.job.store))
        self._note("cost", name, ("model", ""), folder, True, partial(self.costs.timing, method), 0)

    def _recovered(self, recovery: AnyRecovery, needed: bool) -> TaskBank:
        costs = self.costs
        if (key := common_key(self.job.pool, recovery)) is not None and isinstance(recovery, GeneratorRecovery):
            share = recovery.warm_steps / recovery.steps
            first = partial(costs.unit, self.job.pool.ids[0], recovery.digest())
            about = ("generator", f"{recovery.warm_steps} steps")
            folder = self.job.store.folder("common", key)
            self._note("common", "all models", about, folder, needed, lambda: share * first(), 0)
        keys = recover_keys(self.job.pool, recovery)
        bank = TaskBank({id: self.job.store.folder("recover", key, unit=True) for id, key in keys.items()})
        for id, folder in bank.folders.items():
            entry = costs.entries[id]
            channels, height, width = entry.input.shape
            size = recovery.per_class * len(entry.classes) * (channels * height * width + 8 + 4 * len(entry.classes))
            about = ("model", f"{recovery.steps} steps each")
            self._note("recover", id, about, folder, needed, partial(costs.unit, id, recovery.digest()), size)
        return bank

    def _embedded(self, method: TGR, bank: TaskBank, needed: bool) -> bool:
        """Returns whether all embeddings are there."""
        settings, store, costs = method.probe, self.job.store, self.costs
        probe = store.folder("probe", probe_key(bank, costs.input, settings))
        about = ("network", f"{settings.steps} steps each")
        self._note("probe", method.name, about, probe, needed, partial(costs.probe, settings), 0)
        keys = embed_keys(bank, costs.input, settings, probe)
        folders = {id: store.folder("embed", key, unit=True) for id, key in keys.items()}
        for id, folder in folders.items():
            self._note("embed", id, ("task", ""), folder, needed, partial(costs.unit, id, settings.digest()), 0)
        return all(folder.exists() for folder in (probe, *folders.values()))

    def _viewed(self, method: TGR, bank: TaskBank, images: int, needed: bool) -> None:
        settings, job, costs = method.views, self.job, self.costs
        key = images_key(bank, job.pool.ids, costs.input, settings)
        channels, height, width = costs.input.shape
        count = _views_of(method, images)
        folder, size = job.store.folder("view-images", key), count * (channels * height * width + 16)
        about = ("set", f"{count} images each")
        self._note("view-images", method.name, about, folder, needed, partial(costs.view_images, settings, count), size)
        for id, entry in costs.entries.items():
            folder = job.store.folder("view", view_key(key, job.pool, id), unit=True)
            size = 2 * count * (int(costs.unit(id, "features")) + len(entry.classes))
            about = ("model", f"{count} images each")
            self._note("view", id, about, folder, needed, partial(costs.unit, id, "view", count), size)

    def _trained(self, name: str, method: TGR, bank: TaskBank, images: int, embedded: bool, needed: bool) -> None:
        job, costs, done = self.job, self.costs, 0
        folder: Path | None = None
        if embedded:
            key = method.key(bank, method.grouped(job.pool, bank, job.store, self.seed), self.seed, job.validation)
            folder, done = job.store.folder("meta-model", key), job.store.steps_done("meta-train", key)
        views = _views_of(method, images)
        size = 6 * 4 * costs.answers(method).numbers  # the model; in the checkpoint that, its means and Adam's moments
        about = ("", f"{method.steps} steps" + (f", {done} done" if 0 < done < method.steps else ""))
        part = self._note("meta-model", name, about, folder, needed, partial(costs.training, method, views), size)
        part.remaining = costs.training(method, views, done) if done else part.seconds
        self.memory = max(self.memory, self._memory(method, views))

    def _memory(self, method: TGR, views: int) -> float:
        """Bytes that meta-training holds at its peak."""
        channels, height, width = self.costs.input.shape
        layer = method.width * height * width  # numbers that the first layer makes of an image
        steps = 5 * 4 * 256 * layer  # of the 256 images of a chunk; how many times was measured on the main job
        if not method.relational:
            return PROGRAM + steps
        seen = views * 2 * sum(self.costs.unit(id, "features") for id in self.costs.entries)
        maps = 0.0
        if any(method.phases()):  # what the first block makes of every view, in chunks and side by side
            with half_precision():
                maps = 2 * views * (2 if torch.is_autocast_enabled("cpu") else 4) * layer / 4
        # Features as they were read and side by side; normalised one by one, which is over before a block is frozen.
        return PROGRAM + views * channels * height * width + 2 * seen + max(seen + steps, maps)

    def _note(
        self,
        stage: str,
        name: str,
        about: tuple[str, str],
        folder: Path | None,
        needed: bool,
        seconds: Callable[[], float],
        size: float,
    ) -> Part:
        known = (stage, name if folder is None else str(folder))
        if known not in self.parts:
            took = seconds()
            self.parts[known] = Part(stage, name, about, folder, needed, took, took, size)
        self.parts[known].needed |= needed
        return self.parts[known]


def _views_of(method: TGR, images: int) -> int:
    """Number of images that all models look at."""
    times = 1 + method.views.copies + method.views.blends
    return times * min(images, method.views.most // times) if method.relational else 0
