"""Slow, obvious references: the formula as it stands in the paper, one number after another."""

from collections.abc import Mapping
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from metapool.base.functional import Params

# Task embeddings: Fisher information, dissimilarity, CKA.


def fisher_one_at_a_time(network: nn.Module, params: Params, images: Tensor) -> Params:
    """F = 1/N sum_n sum_k p_k(x_n) (d log p_k(x_n) / dw)^2, one image and one class at a time."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    fisher = {name: torch.zeros_like(value) for name, value in params.items()}
    for image in images:
        log_p = torch.func.functional_call(network, leaves, image[None]).log_softmax(1)[0]
        for k in range(len(log_p)):
            gradients = torch.autograd.grad(log_p[k], list(leaves.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(leaves, gradients):
                fisher[name] += log_p[k].exp().detach() * gradient**2 / len(images)
    return fisher


def fisher_by_vmap(network: nn.Module, params: Params, images: Tensor) -> Params:
    """The same by ``vmap(grad)`` over the images, class by class."""

    def log_p(values: Params, image: Tensor, k: Tensor) -> Tensor:
        return torch.func.functional_call(network, values, image[None]).log_softmax(1)[0, k]

    constant = {name: value.detach() for name, value in params.items()}
    with torch.no_grad():
        p = torch.func.functional_call(network, constant, images).softmax(1)
    per_image = torch.func.vmap(torch.func.grad(log_p), (None, 0, None))
    fisher = {name: torch.zeros_like(value) for name, value in constant.items()}
    for k in range(p.shape[1]):
        for name, gradient in per_image(constant, images, torch.tensor(k)).items():
            fisher[name] += torch.einsum("n,n...->...", p[:, k], gradient**2) / len(images)
    return fisher


def squared_batch_gradient(network: nn.Module, params: Params, images: Tensor, labels: Tensor) -> Params:
    """What published code calls a Fisher matrix: the gradient of the mean loss on given labels, squared."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    loss = nn.functional.cross_entropy(torch.func.functional_call(network, leaves, images), labels)
    return {name: g**2 for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())))}


def dissimilarity_by_loops(embeddings: Mapping[str, Params]) -> NDArray[np.float64]:
    """1 - mean over tensors of the cosine of F_i / (F_i + F_j) and F_j / (F_i + F_j), pair by pair, no epsilon."""
    tasks = list(embeddings.values())
    out = np.zeros((len(tasks), len(tasks)))
    for i, one in enumerate(tasks):
        for j, other in enumerate(tasks):
            cosines = []
            for name in one:
                u = (one[name] / (one[name] + other[name])).flatten()
                v = (other[name] / (one[name] + other[name])).flatten()
                cosines.append(float(u @ v / (u.norm() * v.norm())))
            out[i, j] = 1 - sum(cosines) / len(cosines)
    return out


def hsic_of_song(first: Tensor, second: Tensor) -> float:
    """HSIC_1, equation 5 of Song et al. 2012, with linear kernels without their diagonals."""
    n = len(first)
    k = first @ first.T
    l = second @ second.T  # noqa: E741
    k.fill_diagonal_(0)
    l.fill_diagonal_(0)
    one = torch.ones(n, dtype=first.dtype)
    trace = torch.trace(k @ l)
    product = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    cross = 2 / (n - 2) * (one @ k @ l @ one)
    return float((trace + product - cross) / (n * (n - 3)))


def hsic_by_quadruples(first: Tensor, second: Tensor) -> float:
    """HSIC_1 as a U-statistic: mean over quadruples of different images i, j, q, r of k_ij (l_ij + l_qr - 2 l_iq)."""
    k, l = first @ first.T, second @ second.T  # noqa: E741
    terms = [float(k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])) for i, j, q, r in permutations(range(len(first)), 4)]
    return sum(terms) / len(terms)


def cka_of_song(first: Tensor, second: Tensor) -> float:
    """CKA from HSIC_1 (Nguyen et al. 2021)."""
    own = hsic_of_song(first, first) * hsic_of_song(second, second)
    return hsic_of_song(first, second) / own**0.5
