r"""Task embeddings: how one fixed probe network reacts to each recovered task, and how unlike two tasks are.

The embedding of a task is the diagonal of the Fisher information of the probe on the task's images (Task2Vec, Achille
et al. 2019, arXiv 1902.03545). Two tasks are alike when the same weights matter to both. Unlike the released code of
TGR (Wei et al. 2024), gradients are squared per image *before* they are averaged, labels follow the probe's own
prediction, the probe is in eval mode, and its head is fitted to the task first.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import pydantic
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metapool.bank import TaskBank
from metapool.base.errors import MetapoolError
from metapool.base.functional import BatchNorm, Params, call, in_chunks, params_of, running_statistics
from metapool.base.images import InputSpec, to_float
from metapool.base.networks import Network, NetworkSpec, build
from metapool.base.store import Settings, Store, generator_for

VERSION = 1

TaskEmbeddings = Mapping[str, Params]
# Exact types: a subclass may compute something else (timm's batch norms also activate), and would be silently wrong.
_SUPPORTED = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, BatchNorm)
_Uses = dict[nn.Module, tuple[Tensor, GradientEdge]]  # what a module was multiplied with, and its output


def fisher_diagonal(network: nn.Module, params: Params, images: Tensor, chunk: int = 64) -> Params:
    r"""Diagonal of the Fisher information, :math:`F = E_x E_{y \sim p(y|x)} [(\partial \log p(y|x) / \partial w)^2]`.

    The expectation over y is exact: the gradient for the logits z has covariance :math:`\mathrm{diag}(p) - p p^\top =
    S S^\top` with K - 1 columns s of S, so F is the mean over images of :math:`\sum_s (s^\top \partial z / \partial
    w)^2`: K - 1 backward passes. Memory: unfolded inputs of all layers, ``chunk`` gradients of the largest.

    Args:
        network: images to logits, in eval mode; not changed. The modules that own ``params`` are Conv2d, Linear or
            BatchNorm2d with running statistics, each used once (else: MetapoolError).
        params: the parameters asked for, by name, any subset; the network's own are used for the others.
        images: float [N, C, H, W], normalised as the network wants, of the parameters' dtype.
        chunk: images per pass; changes time and memory, not the result.

    Returns:
        F >= 0, same names, shapes and dtype as ``params``; zero for parameters that the output does not depend on.

    Raises:
        ValueError: the network is in training mode, or there are no images.
    """
    if any(module.training for module in network.modules()) or len(images) == 0:
        raise ValueError("the Fisher information needs a network in eval mode and at least one image")
    owners = _owners(network, params)
    # Constant parameters: autograd then keeps no layer's input for weight gradients, only the way back to the images.
    frozen = {name: value.detach() for name, value in params.items()}
    total = {name: torch.zeros_like(value) for name, value in frozen.items()}
    for part in images.detach().split(chunk):
        uses: _Uses = {}
        hooks = [module.register_forward_hook(partial(_remember, uses, len(part))) for module in owners]
        try:
            with torch.enable_grad():
                logits = torch.func.functional_call(network, frozen, part.clone().requires_grad_())
        finally:
            for hook in hooks:
                hook.remove()
        edges = [edge for _, edge in uses.values()]
        for direction in _square_root(logits.detach()) if uses else ():
            back = torch.autograd.grad(logits, edges, direction, retain_graph=True, allow_unused=True)
            for (module, (inputs, _)), outputs in zip(uses.items(), back):
                for leaf, name in owners[module].items() if outputs is not None else ():
                    total[name] += _sum_of_squares(module, leaf, inputs, outputs).view_as(total[name])
    return {name: value / len(images) for name, value in total.items()}


def _owners(network: nn.Module, params: Params) -> dict[nn.Module, dict[str, str]]:
    """For every module that owns one of ``params``: the parameter's full name by its name within the module."""
    every = dict(network.named_parameters(remove_duplicate=False))
    owners: dict[nn.Module, dict[str, str]] = {}
    for name in params:
        if sum(value is every.get(name) for value in every.values()) != 1:
            raise MetapoolError(f"parameter {name!r} is not in the probe, or in more than one place of it")
        prefix, _, leaf = name.rpartition(".")
        module = network.get_submodule(prefix)
        if type(module) not in _SUPPORTED or getattr(module, "padding_mode", "zeros") != "zeros":
            raise MetapoolError(f"the Fisher diagonal cannot take parameter {name!r} of {module}")
        if isinstance(getattr(module, "padding", 0), str) or getattr(module, "running_mean", 0) is None:
            raise MetapoolError(f"parameter {name!r}: padding must be numbers, batch norm have running statistics")
        owners.setdefault(module, {})[leaf] = name
    return owners


