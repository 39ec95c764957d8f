"""Trains a pool from real images, and nothing else: the only maker of models in metapool that sees data.

The pool of the paper: N models, each on its own random task of ``way`` meta-train classes, architectures in turn.
Models that are adapters stand on one transformer, which is trained first, on images of its own, and then never moves.
"""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import get_args

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.bank import fit_bytes
from metapool.base.errors import MetapoolError
from metapool.base.functional import call, half_precision, in_chunks, params_of, running_statistics
from metapool.base.images import InputSpec, LabelledImages, augment, to_float
from metapool.base.networks import TIMM, NetworkSpec, OwnArchitecture, build
from metapool.base.store import Progress, Settings, Store, generator_for
from metapool.base.transformer import is_adapter, own_and_shared
from metapool.episodes import sample_episodes
from metapool.learners import ProtoNet
from metapool.meta_model import MetaModel
from metapool.pool import ModelPool, PretrainedModel
from metapool.training import Training

VERSION = 1


class PoolSettings(Settings):
    """How a pool is trained."""

    models: int = pydantic.Field(default=30, ge=1)
    """Number of models."""
    way: int = pydantic.Field(default=5, ge=2)
    """Classes of each model, drawn without replacement for each model anew."""
    architectures: tuple[str, ...] = pydantic.Field(default=("conv4:32", "resnet10:12", "resnet18:12"), min_length=1)
    """``name:width``, or ``timm:name``, taken in turn."""
    epochs: int = pydantic.Field(default=60, ge=1)
    """Passes over a model's training images."""
    backbone_epochs: int = pydantic.Field(default=60, ge=1)
    """Passes over the backbone's training images, where models are adapters."""
    batch: int = pydantic.Field(default=32, ge=2)
    """Images per step."""
    learning_rate: float = pydantic.Field(default=3e-3, gt=0)
    """Peak of Adam's learning rate; one cycle up and down."""
    weight_decay: float = pydantic.Field(default=5e-4, ge=0)
    """Decoupled weight decay (AdamW)."""
    held_out: float = pydantic.Field(default=0.2, gt=0, lt=1)
    """Share of every class that is kept for measuring accuracy."""
    shift: int = pydantic.Field(default=3, ge=0)
    """Augmentation: largest shift in pixels."""
    zoom: float = pydantic.Field(default=0.2, ge=0)
    """Augmentation: largest relative zoom."""


def build_pool(
    images: LabelledImages,
    settings: PoolSettings,
    store: Store,
    out: Path,
    *,
    name: str,
    seed: int,
    licence: str = "",
    backbone_images: LabelledImages | None = None,
) -> ModelPool:
    """Trains and writes a pool; models already in the store are not trained again.

    Args:
        images: the meta-train classes.
        settings: how.
        store: keeps finished models, so that a broken build goes on.
        out: folder of the pool; must not hold one.
        name: of the pool.
        seed: of everything random.
        licence: of the weights.
        backbone_images: what the backbone of ``vit-lora`` models learns from; none of them need a model know.

    Returns:
        The pool.

    Raises:
        MetapoolError: when there are fewer classes than ``way``, a class has too few images to hold any out, the images
            are too small, there is a pool already, its name is no file name, or an architecture is not known.
    """
    if len(images.classes) < settings.way:
        raise MetapoolError(f"a {settings.way}-way model needs {settings.way} classes; there are {len(images.classes)}")
    counts = torch.bincount(images.labels, minlength=len(images.classes))
    if int(counts.min()) < 5:
        scarce = images.classes[int(counts.argmin())]
        raise MetapoolError(
            f"class {scarce!r} has {int(counts.min())} images; training and holding out need at least 5"
        )
    if (out / "pool.json").exists() or out.is_file():
        raise MetapoolError(f"{out} already holds a pool, or is a file; choose another folder or remove it first")
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,90}", name) is None:
        raise MetapoolError(
            f"pool name {name!r}: model ids begin with it, so it must be letters, digits, '.', '_' and '-' "
            "(a pool has the name of its folder)"
        )
    specs = [named_network(text, images, settings.way) for text in settings.architectures]
    ids = {f"{name}-{index:03d}": specs[index % len(specs)] for index in range(settings.models)}
    kept = settings.model_dump(mode="json", exclude={"models", "architectures", "backbone_epochs"})
    shared = {**kept, "version": VERSION, "seed": seed, "data": images.digest()}
    keys = {id: {**shared, "id": id, "network": spec.model_dump()} for id, spec in ids.items()}
    backbone = _backbone(backbone_images, specs, settings, store, seed, licence)
    for id, spec in ids.items():
        if spec.architecture == "vit-lora":
            assert backbone is not None
            keys[id]["backbone"] = backbone.digest()
    folders = store.units("pretrained", keys, partial(_train_unit, images, settings, ids, seed, licence, backbone))
    pool = ModelPool.create(out, name)
    for id, folder in folders.items():
        pool.add(ModelPool.open(folder).get(id), torch.float16)
    return pool


