"""The diagonal of the Fisher information of a network, from gradients of single images, without a loop over images."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metapool.base.errors import MetapoolError
from metapool.base.functional import BatchNorm, Params

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


def batch_fisher(network: nn.Module, params: Params, images: Tensor, labels: Tensor, batches: int = 5) -> Params:
    r"""What TGR's released code takes for the Fisher diagonal: :math:`\frac1B \sum_b (\partial_w \bar L_b)^2`.

    :math:`\bar L_b` is the mean cross-entropy of a batch with the given labels (task_similarity.py, lines 18 to 34).
    The square of a mean is not the mean of squares: with many images it goes to zero where the probe is well fitted.

    Args:
        network: images to logits; not changed.
        params: the parameters asked for; the network's own are used for the others.
        images: float [N, C, H, W], normalised as the network wants.
        labels: int64 [N].
        batches: B; image n is in batch n mod B.

    Returns:
        Squares >= 0, same names and shapes as ``params``.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    total = {name: torch.zeros_like(value) for name, value in params.items()}
    for first in range(batches):
        logits = torch.func.functional_call(network, leaves, images[first::batches])
        loss = F.cross_entropy(logits, labels[first::batches])
        gradient = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        for name, value in zip(leaves, gradient):
            total[name] += value.square() / batches
    return total


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