def _remember(uses: _Uses, count: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    """Forward hook: what the module saw, copied before anything changes it in place, and where its output is."""
    if module in uses or len(args[0]) != count:
        raise MetapoolError(f"the Fisher diagonal needs {module} to be used once, with images as the first axis")
    if output.requires_grad:
        # The edge, not the tensor: an in-place activation that follows would move the tensor to its own output.
        uses[module] = _unfolded(module, args[0].detach()), get_gradient_edge(output)


def _unfolded(module: nn.Module, inputs: Tensor) -> Tensor:
    """What gradients are multiplied by: [n, groups, I, T] at T positions; normalised [n, C, T] for batch norm."""
    if isinstance(module, nn.Conv2d):
        assert not isinstance(module.padding, str)
        columns = F.unfold(inputs, module.kernel_size, module.dilation, module.padding, module.stride)
        return columns.view(len(inputs), module.groups, -1, columns.shape[-1])
    if isinstance(module, nn.BatchNorm2d):
        normalised: Tensor = F.batch_norm(inputs, module.running_mean, module.running_var, eps=module.eps)
        return normalised.flatten(2)
    return inputs.reshape(len(inputs), 1, -1, inputs.shape[-1]).mT.clone()


def _sum_of_squares(module: nn.Module, leaf: str, inputs: Tensor, outputs: Tensor) -> Tensor:
    """Per-image gradients of one parameter, squared and summed over images, from gradients of a module's outputs."""
    if isinstance(module, nn.Linear):
        outputs = outputs.reshape(len(outputs), -1, outputs.shape[-1]).mT
    outputs = outputs.flatten(2)  # [n, O, T]
    if leaf == "bias":
        return outputs.sum(2).square().sum(0)
    if isinstance(module, nn.BatchNorm2d):
        return (outputs * inputs).sum(2).square().sum(0)
    outputs = outputs.unflatten(1, (inputs.shape[1], -1))
    if inputs.shape[-1] == 1:  # one position: the square of an outer product is the outer product of the squares
        return torch.einsum("ngot,ngit->goi", outputs.square(), inputs.square())
    return (outputs @ inputs.mT).square_().sum(0)


def _square_root(logits: Tensor) -> Tensor:
    # Columns of S, [K - 1, N, K]: S = diag(q) B with the unit vector q = sqrt(p) and B an orthonormal basis of what is
    # orthogonal to q: all but the last column of the Householder reflection of q to the last axis (up to sign).
    q = (F.log_softmax(logits, 1) / 2).exp()
    axis = q.clone()
    axis[:, -1] += 1  # away from the axis, not towards it: never a difference of near-equal numbers
    reflection = torch.eye(q.shape[1], dtype=q.dtype) - axis[:, :, None] * (axis / axis[:, -1:])[:, None, :]
    return (q[:, :, None] * reflection)[:, :, :-1].permute(2, 0, 1)


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
    probe: Network, spec: InputSpec, images: Tensor, labels: Tensor, per_filter: bool = True, chunk: int = 64
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
    fisher = fisher_diagonal(probe, {**params, "head.weight": weight, "head.bias": bias}, prepared, chunk)
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
    one, two = (_centred_kernel(features.detach().double()) for features in (first, second))
    return float((one * two).sum() / (one.norm() * two.norm()).clamp(min=torch.finfo(one.dtype).tiny))


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
    params = params_of(network)
    optimiser = torch.optim.Adam(params.values(), lr=settings.learning_rate)
    for _ in range(settings.steps):
        drawn = torch.randint(len(images), (settings.batch,), generator=generator)
        loss = F.cross_entropy(call(network, params, spec.prepare(to_float(images[drawn]))), labels[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    # Shuffled, since statistics are averaged over chunks and neighbours come from one model; 2048 images are plenty.
    sample = torch.randperm(len(images), generator=generator)[:2048]
    trained = {name: value.detach() for name, value in params.items()}
    statistics = running_statistics(network, trained, spec.prepare(to_float(images[sample])))
    network.load_state_dict({**trained, **statistics})
    return network.eval()


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
    shared = {"settings": settings.model_dump(), "input": spec.model_dump(), "version": VERSION}
    probe = store.artifact("probe", {**shared, "bank": bank.digest()}, partial(_write_probe, bank, spec, settings))
    keys = {id: {**shared, "probe": probe.name, "task": folder.name} for id, folder in bank.folders.items()}
    folders = store.units("embed", keys, partial(_embed_unit, bank, spec, settings, probe))
    return {id: load_file(folder / "embedding.safetensors") for id, folder in folders.items()}


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
    save_file(task_embedding(network, spec, task.images[kept], task.labels[kept]), folder / "embedding.safetensors")
