r"""Task embeddings: how one fixed probe network reacts to each recovered task, and how unlike two tasks are.

The embedding of a task is the diagonal of the Fisher information of the probe on the task's images (Task2Vec, Achille
et al. 2019, arXiv 1902.03545). Two tasks are alike when the same weights matter to both. Unlike the released code of
TGR (Wei et al. 2024), gradients are squared per image *before* they are averaged, labels follow the probe's own
prediction, the probe is in eval mode, and its head is fitted to the task first.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.functional import (
    Params,
    call,
    half_precision,
    in_chunks,
    params_of,
    running_statistics,
    widen,
)
from metapool.base.images import InputSpec, to_float
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import Settings, Store, generator_for
from metapool.embed.fisher import batch_fisher as batch_fisher
from metapool.embed.fisher import fisher_diagonal as fisher_diagonal

VERSION = 2

TaskEmbeddings = Mapping[str, Params]


def refit_head(features: Tensor, labels: Tensor, classes: int, strength: float = 10.0) -> tuple[Tensor, Tensor]:
    r"""A linear head for a task: multinomial logistic regression on fixed features.

    Minimises :math:`\frac{1}{N} \sum_n -\log p(y_n | x_n) + \frac{\lambda}{2} \|W\|^2` over weights of *standardised*
    features; the standardisation is then folded into the head. λ matters: a certain head makes the Fisher information
    that of a few hard images. Of 20 tasks of 5 × 20 icons, the nearest half-task was the other half of the same task in
    25 % of cases with λ = 1/N (scikit-learn's default), in 95 to 100 % with λ >= 10.

    Args:
        features: float [N, D].
        labels: int64 [N] in [0, K), every class present.
        classes: K >= 2.
        strength: λ > 0.

    Returns:
        Weight [K, D] and bias [K] for the features as they are, of their dtype.

    Raises:
        ValueError: fewer than two classes, or a class without images.
    """
    if classes < 2 or labels.unique().tolist() != list(range(classes)):
        raise ValueError(f"the head needs at least two classes with images of each, got {classes} classes")
    values = features.detach().double().numpy()
    scaler = StandardScaler().fit(values)
    # For two classes scikit-learn fits one vector w, the difference of rows ±w/2, whose squared norm is half of w's.
    inverse = (2 if classes == 2 else 1) / (strength * len(values))
    fitted = LogisticRegression(C=inverse, tol=1e-6, max_iter=1000)
    fitted.fit(scaler.transform(values), labels.numpy())
    signs = np.array([[-0.5], [0.5]]) if classes == 2 else np.eye(classes)
    weight = signs @ fitted.coef_ / scaler.scale_
    bias = signs @ fitted.intercept_ - weight @ scaler.mean_
    return torch.from_numpy(weight).to(features.dtype), torch.from_numpy(bias).to(features.dtype)


def task_embedding(
    probe: Network,
    spec: InputSpec,
    images: Tensor,
    labels: Tensor,
    per_filter: bool = True,
    chunk: int = 64,
    *,
    per_sample: bool = True,
) -> Params:
    """The probe's Fisher diagonal on one task, after its head was fitted to that task.

    The head itself is left out of the embedding: heads of tasks with unlike classes cannot be compared entry by entry.

    Args:
        probe: in eval mode, not changed; the same for all tasks that are to be compared.
        spec: what the probe expects of its input.
        images: uint8, or float in [0, 1], [N, C, H, W] of any size and number of channels.
        labels: int64 [N] in [0, K), every class present.
        per_filter: average over each filter (all axes but the first), as Task2Vec does.
        chunk: images per pass.
        per_sample: the Fisher diagonal; else what TGR's released code takes for it, see :func:`batch_fisher`.

    Returns:
        F >= 0 by name of the encoder's parameters: shape [O] per filter, else the parameter's own.

    Raises:
        ValueError: the probe is in training mode.
    """
    if probe.training:
        raise ValueError("the probe must be in eval mode")
    params = {name: value.detach() for name, value in probe.named_parameters()}
    prepared = spec.prepare(to_float(images) if images.dtype == torch.uint8 else images).to(probe.head.weight.dtype)
    features = in_chunks(probe.features, prepared)
    weight, bias = refit_head(features, labels, int(labels.max()) + 1)
    fitted = {**params, "head.weight": weight, "head.bias": bias}
    if per_sample:
        fisher = fisher_diagonal(probe, fitted, prepared, chunk)
    else:
        fisher = batch_fisher(probe, fitted, prepared, labels)
    del fisher["head.weight"], fisher["head.bias"]
    return {
        name: value.flatten(1).mean(1) if per_filter and value.ndim > 1 else value for name, value in fisher.items()
    }


def dissimilarity(embeddings: TaskEmbeddings) -> NDArray[np.float64]:
    r"""How unlike tasks are: :math:`D_{ij} = 1 - \mathrm{mean}_t \cos(\frac{F_i}{F_i + F_j}, \frac{F_j}{F_i + F_j})`.

    Cosine per parameter tensor t (Task2Vec's symmetric distance), mean over tensors (as TGR's released code). To the
    denominator 1e-6 of its own mean is added: small at any scale, unlike a fixed 1e-6. Zeros are like zeros only.

    Args:
        embeddings: Fisher diagonals >= 0 by model id, M >= 1 of them, of equal names and shapes.

    Returns:
        float64 [M, M] in [0, 1], in the order of ``embeddings``: symmetric, exactly zero on the diagonal, unchanged
        when all embeddings are multiplied by one positive number.

    Raises:
        MetapoolError: an embedding is not finite and non-negative.
        ValueError: embeddings differ in names or shapes.
    """
    tasks = list(embeddings.values())
    for id, task in embeddings.items():
        if {name: value.shape for name, value in task.items()} != {n: v.shape for n, v in tasks[0].items()}:
            raise ValueError(f"the embedding of {id!r} has other parameters than the first one")
        if not all(bool((value.isfinite() & (value >= 0)).all()) for value in task.values()):
            raise MetapoolError(f"the task embedding of {id!r} is not finite: look at its recovered images")
    flat = ([task[name].detach().flatten().double().numpy() for task in tasks] for name in tasks[0])
    above = np.triu(1 - np.mean([_cosines_above(np.stack(fishers)) for fishers in flat], axis=0), 1).clip(0, 1)
    return np.asarray(above + above.T, dtype=np.float64)


def _cosines_above(fishers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines of one tensor's [M, P], above the diagonal only, so that their mirror image is equal to the last bit."""
    cosines = np.zeros((len(fishers), len(fishers)))
    for i, one in enumerate(fishers):
        others = fishers[i + 1 :]
        total = one + others
        total += 1e-6 * total.mean(1, keepdims=True)
        with np.errstate(invalid="ignore"):  # 0/0: both tensors are zero, alike; or one is, then the cosine is 0
            first, second = (np.nan_to_num(part / total, nan=0.5) for part in (one, others))
            norms = np.sqrt((first * first).sum(1) * (second * second).sum(1))
            cosines[i, i + 1 :] = np.nan_to_num((first * second).sum(1) / norms)
    return cosines


def cka(first: Tensor, second: Tensor) -> float:
    r"""Linear centred kernel alignment of two sets of features, from unbiased estimates.

    :math:`\mathrm{HSIC}_1(K, L) / \sqrt{\mathrm{HSIC}_1(K, K) \mathrm{HSIC}_1(L, L)}` with :math:`K = X X^\top`,
    :math:`L = Y Y^\top` and the unbiased :math:`\mathrm{HSIC}_1` of Song et al. 2012 (for CKA: Nguyen et al. 2021),
    computed as the cosine of U-centred kernels (Székely and Rizzo 2014), which is the same.

    Args:
        first: X, float [N, D1], N >= 4.
        second: Y, float [N, D2], features of the same N images.

    Returns:
        In [-1, 1]: 1 when a side is an orthogonal map and scaling of the other, near 0 when they are independent, 0
        when a side is constant.

    Raises:
        ValueError: fewer than 4 images, or unequal numbers of them.
    """
    if len(first) != len(second) or len(first) < 4:
        raise ValueError(f"CKA needs features of the same 4 or more images, got {len(first)} and {len(second)}")
    return float(minibatch_cka([first, second], len(first))[0, 1])


def minibatch_cka(features: Sequence[Tensor], batch: int) -> NDArray[np.float64]:
    r""":func:`cka` of all pairs of many sets of features, a batch of images at a time (Nguyen et al. 2021).

    .. math:: \frac{\sum_b \mathrm{HSIC}_1(K_b, L_b)}
        {\sqrt{\sum_b \mathrm{HSIC}_1(K_b, K_b)} \sqrt{\sum_b \mathrm{HSIC}_1(L_b, L_b)}}

    Every term is unbiased, whatever the size of its batch; memory and time grow with N and not with its square.

    Args:
        features: M of them, float [N, D_m], of the same N >= 4 images. Neighbours share a batch, so the images should
            be in random order.
        batch: least number of images of a batch, >= 4; batches are as equal as can be.

    Returns:
        float64 [M, M], symmetric, 1 on the diagonal (0 for constant features); with one batch, what :func:`cka` gives.

    Raises:
        ValueError: fewer than 4 images in all or in a batch, or unequal numbers of them.
    """
    counts = sorted({len(one) for one in features})
    if len(counts) != 1 or counts[0] < 4 or batch < 4:
        raise ValueError(f"CKA needs batches of 4 or more images, the same for all; got {counts} in batches of {batch}")
    total = torch.zeros(len(features), len(features), dtype=torch.float64)
    for rows in torch.arange(counts[0]).tensor_split(max(1, counts[0] // batch)):
        kernels = torch.stack([_centred_kernel(one[rows].detach().double()).flatten() for one in features])
        total += kernels @ kernels.T / (len(rows) * (len(rows) - 3))
    norms = total.diagonal().sqrt()
    return np.asarray(total / torch.outer(norms, norms).clamp(min=torch.finfo(total.dtype).tiny))


def _centred_kernel(features: Tensor) -> Tensor:
    """U-centred linear kernel [N, N]: rows sum to zero without the diagonal, which is zero."""
    centred = features - features.mean(0)  # changes nothing but rounding
    if centred.norm() <= 1e-12 * features.norm():
        centred = torch.zeros_like(centred)  # what is left of constant features is rounding
    kernel = (centred @ centred.T).fill_diagonal_(0)
    rows = kernel.sum(1) / (len(features) - 2)
    return (kernel - rows[:, None] - rows + rows.sum() / (len(features) - 1)).fill_diagonal_(0)


class ProbeSettings(Settings):
    """A small network trained on the bank, as the fixed probe of all task embeddings."""

    width: int = pydantic.Field(default=32, ge=1, le=512)
    """Channels of the probe's four blocks."""
    steps: int = pydantic.Field(default=150, ge=0)
    """Steps of Adam."""
    batch: int = pydantic.Field(default=128, ge=2)
    """Images per step, drawn from all tasks alike."""
    learning_rate: float = pydantic.Field(default=3e-3, gt=0)
    """Learning rate of Adam."""
    images: int = pydantic.Field(default=200, ge=2)
    """Recovered images of a task, at most, that its embedding is taken over."""
    per_sample: bool = True
    """Square the gradients of single images, as Fisher information asks; off: those of whole batches, as TGR's released
    code does."""
    seed: int = 0
    """Of the probe's initial weights and batches."""


def train_probe(
    images: Tensor, labels: Tensor, classes: int, spec: InputSpec, settings: ProbeSettings, generator: torch.Generator
) -> Network:
    """A Conv4 that tells the classes of all recovered tasks apart: a probe that needs no download.

    Args:
        images: uint8 [N, C, H, W] of all tasks, brought to one size before, which need not be that of ``spec``.
        labels: int64 [N] in [0, K), every model's classes distinct.
        classes: K.
        spec: what the probe is to expect of its input, 16 pixels or more a side.
        settings: size and training.
        generator: source of initial weights and batches.

    Returns:
        The probe, in eval mode, with running statistics of the final weights.
    """
    sizes = {"channels": spec.channels, "height": spec.height, "image_width": spec.width}
    network = build(NetworkSpec(architecture="conv4", width=settings.width, classes=classes, **sizes), generator)
    params = params_of(network.to(memory_format=torch.channels_last))
    optimiser = torch.optim.Adam(params.values(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        drawn = torch.randint(len(images), (settings.batch,), generator=generator)
        optimiser.zero_grad()
        probe_loss(network, params, spec.prepare(to_float(images[drawn])), labels[drawn]).backward()
        optimiser.step()
    # Shuffled, since statistics are averaged over chunks and neighbours come from one model; 2048 images are plenty.
    sample = torch.randperm(len(images), generator=generator)[:2048]
    trained = {name: value.detach() for name, value in params.items()}
    statistics = running_statistics(network, trained, spec.prepare(to_float(images[sample])))
    network.load_state_dict({**trained, **statistics})
    return network.eval()


def probe_loss(network: Network, params: Params, images: Tensor, labels: Tensor) -> Tensor:
    """What a probe learns by: cross-entropy, batch-norm statistics from the batch.

    Args:
        network: the probe.
        params: its parameters.
        images: float [N, C, H, W], normalised.
        labels: int64 [N].

    Returns:
        A scalar.
    """
    with half_precision():
        logits = call(network, params, images)
    return F.cross_entropy(widen(logits), labels)


def embed_bank(bank: TaskBank, spec: InputSpec, settings: ProbeSettings, store: Store) -> TaskEmbeddings:
    """Embeds every recovered task by one probe that is trained on the bank.

    Args:
        bank: recovered tasks.
        spec: what the probe is to expect of an image.
        settings: of the probe.
        store: keeps the probe and the embeddings.

    Returns:
        Embeddings by model id, in the order of the bank.
    """
    probe = store.artifact("probe", probe_key(bank, spec, settings), partial(_write_probe, bank, spec, settings))
    keys = embed_keys(bank, spec, settings, probe)
    folders = store.units("embed", keys, partial(_embed_unit, bank, spec, settings, probe))
    return {id: load_file(folder / "embedding.safetensors") for id, folder in folders.items()}


def probe_key(bank: TaskBank, spec: InputSpec, settings: ProbeSettings) -> dict[str, Any]:
    """Key of a bank's probe; the bank need not be recovered yet."""
    return {**_shared_key(spec, settings), "bank": bank.digest()}


def embed_keys(bank: TaskBank, spec: InputSpec, settings: ProbeSettings, probe: Path) -> dict[str, dict[str, Any]]:
    """Keys of the embeddings by model id; neither the bank nor the probe need be there yet."""
    shared = _shared_key(spec, settings)
    return {id: {**shared, "probe": probe.name, "task": folder.name} for id, folder in bank.folders.items()}


def _shared_key(spec: InputSpec, settings: ProbeSettings) -> dict[str, Any]:
    return {"settings": settings.model_dump(), "input": spec.model_dump(), "version": VERSION}


def _write_probe(bank: TaskBank, spec: InputSpec, settings: ProbeSettings, folder: Path) -> None:
    tasks = bank.labelled("distinct", spec)
    generator = generator_for(settings.seed, "probe")
    probe = train_probe(tasks.images, tasks.labels, len(tasks.classes), spec, settings, generator)
    save_file({name: value.contiguous() for name, value in probe.state_dict().items()}, folder / "probe.safetensors")


def _embed_unit(bank: TaskBank, spec: InputSpec, settings: ProbeSettings, probe: Path, id: str, folder: Path) -> None:
    weights = load_file(probe / "probe.safetensors")
    sizes = {"channels": spec.channels, "height": spec.height, "image_width": spec.width}
    classes = len(weights["head.bias"])
    network = build(
        NetworkSpec(architecture="conv4", width=settings.width, classes=classes, **sizes), torch.Generator()
    )
    network.load_state_dict(weights)
    task = bank[id]
    # Evenly spaced, so that every class keeps its share.
    kept = torch.linspace(0, len(task.labels) - 1, min(settings.images, len(task.labels))).round().long()
    embedding = task_embedding(network, spec, task.images[kept], task.labels[kept], per_sample=settings.per_sample)
    save_file(embedding, folder / "embedding.safetensors")
