"""Each costly unit of the work as straightforward research code has it: what the product is timed and tested against.

Float precision as given (float32 in the benchmark, float64 in tests), NCHW order, Python loops, no cast, no cache, no
trick. Networks have metapool's parameter names, so that both sides run on the same weights; the arithmetic is this
file's own. The units are those of TGR (Wei et al. 2024, arXiv 2405.16560, and its released code), with the product's
mathematics where that departs from the released code (``docs/how-it-works.md`` has each reason):

- an image is shifted by its own offset, borders repeated (released: one crop for the whole batch);
- the Fisher information squares per-image gradients, its expectation over labels exact (released: batch gradients);
- the displaced parameters are constants (released: kept in the graph), the divergence is a true KL;
- adapted networks take batch-norm statistics from the support alone (released: from the queries);
- a replay averages over its episodes (released: sums).
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Params = dict[str, Tensor]


class Conv4(nn.Module):
    """Four blocks of convolution, batch norm, ReLU and pooling, and a linear head (TGR's ``network.py``).

    Args:
        channels: image channels.
        width: channels of a block.
        classes: K.
        size: height and width of an image.
    """

    def __init__(self, channels: int, width: int, classes: int, size: tuple[int, int]) -> None:
        super().__init__()
        inputs = [channels, width, width, width]
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.Conv2d(count, width, 3, padding=1), nn.BatchNorm2d(width)) for count in inputs
        )
        self.head = nn.Linear(width * (size[0] // 16) * (size[1] // 16), classes)
        self.eval()

    def features(self, images: Tensor, first: int | None = None) -> Tensor:
        """Features before the head.

        Args:
            images: float [N, C, H, W], normalised.
            first: batch-norm statistics come from the first ``first`` images; running ones when not given.

        Returns:
            float [N, D].
        """
        for block in self.encoder:
            assert isinstance(block, nn.Sequential)
            convolution, norm = block
            assert isinstance(norm, nn.BatchNorm2d)
            images = F.max_pool2d(F.relu(_normalised(norm, convolution(images), first)), 2)
        return images.flatten(1)

    def forward(self, images: Tensor, first: int | None = None) -> Tensor:
        """Logits.

        Args:
            images: float [N, C, H, W], normalised.
            first: as in :meth:`features`.

        Returns:
            float [N, K].
        """
        out: Tensor = self.head(self.features(images, first))
        return out


def _normalised(norm: nn.BatchNorm2d, images: Tensor, first: int | None) -> Tensor:
    if first is None:
        out: Tensor = norm(images)
        return out
    if first == len(images):
        return F.batch_norm(images, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
    variance, mean = torch.var_mean(images[:first], (0, 2, 3), correction=0, keepdim=True)
    weight, bias = norm.weight.view(1, -1, 1, 1), norm.bias.view(1, -1, 1, 1)
    return (images - mean) / torch.sqrt(variance + norm.eps) * weight + bias


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """What a network is to see.

    Args:
        images: float [N, C, H, W] in [0, 1].
        mean: C numbers.
        std: C numbers.

    Returns:
        float [N, C, H, W].
    """
    centre, scale = (images.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
    return (images - centre) / scale


# Recovery (TGR, section 3.1; released synthesis/task_recovery.py and tools.py).


class Painter(nn.Module):
    """TGR's generator: codes to images in [0, 1], for sides that are multiples of four.

    Args:
        code: length of a code.
        width: channels of the last block ("ngf").
        channels: image channels.
        size: height and width of an image.
    """

    def __init__(self, code: int, width: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.start = (2 * width, size[0] // 4, size[1] // 4)
        self.linear = nn.Linear(code, self.start[0] * self.start[1] * self.start[2])
        self.body = nn.Sequential(
            nn.BatchNorm2d(2 * width),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
            nn.BatchNorm2d(2 * width),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, codes: Tensor) -> Tensor:
        """Images of codes.

        Args:
            codes: float [N, code].

        Returns:
            float [N, C, H, W] in [0, 1].
        """
        images: Tensor = self.body(self.linear(codes).view(-1, *self.start))
        return images.sigmoid()


def shifted(images: Tensor, offsets: Tensor, pixels: int) -> Tensor:
    """Each image moved by its own offset, borders repeated.

    Args:
        images: float [N, C, H, W].
        offsets: int64 [2, N] in [0, 2 pixels]: first row and column that are seen of an image with its border.
        pixels: width of the border.

    Returns:
        float [N, C, H, W].
    """
    height, width = images.shape[-2:]
    padded = F.pad(images, (pixels,) * 4, mode="replicate").unbind(0)
    rows, columns = offsets.tolist()
    return torch.stack([p[:, r : r + height, c : c + width] for p, r, c in zip(padded, rows, columns)])


def inversion_loss(teacher: nn.Module, images: Tensor, labels: Tensor, weight: float = 1.0) -> Tensor:
    r"""Cross-entropy and, over batch norms, :math:`\|\mu - \bar\mu\|_2 + \|\sigma^2 - \bar\sigma^2\|_2`.

    Args:
        teacher: frozen, in eval mode.
        images: float [N, C, H, W], normalised.
        labels: int64 [N].
        weight: of the batch-norm term.

    Returns:
        A scalar.
    """
    distances: list[Tensor] = []

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module.running_var, Tensor)
        assert isinstance(module.running_mean, Tensor)
        variance, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        distances.append(torch.norm(variance - module.running_var) + torch.norm(mean - module.running_mean))

    norms = [module for module in teacher.modules() if isinstance(module, nn.BatchNorm2d)]
    handles = [norm.register_forward_hook(hook) for norm in norms]
    loss = F.cross_entropy(teacher(images), labels)
    for handle in handles:
        handle.remove()
    return loss + weight * torch.stack(distances).sum()


class Recovery:
    """The state of one recovery: a generator and codes under Adam, and the best images so far.

    Args:
        teacher: frozen, in eval mode.
        painter: the generator, in training mode.
        codes: float [N, code].
        labels: int64 [N].
        mean: of the teacher's input, per channel.
        std: of the teacher's input, per channel.
        pixels: largest shift.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        teacher: nn.Module,
        painter: nn.Module,
        codes: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        pixels: int,
        learning_rate: float = 1e-3,
    ) -> None:
        self.teacher, self.painter, self.labels = teacher, painter, labels
        self.mean, self.std, self.pixels = mean, std, pixels
        self.codes = codes.detach().clone().requires_grad_()
        self.optimizer = torch.optim.Adam([*painter.parameters(), self.codes], learning_rate, betas=(0.5, 0.999))
        self.best: Tensor | None = None
        self.lowest = float("inf")

    def gradient(self, generator: torch.Generator) -> tuple[Tensor, float]:
        """Fills the gradients of generator and codes.

        Args:
            generator: of the shifts.

        Returns:
            The images, float [N, C, H, W] in [0, 1], and their loss.
        """
        images = self.painter(self.codes)
        offsets = torch.randint(0, 2 * self.pixels + 1, (2, len(images)), generator=generator)
        seen = normalise(shifted(images, offsets, self.pixels), self.mean, self.std)
        loss = inversion_loss(self.teacher, seen, self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        return images.detach(), loss.item()

    def step(self, generator: torch.Generator) -> None:
        """One step of Adam.

        Args:
            generator: of the shifts.
        """
        images, loss = self.gradient(generator)
        if loss < self.lowest:
            self.lowest, self.best = loss, images.clone()
        self.optimizer.step()


# What the teachers say.


def teacher_outputs(teacher: Conv4, images: Tensor, batch: int = 512) -> tuple[Tensor, Tensor]:
    """Features and logits of many images.

    Args:
        teacher: frozen, in eval mode.
        images: float [N, C, H, W], normalised.
        batch: images of one pass.

    Returns:
        float [N, D] and [N, K].
    """
    features: list[Tensor] = []
    with torch.no_grad():
        for part in images.split(batch):
            features.append(teacher.features(part))
        return torch.cat(features), torch.cat([teacher.head(part) for part in features])


# Task embedding (Task2Vec, Achille et al. 2019).


def fisher(network: nn.Module, params: Params, images: Tensor) -> Params:
    r"""Diagonal Fisher information, :math:`\frac1N \sum_n \sum_k p_k(x_n) (\partial \log p_k(x_n) / \partial w)^2`.

    Args:
        network: in eval mode.
        params: the parameters asked for.
        images: float [N, C, H, W], normalised.

    Returns:
        F ≥ 0 by parameter.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    total = {name: torch.zeros_like(value) for name, value in leaves.items()}
    for image in images:
        log_p = F.log_softmax(torch.func.functional_call(network, leaves, image[None])[0], 0)
        for value in log_p:
            gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True)
            for name, gradient in zip(leaves, gradients):
                total[name] += value.exp().detach() * gradient**2
    return {name: value / len(images) for name, value in total.items()}


def batch_gradient(network: nn.Module, params: Params, images: Tensor, labels: Tensor) -> Params:
    """Gradient of the mean cross-entropy, batch norm by the batch: what one training step of a network costs.

    Args:
        network: a :class:`Conv4`.
        params: leaves that require gradients.
        images: float [N, C, H, W], normalised.
        labels: int64 [N].

    Returns:
        The gradient by parameter.
    """
    return _gradient(F.cross_entropy(_call(network, params, images, len(images)), labels), params)


def _gradient(loss: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    return dict(zip(params, torch.autograd.grad(loss, list(params.values()), create_graph=create_graph)))


def _call(network: nn.Module, params: Params, images: Tensor, first: int) -> Tensor:
    out: Tensor = torch.func.functional_call(network, params, (images,), {"first": first})
    return out


# Meta-training (TGR, section 3.3; MAML, Finn et al. 2017).


def classify_loss(logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy plus KL(teacher ‖ student), per image.

    Args:
        logits: the student's, float [B, K].
        labels: int64 [B].
        teacher: the teacher's, float [B, K].

    Returns:
        A scalar.
    """
    p, q = F.softmax(teacher, 1), F.log_softmax(logits, 1)
    return F.cross_entropy(logits, labels) + (p * (torch.log(p) - q)).sum(1).mean()


def implicit_direction(
    network: nn.Module,
    params: Params,
    tasks: Sequence[tuple[Tensor, Tensor, Tensor]],
    alpha: float,
) -> Params:
    r"""The direction of one TGR step, :math:`\frac1n \sum_i \nabla L_i(\theta - \alpha (\bar g - g_i))`.

    Args:
        network: the meta-model.
        params: leaves that require gradients.
        tasks: images [B, C, H, W] (normalised), labels [B] and the teacher's logits [B, K] of each of n tasks.
        alpha: the displacement.

    Returns:
        The direction by parameter.
    """

    def gradient(values: Params, task: tuple[Tensor, Tensor, Tensor]) -> Params:
        images, labels, teacher = task
        return _gradient(classify_loss(_call(network, values, images, len(images)), labels, teacher), values)

    gradients = [gradient(params, task) for task in tasks]
    mean = _mean(gradients)
    displaced: list[Params] = []
    for task, own in zip(tasks, gradients):
        moved = {n: (v - alpha * (mean[n] - own[n])).detach().requires_grad_() for n, v in params.items()}
        displaced.append(gradient(moved, task))
    return _mean(displaced)


def _mean(gradients: Sequence[Params]) -> Params:
    return {name: sum((g[name] for g in gradients), torch.zeros(())) / len(gradients) for name in gradients[0]}


def adapted_logits(
    network: nn.Module,
    params: Params,
    support: Tensor,
    labels: Tensor,
    query: Tensor,
    steps: int,
    rate: float,
    *,
    second_order: bool,
) -> Tensor:
    """Logits of the queries after gradient steps on the support set.

    Args:
        network: the meta-model.
        params: the initialisation, which requires gradients.
        support: float [S, C, H, W], normalised.
        labels: int64 [S].
        query: float [Q, C, H, W], normalised.
        steps: number of steps.
        rate: their learning rate.
        second_order: keep the graph, for the gradient through the steps.

    Returns:
        float [Q, K].
    """
    for _ in range(steps):
        loss = F.cross_entropy(_call(network, params, support, len(support)), labels)
        gradient = _gradient(loss, params, create_graph=second_order)
        params = {name: value - rate * gradient[name] for name, value in params.items()}
        if not second_order:
            params = {name: value.detach().requires_grad_() for name, value in params.items()}
    with torch.set_grad_enabled(second_order):
        return _call(network, params, torch.cat([support, query]), len(support))[len(support) :]


Episode = tuple[Tensor, Tensor, Tensor, Tensor]
"""Support [S, C, H, W], its labels [S], queries [Q, C, H, W], their labels [Q]."""


def maml_gradient(
    network: nn.Module, params: Params, episodes: Iterable[Episode], steps: int, rate: float
) -> tuple[Params, float]:
    """Second-order gradient of the mean query loss, episode after episode, one backward pass over all of them.

    Args:
        network: the meta-model.
        params: leaves that require gradients.
        episodes: the episodes.
        steps: inner steps.
        rate: their learning rate.

    Returns:
        The gradient by parameter, and the loss.
    """
    losses: list[Tensor] = []
    for support, labels, query, answers in episodes:
        logits = adapted_logits(network, params, support, labels, query, steps, rate, second_order=True)
        losses.append(F.cross_entropy(logits, answers))
    loss = torch.stack(losses).mean()
    return _gradient(loss, params), loss.item()


# Evaluation, one episode.


def protonet_logits(network: Conv4, support: Tensor, labels: Tensor, query: Tensor) -> Tensor:
    """Negative squared distances of directions to class means (Snell et al. 2017), images encoded anew.

    Args:
        network: in eval mode, with running statistics.
        support: float [S, C, H, W], normalised.
        labels: int64 [S] in [0, K).
        query: float [Q, C, H, W], normalised.

    Returns:
        float [Q, K].
    """
    with torch.no_grad():
        features = F.normalize(network.features(support), dim=1)
        wanted = F.normalize(network.features(query), dim=1)
        centroids = torch.stack([features[labels == k].mean(0) for k in range(int(labels.max()) + 1)])
        centroids = F.normalize(centroids, dim=1)
        return -((wanted[:, None] - centroids[None]) ** 2).sum(2)


def maml_logits(
    network: nn.Module, params: Params, support: Tensor, labels: Tensor, query: Tensor, steps: int, rate: float
) -> Tensor:
    """Logits after adapting a copy of the network to the support set.

    Args:
        network: the meta-model.
        params: the initialisation.
        support: float [S, C, H, W], normalised.
        labels: int64 [S] in [0, K).
        query: float [Q, C, H, W], normalised.
        steps: inner steps.
        rate: their learning rate.

    Returns:
        float [Q, K].
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    return adapted_logits(network, leaves, support, labels, query, steps, rate, second_order=False)


def leaves_of(network: nn.Module) -> Params:
    """Copies of a network's parameters that require gradients.

    Args:
        network: any module.

    Returns:
        Leaves by name.
    """
    return {name: value.detach().clone().requires_grad_() for name, value in network.named_parameters()}
