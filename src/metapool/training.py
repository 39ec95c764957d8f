"""What a meta-training loop carries from step to step; a checkpoint holds all of it."""

from typing import Any, ClassVar, Protocol

import torch

from metapool.base.functional import Params
from metapool.base.images import LabelledImages


class Trained(Protocol):
    """A method, as far as its key goes."""

    version: ClassVar[int]

    def model_dump(self, *, mode: str, exclude: set[str] | None = None) -> dict[str, Any]:
        """Its settings."""


def training_key(
    method: Trained,
    seed: int,
    validation: LabelledImages | None,
    exclude: set[str] | None = None,
    **made_from: object,
) -> dict[str, Any]:
    """What a method's trained model depends on.

    Args:
        method: with all its settings.
        seed: of everything random.
        validation: images of meta-validation classes.
        exclude: settings that play no part in training.
        **made_from: digests of what it is trained on.

    Returns:
        A key of the store.
    """
    return {
        "method": method.model_dump(mode="json", exclude=exclude),
        "validation": validation.digest() if validation else None,
        "seed": seed,
        "version": method.version,
        **made_from,
    }


class Training:
    """Parameters under Adam with a cosine schedule, their running mean, the best candidate, and the record.

    Args:
        params: leaves that require gradients; trained in place.
        steps: length of the schedule.
        learning_rate: at the start; a hundredth of it at the end.
        decay: of the running mean of the weights; 0 keeps none.
    """

    def __init__(self, params: Params, steps: int, learning_rate: float, decay: float) -> None:
        self.params = dict(params)
        self.frozen: Params = {}
        self.average = {name: value.detach().clone() for name, value in params.items()}
        self.optimizer = torch.optim.Adam(list(params.values()), learning_rate)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps, learning_rate / 100)
        self.decay = decay
        self.steps_done = 0
        self.best: float | None = None
        self.best_params: Params = {}
        self.records: list[dict[str, Any]] = []

    def freeze(self, prefix: str) -> None:
        """Ends the training of some parameters, at their running mean; frozen again, they stay what they are.

        Args:
            prefix: of the parameters' names.
        """
        kept = self.kept()
        for name in [name for name in self.params if name.startswith(prefix)]:
            self.frozen[name] = self.params.pop(name)
            self.frozen[name].grad = None  # the optimiser passes over it from now on
            with torch.no_grad():
                self.frozen[name].copy_(kept[name])
            self.average[name] = kept[name]

    def descend(self, direction: Params) -> None:
        """One optimiser step.

        Args:
            direction: what to descend, by parameter.
        """
        for name, value in self.params.items():
            value.grad = direction[name]
        self.optimizer.step()
        self.schedule.step()
        self.steps_done += 1
        # Early on the mean is young: a shorter memory keeps the initial weights out of it.
        decay = min(self.decay, self.steps_done / (self.steps_done + 10))
        for name, value in self.params.items():
            self.average[name].lerp_(value.detach(), 1 - decay)

    def kept(self) -> Params:
        """The weights that would be kept now: the running mean, or the last ones when there is none.

        Returns:
            Detached copies.
        """
        kept = self.average if self.decay else {**self.params, **self.frozen}
        return {name: value.detach().clone() for name, value in kept.items()}

    def keep_if_better(self, accuracy: float | None) -> None:
        """Remembers the present weights when they are the best so far.

        Args:
            accuracy: on validation classes; none when there are no such classes: the latest weights are the best.
        """
        if accuracy is None or self.best is None or accuracy > self.best:
            self.best, self.best_params = accuracy, self.kept()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on.

        Returns:
            Tensors and plain values.
        """
        return {
            "params": {name: value.detach() for name, value in {**self.params, **self.frozen}.items()},
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps_done": self.steps_done,
            "best": self.best,
            "best_params": self.best_params,
            "records": self.records,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` left off; what was frozen then is to be frozen again.

        Args:
            state: what it gave.
        """
        with torch.no_grad():
            for name, value in {**self.params, **self.frozen}.items():
                value.copy_(state["params"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.average = state["average"]
        self.steps_done = state["steps_done"]
        self.best, self.best_params, self.records = state["best"], state["best_params"], state["records"]
