"""What meta-training shapes, most often a Conv4 with a learner, calibrated on what it was trained on; and its loop."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor

from metapool.base.functional import Params, half_precision, in_chunks, params_of, running_statistics, whitening
from metapool.base.images import InputSpec, LabelledImages, to_float
from metapool.base.networks import NetworkSpec, build
from metapool.base.store import Key, Settings, State, States, Store, generator_for
from metapool.evaluate import few_shot_accuracy
from metapool.learners import AnyLearner, ProtoNet
from metapool.meta_model import MetaModel
from metapool.training import Training

CALIBRATION_IMAGES = 1024


class EpisodicTraining(Settings):
    """What the methods that train share: their episodes, and how long they learn."""

    way: int = pydantic.Field(default=5, ge=2)
    """Classes of a training episode, and outputs of the head."""
    shot: int = pydantic.Field(default=1, ge=1)
    """Support images of a class in a training episode."""
    query: int = pydantic.Field(default=5, ge=1)
    """Query images of a class in a training episode."""
    steps: int = pydantic.Field(default=240, ge=1)
    """Steps of the method."""
    learning_rate: float = pydantic.Field(default=5e-3, gt=0)
    """Of Adam; it falls to a hundredth along half a cosine."""
    average: float = pydantic.Field(default=0.98, ge=0, lt=1)
    """Decay of the running mean of the weights that is kept; 0 keeps the last weights."""
    check_every: int = pydantic.Field(default=30, ge=1)
    """Steps between checkpoints, each a candidate on validation classes."""


class MetaTraining(EpisodicTraining):
    """What the methods that train a Conv4 share besides: its size, and how it answers."""

    learner: AnyLearner = ProtoNet(normalise=True, temperature=0.15)
    """How the meta-model answers an episode."""
    width: int = pydantic.Field(default=64, ge=1, le=512)
    """Of the meta-model, a Conv4."""


class Trainee:
    """Whatever becomes a few-shot model by training its parameters.

    Attributes:
        seed: of the episodes that candidates are compared on.
    """

    seed: int

    def model(self, params: Params, history: Sequence[Mapping[str, Any]] = ()) -> MetaModel:
        """A few-shot model with these parameters.

        Args:
            params: detached parameters.
            history: the training record to keep with it.

        Returns:
            The model; it shares the trainee's network, so the next call changes it.

        Raises:
            NotImplementedError: here; each kind has its own.
        """
        raise NotImplementedError

    def train(
        self,
        training: Training,
        settings: EpisodicTraining,
        take: Callable[[int], dict[str, Any]],
        store: Store,
        key: Key,
        validation: LabelledImages | None,
        folder: Path,
        **also: State,
    ) -> None:
        """The checkpointed loop of a method; its best candidate on validation classes is saved.

        Args:
            training: the parameters.
            settings: how many steps, and how often a candidate is looked at.
            take: one step of the method, by its number; gives the step's record.
            store: keeps the checkpoints.
            key: what the checkpoints depend on.
            validation: images of meta-validation classes; without them the last weights are the best.
            folder: is filled with the trained model.
            **also: what else the next step depends on.
        """
        state = States(training=training, **also)
        for step in store.steps("meta-train", key, state, settings.steps, settings.check_every):
            record = take(step)
            if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
                record["validation"] = self.accuracy(training.kept(), validation)
                training.keep_if_better(record["validation"])
            training.records.append(record)
        self.model(training.best_params, training.records).save(folder)

    def accuracy(self, params: Params, validation: LabelledImages | None, episodes: int = 200) -> float | None:
        """1-shot accuracy on validation classes.

        Args:
            params: detached parameters.
            validation: images of meta-validation classes.
            episodes: number of episodes; the same ones at every call.

        Returns:
            Percent; none without validation classes.
        """
        if validation is None:
            return None
        return few_shot_accuracy(self.model(params), validation, self.seed, episodes)


class Student(Trainee):
    """A Conv4 whose batch-norm statistics, at inference, are those of images like the ones that it was trained on.

    Args:
        width: of the Conv4.
        way: outputs of its head.
        learner: how it answers an episode.
        input: what it expects of an image.
        images: uint8 [N, C, H, W], those of training: statistics and whitening are estimated on some of them.
        seed: of the initial weights and of the calibration images.
        whiten: power of the map that evens out its features (ProtoNet only); 0 leaves them as they are.
    """

    def __init__(
        self,
        width: int,
        way: int,
        learner: AnyLearner,
        input: InputSpec,
        images: Tensor,
        seed: int,
        whiten: float = 0.0,
    ) -> None:
        self.whiten = whiten if isinstance(learner, ProtoNet) else 0.0
        self.spec = NetworkSpec(
            architecture="conv4",
            width=width,
            classes=way,
            channels=input.channels,
            height=input.height,
            image_width=input.width,
        )
        self.learner = learner
        self.input = input
        self.seed = seed
        network = build(self.spec, generator_for(seed, "student", "initialise"))
        # Convolutions of a CPU are 1.6 times faster in this order, and parameters keep it.
        self.network = network.to(memory_format=torch.channels_last)
        self._start = params_of(self.network)  # the network's own change with every model that is made of it
        self.calibrate_on(images)

    def calibrate_on(self, images: Tensor) -> None:
        """Takes other images to estimate batch-norm statistics and whitening on, where training makes them as it goes.

        Args:
            images: uint8 [N, C, H, W], those of training; some of them are used.
        """
        drawn = torch.randperm(len(images), generator=generator_for(self.seed, "student", "calibrate"))
        self.calibration = self.input.prepare(to_float(images[drawn[:CALIBRATION_IMAGES]]))

    def initial(self) -> Params:
        """The initial parameters.

        Returns:
            Leaves that require gradients.
        """
        return {name: value.detach().clone().requires_grad_() for name, value in self._start.items()}

    def maps(self, params: Params, images: Tensor, blocks: int) -> Tensor:
        """What the first blocks of the network make of images, at inference.

        Args:
            params: detached parameters.
            images: uint8 [N, C, H, W].
            blocks: how many.

        Returns:
            float [N, width, H', W'], channels last: bfloat16 where the processor multiplies it natively.
        """
        self._calibrate(params)
        first = self.network.encoder[:blocks]

        def look(part: Tensor) -> Tensor:
            with half_precision():
                out: Tensor = first(self.input.prepare(to_float(part)))
            return out.permute(0, 2, 3, 1)

        return in_chunks(look, images, 128).permute(0, 3, 1, 2)

    def model(self, params: Params, history: Sequence[Mapping[str, Any]] = ()) -> MetaModel:
        """A few-shot model with these parameters.

        Args:
            params: detached parameters.
            history: the training record to keep with it.

        Returns:
            The model; it shares the student's network, so the next call changes it.
        """
        self._calibrate(params)
        model = MetaModel(self.network, self.spec, self.learner, self.input, history)
        if self.whiten:
            features = in_chunks(self.network.features, self.calibration)
            model.projection = whitening(features, self.whiten)
        return model

    def _calibrate(self, params: Params) -> None:
        """Loads parameters into the network, with the batch-norm statistics that belong to them."""
        self.network.load_state_dict({**params, **running_statistics(self.network, params, self.calibration)})