def named_network(text: str, images: LabelledImages, way: int) -> NetworkSpec:
    """A network of ``way`` classes for these images, by ``name:width``; an error says what of it does not fit."""
    architecture, _, width = (text, "", "1") if text.startswith(TIMM) else text.partition(":")
    channels, height, image_width = images.images.shape[1:]
    known = get_args(OwnArchitecture)
    if (architecture not in known and not text.startswith(TIMM)) or not (width or "32").isdecimal():
        raise MetapoolError(
            f"architecture {text!r}: expected NAME:WIDTH with NAME one of {', '.join(known)}, or timm:NAME"
        )
    try:
        return NetworkSpec.model_validate(
            {
                "architecture": architecture,
                "width": int(width or 32),
                "classes": way,
                "channels": channels,
                "height": height,
                "image_width": image_width,
            }
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = f"{first['loc'][0]} {first['input']}: " if first["loc"] else ""
        raise MetapoolError(f"architecture {text!r}: {where}{first['msg']}") from error


def _backbone(
    images: LabelledImages | None,
    specs: list[NetworkSpec],
    settings: PoolSettings,
    store: Store,
    seed: int,
    licence: str,
) -> ModelPool | None:
    """A pool of one transformer that knows all classes of its images; none where no model is an adapter."""
    adapted = {spec.digest(): spec for spec in specs if spec.architecture == "vit-lora"}
    if not adapted:
        return None
    if len(adapted) > 1:
        raise MetapoolError("the adapters of a pool stand on one backbone, so they have one width")
    if images is None:
        raise MetapoolError("vit-lora models are adapters: give images that their backbone learns from")
    update = {"architecture": "vit", "classes": len(images.classes)}
    spec = next(iter(adapted.values())).model_copy(update=update)
    key = settings.model_dump(mode="json", exclude={"models", "architectures", "way", "epochs", "held_out"})
    key |= {"data": images.digest(), "network": spec.model_dump(), "version": VERSION, "seed": seed}
    train = partial(_train_backbone, images, spec, settings, seed, licence, partial(store.progress, "backbone"))
    return ModelPool.open(store.artifact("backbone", key, train))


def _train_backbone(
    images: LabelledImages,
    spec: NetworkSpec,
    settings: PoolSettings,
    seed: int,
    licence: str,
    progress: Callable[[int, int], None],
    folder: Path,
) -> None:
    """A pool of one transformer, its weights rounded to float16 already, as the pool of its adapters holds them."""
    generator = generator_for(seed, "backbone")
    unscaled = InputSpec(
        channels=spec.channels, height=spec.height, width=spec.image_width,
        mean=(0.0,) * spec.channels, std=(1.0,) * spec.channels,
    )  # fmt: skip
    fitting = LabelledImages(fit_bytes(images.images, unscaled), images.labels, images.classes)
    input = unscaled.model_copy(update=_moments(fitting.images))
    network = build(spec, generator)
    several = settings.model_copy(update={"epochs": settings.backbone_epochs})
    state = fit_classifier(network, fitting, input, several, generator, progress)
    network.load_state_dict({name: value.half().float() for name, value in state.items()})
    model = PretrainedModel("backbone", network, input, images.classes, spec=spec, licence=licence)
    ModelPool.create(folder, "backbone").add(model)


def _train_unit(
    images: LabelledImages,
    settings: PoolSettings,
    specs: dict[str, NetworkSpec],
    seed: int,
    licence: str,
    backbone: ModelPool | None,
    id: str,
    folder: Path,
) -> None:
    under = backbone[0] if backbone is not None and specs[id].architecture == "vit-lora" else None
    model = pretrain(images, specs[id], settings, seed, id, licence, under)
    ModelPool.create(folder, id).add(model, torch.float16)


def pretrain(
    images: LabelledImages,
    spec: NetworkSpec,
    settings: PoolSettings,
    seed: int,
    id: str,
    licence: str = "",
    backbone: PretrainedModel | None = None,
) -> PretrainedModel:
    """One classifier on one random task.

    Args:
        images: all meta-train classes; ``settings.way`` of them are drawn.
        spec: the network.
        settings: how.
        seed: of the pool.
        id: the model's name, which makes its seed.
        licence: of the weights.
        backbone: what adapters stand on; its input is theirs.

    Returns:
        The trained model with its accuracy on the images held out.
    """
    generator = generator_for(seed, "pretrain", id)
    drawn = torch.randperm(len(images.classes), generator=generator)[: settings.way]
    task = images.select(sorted(drawn.tolist()))
    training, held_out = split_within_classes(task, settings.held_out, generator)
    input = InputSpec(channels=spec.channels, height=spec.height, width=spec.image_width, **_moments(training.images))
    network = build(spec, generator)
    if backbone is not None:
        input = backbone.input
        weights = backbone.network.state_dict()
        network.load_state_dict({n: w for n, w in weights.items() if not is_adapter(n)}, strict=False)
    state = fit_classifier(network, training, input, settings, generator)
    network.load_state_dict(state)
    model = PretrainedModel(id, network, input, task.classes, spec=spec, licence=licence)
    # What is stored is float16, so what is measured is float16 too.
    network.load_state_dict({k: v.half().float() if v.is_floating_point() else v for k, v in state.items()})
    predicted = in_chunks(model, to_float(held_out.images)).argmax(1)
    model.accuracy = round(100 * (predicted == held_out.labels).double().mean().item(), 2)
    model.provenance = (
        f"metapool pool build: {spec.architecture} width {spec.width}, {len(training)} images of {settings.way} "
        f"classes, {settings.epochs} epochs, seed {seed}; accuracy on {len(held_out)} held-out images"
    )
    if backbone is not None:
        model.provenance += f"; the backbone, frozen, was trained on {len(backbone.classes)} classes of other images"
    return model


def split_within_classes(
    images: LabelledImages, share: float, generator: torch.Generator
) -> tuple[LabelledImages, LabelledImages]:
    """Holds out a share of every class.

    Args:
        images: all.
        share: of each class to hold out; at least one image, and not all.
        generator: draws which.

    Returns:
        The rest and what is held out.
    """
    order = torch.randperm(len(images), generator=generator)
    held: list[Tensor] = []
    rest: list[Tensor] = []
    for label in range(len(images.classes)):
        members = order[images.labels[order] == label]
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[:count])
        rest.append(members[count:])
    return images.take(torch.cat(rest)), images.take(torch.cat(held))


