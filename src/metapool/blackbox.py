"""A model as a service: images in, answers out, each of them counted; and images recovered out of answers alone."""

from collections.abc import Callable, Iterable

import pydantic
import torch
import torch.nn.functional as F
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.functional import half_precision, in_chunks
from metapool.base.images import InputSpec, shift, to_bytes
from metapool.base.store import Settings
from metapool.pool import PretrainedModel
from metapool.recover import Generator

FLOOR = 1e-8
"""Of a probability whose logarithm is taken: services round."""


class BlackBox:
    """What a stranger sees of a model: what it takes, the names of its classes, and its answers.

    Answers are made in float32: differences of answers to images that are nearly alike would drown in bfloat16.

    Args:
        model: behind the service.
        most: images that may be asked about in all.
        label_only: answer with the most probable class alone, as a one-hot row.
    """

    def __init__(self, model: PretrainedModel, most: int, *, label_only: bool = False) -> None:
        self.most = most
        self.queries = 0
        self.input: InputSpec = model.input
        self.classes = model.classes
        self._name = model.id

        def answer(images: Tensor) -> Tensor:
            probabilities: Tensor = model(images.clamp(0, 1)).softmax(1)
            if not label_only:
                return probabilities
            return F.one_hot(probabilities.argmax(1), len(model.classes)).to(probabilities.dtype)

        self._answer = answer  # a closure: no attribute leads to the model

    def __call__(self, images: Tensor) -> Tensor:
        """Probabilities of the classes; every image is one query.

        Args:
            images: float [N, C', H', W'] in [0, 1]; what lies outside is cut off, as in any picture.

        Returns:
            float [N, K], rows that sum to 1, without a gradient.

        Raises:
            MetapoolError: when the images would exceed the cap; none of them is then answered or counted.
        """
        if self.queries + len(images) > self.most:
            raise MetapoolError(
                f"service {self._name!r}: {len(images)} more images after {self.queries} would exceed its cap of "
                f"{self.most} queries"
            )
        self.queries += len(images)
        return in_chunks(self._answer, images)


def wanted_loss(answers: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image to the label that it is to show.

    Args:
        answers: probabilities, float [N, K].
        labels: int64 [N].

    Returns:
        float [N].
    """
    return -answers.gather(1, labels.unsqueeze(1)).squeeze(1).clamp(min=FLOOR).log()


def estimate_gradient(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    losses: Tensor,
    directions: int,
    radius: float,
    generator: torch.Generator,
) -> Tensor:
    r"""Gradient of every image's loss by forward differences along random directions ("zero order").

    .. math:: \hat g(x) = \frac{d}{q} \sum_{k=1}^q \frac{l(x + \mu u_k) - l(x)}{\mu} u_k, \qquad d = C H W

    with :math:`u_k` uniform on the unit sphere. Its mean is the gradient, up to O(μ);
    its cosine with the gradient is about √(q / d).

    Args:
        loss: of images [N, C, H, W], one number [N] for each.
        images: x, float [N, C, H, W].
        losses: float [N], what ``loss`` says of the images themselves.
        directions: q.
        radius: μ.
        generator: of the directions.

    Returns:
        float [N, C, H, W].
    """
    units = (
        F.normalize(torch.randn(images.shape, generator=generator, dtype=images.dtype).flatten(1), dim=1)
        for _ in range(directions)
    )
    return images[0].numel() / directions * sum_of_slopes(loss, images, losses, units, radius)


def sum_of_slopes(
    loss: Callable[[Tensor], Tensor], images: Tensor, losses: Tensor, units: Iterable[Tensor], radius: float
) -> Tensor:
    r""":math:`\sum_k u_k (l(x + \mu u_k) - l(x)) / \mu`; the gradient itself, up to O(μ), if u is an orthonormal basis.

    Args:
        loss: of images [N, C, H, W], one number [N] for each.
        images: x, float [N, C, H, W].
        losses: float [N], what ``loss`` says of the images themselves.
        units: one direction after the other, float [N, C·H·W], rows of length 1.
        radius: μ.

    Returns:
        float [N, C, H, W].
    """
    total = torch.zeros_like(images)
    for unit in units:
        step = unit.view_as(images)
        slopes = (loss(images + radius * step) - losses) / radius
        total += slopes.view(-1, 1, 1, 1) * step
    return total


class ZeroOrderRecovery(Settings):
    """A generator and its codes are fitted together to what a service answers."""

    per_class: int = pydantic.Field(default=6, ge=1)
    """Images of every class in a set."""
    steps: int = pydantic.Field(default=30, ge=1)
    """Adam steps for a set."""
    learning_rate: float = pydantic.Field(default=2e-2, gt=0)
    """Of generator and codes."""
    directions: int = pydantic.Field(default=10, ge=1)
    """Directions that a gradient is estimated along, q; the paper has 100."""
    radius: float = pydantic.Field(default=0.02, gt=0)
    """Length of the step along them, μ."""
    code: int = pydantic.Field(default=64, ge=1)
    """Length of a code."""
    width: int = pydantic.Field(default=16, ge=1)
    """Channels of the generator's last block."""
    shift: int = pydantic.Field(default=2, ge=0)
    """Largest random shift of the images before a service sees them, in pixels."""

    def painter(self, input: InputSpec, generator: torch.Generator) -> Generator:
        """A generator with fresh weights.

        Args:
            input: of the service.
            generator: of the weights.

        Returns:
            The generator, in training mode.
        """
        painter = Generator(self.code, self.width, input).initialise(generator)
        return painter.to(memory_format=torch.channels_last).train()

    def queries(self, classes: int) -> int:
        """What a set costs.

        Args:
            classes: of the set.

        Returns:
            Images that :meth:`recover` asks about.
        """
        return classes * self.per_class * self.steps * (1 + self.directions)

    def recover(
        self,
        box: BlackBox,
        painter: Generator,
        count: int,
        loss_near: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]],
        generator: torch.Generator,
    ) -> Tensor:
        """Images with a low loss.

        Args:
            box: the service.
            painter: paints them; trained in place.
            count: N, how many.
            loss_near: by images [N, C, H, W] and their answers [N, K], a function that gives the losses [N] of answers
                [N, K] to images nearby.
            generator: source of all randomness.

        Returns:
            uint8 [N, C, H, W]; each image is the one that had the lowest loss in its place.
        """
        codes = torch.randn(count, self.code, generator=generator).requires_grad_()
        optimizer = torch.optim.Adam([*painter.parameters(), codes], self.learning_rate, betas=(0.5, 0.999))
        best, lowest = torch.zeros(count, *box.input.shape), torch.full((count,), torch.inf)
        for _ in range(self.steps):
            with half_precision():
                images = shift(painter(codes), self.shift, generator)
            here = images.detach()
            answers = box(here)
            loss = loss_near(here, answers)
            losses = loss(answers)
            best[losses < lowest], lowest = here[losses < lowest], torch.minimum(losses, lowest)

            def ask(images: Tensor, loss: Callable[[Tensor], Tensor] = loss) -> Tensor:
                return loss(box(images))

            gradient = estimate_gradient(ask, here, losses, self.directions, self.radius, generator)
            optimizer.zero_grad()
            images.backward(gradient)
            optimizer.step()
        return to_bytes(best)