def fit_classifier(
    network: torch.nn.Module,
    images: LabelledImages,
    input: InputSpec,
    settings: PoolSettings,
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Cross-entropy training with one-cycle AdamW; batch-norm statistics re-estimated at the end.

    Of a network with adapters, only they and the head learn.

    Args:
        network: freshly initialised; not changed.
        images: training images.
        input: their normalisation.
        settings: epochs, batch, learning rate, augmentation.
        generator: order and augmentation.
        progress: called after every epoch.

    Returns:
        The trained state dict.
    """
    params, _ = own_and_shared(params_of(network))
    optimizer = torch.optim.AdamW(list(params.values()), weight_decay=settings.weight_decay)
    batches = len(images) // settings.batch or 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * batches, cycle_momentum=False
    )
    floats = to_float(images.images)
    for epoch in range(settings.epochs):
        order = torch.randperm(len(images), generator=generator)
        for batch in order[: batches * settings.batch].chunk(batches):
            seen = augment(floats[batch], settings.shift, settings.zoom, generator)
            with half_precision():
                logits = call(network, params, input.prepare(seen))
            optimizer.zero_grad()
            F.cross_entropy(logits.float(), images.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        progress(epoch + 1, settings.epochs)
    seen = augment(floats, settings.shift, settings.zoom, generator)
    statistics = running_statistics(network, params, input.prepare(seen))
    return {**network.state_dict(), **{name: value.detach() for name, value in params.items()}, **statistics}


def _moments(images: Tensor) -> dict[str, tuple[float, ...]]:
    floats = to_float(images).transpose(0, 1).flatten(1)
    std, mean = torch.std_mean(floats, 1)
    return {
        "mean": tuple(round(value, 4) for value in mean.tolist()),
        "std": tuple(max(round(value, 4), 1e-3) for value in std.tolist()),
    }


class OracleSettings(Settings):
    """How the upper reference is trained: ProtoNet (Snell et al. 2017) on real images."""

    steps: int = pydantic.Field(default=1500, ge=1)
    """Episodes."""
    width: int = pydantic.Field(default=64, ge=1, le=512)
    """Of the Conv4."""
    way: int = pydantic.Field(default=10, ge=2)
    """Classes of an episode."""
    shot: int = pydantic.Field(default=3, ge=1)
    """Support images of a class."""
    query: int = pydantic.Field(default=5, ge=1)
    """Query images of a class."""
    learning_rate: float = pydantic.Field(default=2e-3, gt=0)
    """Of Adam."""


def train_oracle(images: LabelledImages, settings: OracleSettings, seed: int, out: Path, progress: Progress) -> None:
    """Trains the learner of the main job on the real meta-train images and saves it.

    Args:
        images: the meta-train classes.
        settings: how.
        seed: of everything random.
        out: folder of the model; replaced.
        progress: called at every step.
    """
    channels, height, width = images.images.shape[1:]
    spec = NetworkSpec(
        architecture="conv4", width=settings.width, classes=settings.way, channels=channels, height=height,
        image_width=width,
    )  # fmt: skip
    input = InputSpec(channels=channels, height=height, width=width, **_moments(images.images))
    network = build(spec, generator_for(seed, "oracle", "initialise"))
    training = Training(params_of(network), settings.steps, settings.learning_rate, 0.98)
    learner = ProtoNet()
    floats = to_float(images.images)
    drawn = sample_episodes(images, settings.way, settings.shot, settings.query, settings.steps, seed)
    for step, (support, query) in enumerate(zip(drawn.support, drawn.query)):
        generator = generator_for(seed, "oracle", str(step))
        seen = augment(floats[torch.cat([support.flatten(), query.flatten()])], 2, 0.1, generator)
        support_images, query_images = input.prepare(seen).split([support.numel(), query.numel()])
        with half_precision():
            logits = learner.query_logits(network, training.params, support_images, drawn.support_labels, query_images)
        loss = F.cross_entropy(logits, drawn.query_labels)
        training.descend(
            dict(
                zip(training.params, torch.autograd.grad(loss, list(training.params.values()), materialize_grads=True))
            )
        )
        progress("oracle", step + 1, settings.steps)
    params = training.kept()
    statistics = running_statistics(network, params, input.prepare(floats[:: max(1, len(floats) // 2048)]))
    network.load_state_dict({**params, **statistics})
    out.mkdir(parents=True, exist_ok=True)
    MetaModel(network, spec, learner, input).save(out)
