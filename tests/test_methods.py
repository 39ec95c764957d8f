"""Every method: settings, seeds, a fit in a second, saving, loading, answering; what each has of its own."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import torch
import toys
import yaml
from torch import Tensor

from metapool.base.errors import MetapoolError
from metapool.base.images import LabelledImages, to_float
from metapool.base.store import Store
from metapool.embed import ProbeSettings
from metapool.ensemble import Ensemble
from metapool.episodes import Episodes, sample_episodes
from metapool.evaluate import evaluate, paired_difference
from metapool.gradients import task_gradients
from metapool.interface.recipe import Recipe
from metapool.learners import ANIL, MAML, FewShotModel, ProtoNet
from metapool.meta_model import MetaModel
from metapool.methods import METHODS, NAMED, AnyMethod, load_model
from metapool.methods.baselines import BestSingle, EnsembleAll, MeanSingle
from metapool.methods.bidf_mkd import BiDfMKD
from metapool.methods.tgr import TGR
from metapool.methods.tgr.tasks import Tasks
from metapool.pool import ModelPool
from metapool.recover import PixelRecovery, recover_pool
from metapool.student import Student
from metapool.views import view_bank

ADAPTER: pydantic.TypeAdapter[AnyMethod] = pydantic.TypeAdapter(AnyMethod)
RIVALS = [name for name, method in NAMED.items() if name != "tgr" and "adapters" not in method.needs]
BRIEF = {**toys.SMALL_TGR, "groups": 2, "steps": 4, "batch": 16, "check_every": 2}


def small(method: AnyMethod, **more: Any) -> AnyMethod:
    """The same method, with everything that costs time made small."""
    if isinstance(method, TGR):
        changes = {**BRIEF, **more}
        if isinstance(method.learner, MAML | ANIL):
            changes["learner"] = method.learner.model_copy(update={"inner_steps": 2, "test_steps": 3})
        return method.model_copy(update=changes)
    return method.model_copy(update=toys.SMALL[type(method)])


def everything(recovery: Any, **more: Any) -> dict[str, AnyMethod]:
    """All methods that a recipe can name, ``ensemble-K`` and ``input-control`` too, in small."""
    method = small(TGR(recovery=recovery), **more)
    recipe = Recipe(method=method, compare=(*RIVALS, "ensemble-2", "input-control"))
    return {name: small(method, **more) for name, method in recipe.methods().items()}


ALL = everything(toys.HASTY)
EACH = pytest.mark.parametrize("name", ALL)


@pytest.fixture(scope="module")
def kept(tiny_pool: ModelPool, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store in which all methods were fitted once, seed 0."""
    store = Store(tmp_path_factory.mktemp("methods"), threads=1)
    for name, method in ALL.items():
        folder = store.root / "saved" / name
        folder.mkdir(parents=True)
        method.fit(tiny_pool, store, 0).save(folder)
    return store


def forgetful(kept: Store, path: Path) -> Store:
    """A copy that has the bank, embeddings and views, but no trained model."""
    ignored = shutil.ignore_patterns("meta-model", "checkpoints", "saved", "*.lock")
    shutil.copytree(kept.root, path / "copy", ignore=ignored)
    return Store(path / "copy", threads=1)


def weights(folder: Path) -> dict[str, bytes]:
    found = {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*.safetensors"))}
    assert found
    return found


def answers(model: FewShotModel, shots: list[int] | None = None) -> Tensor:
    shots = shots or [1, 2, 1]
    images = to_float(toys.stripes(range(len(shots)), 6, seed=3).images)
    labels = torch.arange(len(shots)).repeat_interleave(torch.tensor(shots))
    rows = torch.cat([torch.arange(6 * k, 6 * k + shot) for k, shot in enumerate(shots)])
    return model.classify(model.encode(images[rows]), labels, model.encode(images[3::6]))


def of_bytes(model: FewShotModel, folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True)
    model.save(folder)
    return weights(folder)


# Settings -------------------------------------------------------------------------------------------------------------


def test_a_method_s_name_is_its_key() -> None:
    assert {name: kind().name for name, kind in METHODS.items()} == {name: name for name in METHODS}
    assert METHODS["bidf-mkd"] is BiDfMKD
    assert METHODS["best-single"] is BestSingle
    assert set(METHODS) < set(NAMED)
    assert {"tgr-maml", "tgr-protonet"} <= set(NAMED)
    assert (NAMED["tgr-maml"].task_loss, NAMED["tgr-maml"].learner.name) == ("classify", "maml")
    assert (NAMED["tgr-protonet"].task_loss, NAMED["tgr-protonet"].learner.name) == ("classify", "protonet")


@pytest.mark.parametrize("name", [*NAMED, *ALL])
def test_settings_go_through_yaml_and_back(name: str) -> None:
    method = {**ALL, **NAMED}[name]
    text = yaml.safe_dump(method.model_dump(mode="json"))
    again = ADAPTER.validate_python(yaml.safe_load(text))
    assert again == method
    assert type(again) is type(method)
    assert again.digest() == method.digest()
    has_bank = "recovery" in type(method).model_fields
    other = method.model_copy(
        update={"recovery": PixelRecovery(per_class=7)} if has_bank else {"learner": ProtoNet(temperature=0.3)}
    )
    assert other.digest() != method.digest()
    assert ADAPTER.validate_python(yaml.safe_load(yaml.safe_dump(other.model_dump(mode="json")))) == other


@pytest.mark.parametrize("bad", [{"name": "maml"}, {"name": "tgr", "stepz": 1}, {"name": "ensemble", "size": 0}, {}])
def test_settings_are_closed(bad: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        ADAPTER.validate_python(bad)


@EACH
def test_settings_are_frozen(name: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        ALL[name].name = "another"


def test_a_method_cites_its_paper() -> None:
    about = sys.modules[TGR.__module__].__doc__
    assert about is not None
    for words in ("Task Groupings Regularization", "ICML 2024", "arXiv 2405.16560", "Deviations", "Cost of a step"):
        assert words in about
    assert "arXiv 2101.00562" in (sys.modules[Ensemble.__module__].__doc__ or "")
    for kind in METHODS.values():
        assert kind.__doc__
        assert kind.fit.__doc__
        fields = kind.model_fields.values()
        assert all(field.description for field in fields), "a sentence for every setting"


# Every method ---------------------------------------------------------------------------------------------------------


@EACH
def test_same_seed_same_bits_other_seed_other_bits(
    name: str, tiny_pool: ModelPool, kept: Store, tmp_path: Path
) -> None:
    method = ALL[name]
    if isinstance(method, EnsembleAll | BestSingle | MeanSingle):
        method = method.model_copy(update={"standardise": True})  # by moments of images drawn at random
    first = of_bytes(method.fit(tiny_pool, kept, 0), tmp_path / "first")
    torch.manual_seed(1234)  # the global seed decides nothing
    store = forgetful(kept, tmp_path)
    assert of_bytes(method.fit(tiny_pool, store, 0), tmp_path / "again") == first
    assert of_bytes(method.fit(tiny_pool, store, 1), tmp_path / "other") != first


@pytest.mark.parametrize("name", ["ensemble", "mean-single"])
def test_nothing_is_random_about_an_ensemble_that_is_not_standardised(
    name: str, tiny_pool: ModelPool, kept: Store, tmp_path: Path
) -> None:
    other = ALL[name].fit(tiny_pool, kept, 1)
    assert of_bytes(other, tmp_path / "other") == weights(kept.root / "saved" / name)
    assert isinstance(other, Ensemble)
    assert all(mean.eq(0).all() and std.eq(1).all() for mean, std in other.moments)


@pytest.mark.parametrize(
    ("method", "asks"),
    [(EnsembleAll(), False), (MeanSingle(), False), (EnsembleAll(standardise=True), True), (EnsembleAll(size=1), True)],
)
def test_an_ensemble_pays_for_recovery_only_when_it_asks_for_images(
    method: AnyMethod, asks: bool, tiny_pool: ModelPool, store: Store
) -> None:
    method = method.model_copy(update={"recovery": toys.HASTY})
    method.fit(tiny_pool, store, 0)
    assert (store.root / "recover").exists() == asks


@EACH
def test_a_saved_model_answers_alike(name: str, tiny_pool: ModelPool, kept: Store) -> None:
    fitted = ALL[name].fit(tiny_pool, kept, 0)
    loaded = load_model(kept.root / "saved" / name)
    assert type(loaded) is type(fitted)
    torch.testing.assert_close(answers(loaded), answers(fitted), rtol=0, atol=0)
    assert loaded.input == fitted.input
    assert loaded.input in {tiny_pool.input, *(model.input for model in tiny_pool.manifest.models)}
    assert loaded.parameter_count == fitted.parameter_count > 0
    assert loaded.models_at_inference == fitted.models_at_inference


@EACH
@pytest.mark.parametrize("shots", [[1, 1], [3, 1], [1, 4, 2], [2, 1, 1, 2, 1, 1, 2]], ids=str)
def test_any_number_of_classes_with_uneven_shots(name: str, shots: list[int], kept: Store) -> None:
    logits = answers(load_model(kept.root / "saved" / name), shots)
    assert tuple(logits.shape[-2:]) == (len(shots), len(shots))
    assert tuple(logits.shape[:-2]) == ((4,) if name == "mean-single" else ())
    assert logits.isfinite().all()


@EACH
def test_images_of_another_size_and_colour_are_converted(name: str, kept: Store) -> None:
    model = load_model(kept.root / "saved" / name)
    images = torch.rand(6, 3, 40, 24, generator=torch.Generator().manual_seed(0))
    logits = model.classify(model.encode(images[:4]), torch.tensor([0, 1, 0, 1]), model.encode(images[4:]))
    assert tuple(logits.shape[-2:]) == (2, 2)


@EACH
def test_fitting_again_makes_nothing_new(name: str, tiny_pool: ModelPool, kept: Store) -> None:
    before = set(kept.root.rglob("made.json"))
    ALL[name].fit(tiny_pool, kept, 0)
    assert set(kept.root.rglob("made.json")) == before


def test_cost_of_an_answer(tiny_pool: ModelPool, kept: Store) -> None:
    models = {name: load_model(kept.root / "saved" / name) for name in ALL}
    networks = {name: model.models_at_inference for name, model in models.items()}
    assert {name for name, count in networks.items() if count > 1} == {"ensemble", "ensemble-2", "ensemble-whitened"}
    assert (networks["ensemble"], networks["ensemble-2"], networks["ensemble-whitened"]) == (4, 2, 4)
    sizes = {model.id: model.parameter_count for model in tiny_pool}
    assert models["ensemble"].parameter_count == sum(sizes.values())
    assert models["mean-single"].parameter_count == sum(sizes.values()) // 4
    assert models["best-single"].parameter_count in sizes.values()


# A toy world that can be solved ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stripes(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModelPool, Store]:
    folder = tmp_path_factory.mktemp("stripes")
    return toys.striped_pool(folder / "pool"), Store(folder / "store", threads=1)


@pytest.fixture(scope="module")
def new_classes() -> tuple[LabelledImages, Episodes]:
    images = toys.stripes(toys.NEW_KINDS, 20, seed=5)
    return images, sample_episodes(images, 4, 5, 5, 60, seed=0)


PAPERS = {**toys.SMALL_TGR, "recovery": toys.RECOVERY, "task_loss": "classify", "replay": "episodes", "steps": 10}
ADAPTING = {"inner_steps": 2, "test_steps": 10, "inner_rate": 0.5}
SOLVED = everything(toys.RECOVERY, **toys.SMALL_TGR) | {
    "tgr-maml": TGR(**PAPERS, learner=MAML(**ADAPTING, first_order=True)),
    "tgr-anil": TGR(**PAPERS, learner=ANIL(**ADAPTING)),
    "tgr-released": TGR(
        **{**PAPERS, "probe": ProbeSettings(width=4, steps=5, batch=16, per_sample=False)},
        variant="released",
        learner=MAML(**ADAPTING, transductive=True),
    ),
}


@pytest.mark.parametrize("name", SOLVED)
def test_beats_chance_on_new_classes(
    name: str, stripes: tuple[ModelPool, Store], new_classes: tuple[LabelledImages, Episodes]
) -> None:
    images, episodes = new_classes
    model = SOLVED[name].fit(*stripes, seed=0)
    accuracy = evaluate(model, images, episodes).interval
    assert accuracy.low > 25 + 10
    wrong = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    shuffled = LabelledImages(images.images[wrong], images.labels, images.classes)
    assert 15 < evaluate(model, shuffled, episodes).interval.mean < 35, "labels that mean nothing leave chance"


def test_recovery_earns_its_place(
    stripes: tuple[ModelPool, Store], new_classes: tuple[LabelledImages, Episodes]
) -> None:
    """Over seeds, since one seed moves accuracy by ten points here; and not too small, or the seed decides alone.

    Against ``untrained`` nothing is asserted: random filters tell stripes apart as well as trained ones.
    """
    recovered = toys.RECOVERY.model_copy(update={"steps": 60})
    larger = {"width": 32, "steps": 60}
    tgr = SOLVED["tgr"].model_copy(update={**larger, "recovery": recovered})
    control = SOLVED["input-control"].model_copy(update=larger)
    assert control.recovery.steps == 0
    means = [
        sum(evaluate(method.fit(*stripes, seed=seed), *new_classes).interval.mean for seed in range(3)) / 3
        for method in (tgr, control)
    ]
    assert means[0] > means[1] + 3


def test_features_of_all_models_beat_those_of_one(
    stripes: tuple[ModelPool, Store], new_classes: tuple[LabelledImages, Episodes]
) -> None:
    together, alone = (evaluate(SOLVED[n].fit(*stripes, seed=0), *new_classes) for n in ("ensemble", "mean-single"))
    assert paired_difference(together, alone).low > 5


# TGR ------------------------------------------------------------------------------------------------------------------

LEARNERS = {
    "protonet": ProtoNet(normalise=True),
    "maml": MAML(inner_steps=1, test_steps=1),
    "anil": ANIL(inner_steps=1, test_steps=1),
}
LOSSES = ("relational", "classify", "episodic")


def brief(**changes: Any) -> TGR:
    return TGR(**{"recovery": toys.HASTY, **BRIEF, "steps": 2, **changes})


@pytest.mark.parametrize("replay", ["none", "episodes", "relational"])
@pytest.mark.parametrize("learner", LEARNERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_task_loss_with_every_learner(
    loss: Any, learner: str, replay: Any, tiny_pool: ModelPool, kept: Store
) -> None:
    """On a pool whose models differ in number of classes (2 to 4), size (16, 32) and channels (1, 3)."""
    model = brief(task_loss=loss, learner=LEARNERS[learner], replay=replay, replay_tasks=2).fit(tiny_pool, kept, 0)
    assert model.learner == LEARNERS[learner]
    assert [record["step"] for record in model.history] == [0, 1]
    for record in model.history:
        assert {"method", "step", "group", "loss", "discrepancy", "cosine"} <= set(record)
        assert ("replay" in record) == (replay != "none")
        numbers = [value for key, value in record.items() if key in ("loss", "discrepancy", "cosine", "replay")]
        assert torch.tensor(numbers).isfinite().all()
        assert record["discrepancy"] > 0
        assert -1 <= record["cosine"] <= 1
    assert answers(model).isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_regularization_and_replay_change_the_step(loss: Any, tiny_pool: ModelPool, kept: Store) -> None:
    found = [
        brief(task_loss=loss, alpha=alpha, replay=replay).fit(tiny_pool, kept, 0).network.state_dict()
        for alpha, replay in ((0.0, "none"), (0.1, "none"), (0.0, "episodes"), (0.0, "relational"))
    ]
    assert len({state["encoder.0.0.weight"].numpy().tobytes() for state in found}) == 4


def test_the_first_step_descends_the_mean_gradient_when_alpha_is_zero(tiny_pool: ModelPool, kept: Store) -> None:
    """Adam's first step is the learning rate times the sign; both alphas see the same losses at θ."""
    still, moved = (brief(alpha=alpha, steps=1).fit(tiny_pool, kept, 0).history[0] for alpha in (0.0, 0.1))
    assert (still["loss"], still["discrepancy"]) == (moved["loss"], moved["discrepancy"])


def test_all_losses_at_once_are_the_losses_one_by_one(tiny_pool: ModelPool, kept: Store) -> None:
    method = brief(teachers=3, groups=1)
    bank = recover_pool(tiny_pool, toys.HASTY, kept)
    input = tiny_pool.input
    views = view_bank(tiny_pool, bank, [tiny_pool.ids], input, method.views, kept)[0]
    student = Student(8, 3, method.learner, input, bank.labelled("distinct", input).images, 0)
    tasks = Tasks(method, student, bank, [tiny_pool.ids], views)
    batches, task_loss = tasks.draw(0, torch.Generator().manual_seed(0))
    assert tasks.together is not None
    params = student.initial()
    alone, losses = task_gradients(task_loss, params, batches)
    together, same = task_gradients(task_loss, params, batches, tasks.together)
    assert same == pytest.approx(losses)
    assert len(set(losses)) == 3
    for one, other in zip(alone, together):
        torch.testing.assert_close(other, one, rtol=2e-2, atol=1e-4)


def test_teachers_judge_images_of_their_group_and_replay_those_of_all(
    tiny_pool: ModelPool, kept: Store, tmp_path: Path
) -> None:
    bank = recover_pool(tiny_pool, toys.HASTY, kept)
    input = tiny_pool.input
    method = brief(batch=64, replay_batch=400)
    views = view_bank(tiny_pool, bank, [tiny_pool.ids], input, method.views, kept)[0]
    groups = [tiny_pool.ids[:1], tiny_pool.ids[1:]]
    tasks = Tasks(
        method, Student(8, 3, method.learner, input, bank.labelled("distinct", input).images, 0), bank, groups, views
    )
    owners = {image.numpy().tobytes(): int(owner) for image, owner in zip(views.images, views.owner)}

    def drawn_from(images: Tensor) -> set[int]:
        grey = images * torch.tensor(input.std).view(-1, 1, 1) + torch.tensor(input.mean).view(-1, 1, 1)
        return {owners[image.numpy().tobytes()] for image in (255 * grey).round().to(torch.uint8)}

    for group, members in ((0, {0}), (1, {1, 2, 3})):
        (images, cosines), _ = tasks.draw(group, torch.Generator().manual_seed(0))
        assert drawn_from(images[0]) == members
        assert tuple(cosines.shape) == (min(2, len(members)), 64, 64)
    images, cosines = tasks._replay_images(torch.Generator().manual_seed(0))
    assert drawn_from(images[0]) == {-1, 0, 1, 2, 3}, "blends too"
    torch.testing.assert_close(cosines[0], cosines[0].clamp(-1, 1 + method.names), rtol=0, atol=1e-2)


def test_one_name_in_two_models_brings_their_images_nearer(tiny_pool: ModelPool, kept: Store) -> None:
    bank = recover_pool(tiny_pool, toys.HASTY, kept)
    input = tiny_pool.input
    method = brief(replay_batch=200)
    views = view_bank(tiny_pool, bank, [tiny_pool.ids], input, method.views, kept)[0]
    ids = list(views.features)
    names = {
        image.numpy().tobytes(): bank[ids[int(owner)]].classes[int(label)] if label >= 0 else None
        for image, owner, label in zip(views.images, views.owner, views.labels)
    }
    student = Student(8, 3, method.learner, input, views.images, 0)

    def replayed(bonus: float) -> tuple[Tensor, Tensor]:
        settings = method.model_copy(update={"names": bonus})
        tasks = Tasks(settings, student, bank, [tiny_pool.ids], views)
        images, cosines = tasks._replay_images(torch.Generator().manual_seed(0))
        return images[0], cosines[0]

    images, plain = replayed(0.0)
    grey = images * torch.tensor(input.std).view(-1, 1, 1) + torch.tensor(input.mean).view(-1, 1, 1)
    drawn = [names[image.numpy().tobytes()] for image in (255 * grey).round().to(torch.uint8)]
    alike = torch.tensor([[a is not None and a == b for b in drawn] for a in drawn])
    owners = {name: {id for id in ids if name in bank[id].classes} for name in drawn if name}
    assert any(len(models) > 1 for models in owners.values()), "some name stands in two models"
    torch.testing.assert_close(replayed(0.25)[1] - plain, 0.25 * alike.float(), rtol=1e-4, atol=1e-4)


def test_groups_partition_the_pool_and_steps_draw_from_one(tiny_pool: ModelPool, kept: Store) -> None:
    method = brief(steps=8, task_loss="classify", grouping="random")
    groups = method.grouped(tiny_pool, recover_pool(tiny_pool, toys.HASTY, kept), kept, 0)
    assert sorted(id for group in groups for id in group) == sorted(tiny_pool.ids)
    assert all(len(group) == 2 for group in groups)
    drawn = {record["group"] for record in method.fit(tiny_pool, kept, 0).history}
    assert drawn == {0, 1}


def test_more_teachers_and_classes_than_there_are(tiny_pool: ModelPool, kept: Store) -> None:
    for loss in LOSSES:
        model = brief(teachers=40, groups=7, way=6, task_loss=loss, replay="episodes").fit(tiny_pool[:2], kept, 0)
        assert model.spec.classes == 6
        assert answers(model, [1] * 7).isfinite().all()


def test_a_pool_of_one_model(tiny_pool: ModelPool, kept: Store) -> None:
    model = brief(task_loss="relational").fit(tiny_pool[2:3], kept, 0)
    assert model.history[0]["cosine"] == 1.0
    assert model.history[0]["discrepancy"] == 0.0
    assert model.input.shape == (3, 32, 32)


def test_validation_chooses_and_is_recorded(tiny_pool: ModelPool, kept: Store, toy_images: LabelledImages) -> None:
    method = brief(steps=5, check_every=2, average=0.0)
    model = method.fit(tiny_pool, kept, 0, toy_images)
    checked = {record["step"]: record["validation"] for record in model.history if "validation" in record}
    assert list(checked) == [1, 3, 4]
    episodes = sample_episodes(toy_images, 5, 1, 5, 200, 0)
    assert evaluate(model, toy_images, episodes).interval.mean == max(checked.values())
    without = method.fit(tiny_pool, kept, 0)
    assert [record["validation"] for record in without.history if "validation" in record] == [None, None, None]


def test_interrupted_between_checkpoints_it_ends_with_the_same_bits(
    tiny_pool: ModelPool, kept: Store, tmp_path: Path, toy_images: LabelledImages
) -> None:
    method = brief(steps=7, check_every=2, task_loss="classify", replay="episodes")
    unbroken = method.fit(tiny_pool, kept, 0, toy_images)
    store = forgetful(kept, tmp_path)
    steps: list[int] = []

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "meta-train":
            steps.append(done)
            if done == 5 and len(steps) == 5:
                raise KeyboardInterrupt

    store.progress = stop
    with pytest.raises(KeyboardInterrupt):
        method.fit(tiny_pool, store, 0, toy_images)
    resumed = method.fit(tiny_pool, store, 0, toy_images)
    assert steps == [1, 2, 3, 4, 5, 5, 6, 7], "the step after the last checkpoint is taken again, no earlier one"
    assert of_bytes(resumed, tmp_path / "resumed") == of_bytes(unbroken, tmp_path / "unbroken")
    assert resumed.history == unbroken.history


def test_frozen_blocks_stop_where_they_are_and_resume_bit_for_bit(
    tiny_pool: ModelPool, kept: Store, tmp_path: Path
) -> None:
    method = brief(steps=8, check_every=3, freeze=(0.25, 0.5), average=0.0)
    unbroken = method.fit(tiny_pool, kept, 0)
    store = forgetful(kept, tmp_path)

    def stop(kind: str, done: int, total: int) -> None:
        if kind == "meta-train" and done in (4, 7) and done not in stopped:
            stopped.append(done)
            raise KeyboardInterrupt

    stopped: list[int] = []
    store.progress = stop
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            method.fit(tiny_pool, store, 0)
    resumed = method.fit(tiny_pool, store, 0)
    assert of_bytes(resumed, tmp_path / "resumed") == of_bytes(unbroken, tmp_path / "unbroken")

    def weights(**changes: Any) -> dict[str, torch.Tensor]:
        found = method.model_copy(update=changes).fit(tiny_pool, kept, 0).network.state_dict()
        return {name: value for name, value in found.items() if name.endswith("0.weight")}

    free = weights(freeze=())
    late = weights(freeze=(0.25, 0.9))  # steps 7.2 and on: the last alone
    state = unbroken.network.state_dict()
    torch.testing.assert_close(late["encoder.0.0.weight"], state["encoder.0.0.weight"], rtol=0, atol=0)
    assert not torch.equal(free["encoder.0.0.weight"], state["encoder.0.0.weight"])
    assert not torch.equal(late["encoder.1.0.weight"], state["encoder.1.0.weight"])
    other = {"replay": "episodes", "freeze": ()}
    torch.testing.assert_close(weights(**other), weights(replay="episodes"), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change", [{"alpha": 0.5}, {"grouping": "random"}, {"recovery": PixelRecovery(per_class=6, steps=1)}], ids=str
)
def test_other_settings_are_another_model(
    change: dict[str, Any], tiny_pool: ModelPool, kept: Store, tmp_path: Path
) -> None:
    first, other = (brief(**more).fit(tiny_pool, kept, 5) for more in ({}, change))
    assert of_bytes(first, tmp_path / "first") != of_bytes(other, tmp_path / "other")


# Baselines ------------------------------------------------------------------------------------------------------------


def singles(pool: ModelPool, store: Store) -> list[Ensemble]:
    whole = ALL["ensemble"].fit(pool, store, 0)
    assert isinstance(whole, Ensemble)
    return [Ensemble([model], [moments]) for model, moments in zip(whole.models, whole.moments)]


def accuracy(model: FewShotModel, images: LabelledImages) -> float:
    episodes = sample_episodes(images, min(5, len(images.classes)), 1, 5, 200, 0)
    return evaluate(model, images, episodes).interval.mean


def test_best_single_is_the_best_on_validation(tiny_pool: ModelPool, kept: Store, toy_images: LabelledImages) -> None:
    chosen = ALL["best-single"].fit(tiny_pool, kept, 0, toy_images)
    assert isinstance(chosen, Ensemble)
    by_model = {single.models[0].id: accuracy(single, toy_images) for single in singles(tiny_pool, kept)}
    assert by_model[chosen.models[0].id] == max(by_model.values()) > min(by_model.values())


def test_mean_single_scores_the_mean_of_the_models(
    tiny_pool: ModelPool, kept: Store, toy_images: LabelledImages
) -> None:
    together = accuracy(ALL["mean-single"].fit(tiny_pool, kept, 0), toy_images)
    alone = [accuracy(single, toy_images) for single in singles(tiny_pool, kept)]
    assert together == pytest.approx(sum(alone) / 4)
    assert max(alone) > together > min(alone)


def test_a_pruned_ensemble_is_a_part_that_begins_with_the_best(tiny_pool: ModelPool, kept: Store) -> None:
    whole, two, one, more = (
        EnsembleAll(recovery=toys.HASTY, bank_images=50, size=size).fit(tiny_pool, kept, 0) for size in (None, 2, 1, 40)
    )
    ids = [[model.id for model in pruned.models] for pruned in (whole, two, one, more)]
    assert ids[0] == ids[3] == tiny_pool.ids
    assert ids[1] == sorted(ids[1], key=tiny_pool.ids.index)
    assert set(ids[2]) < set(ids[1]) < set(ids[0]), "greedy: the first one chosen stays"


def test_a_whitened_ensemble_evens_out_its_directions(tiny_pool: ModelPool, kept: Store) -> None:
    def strengths(whiten: float) -> torch.Tensor:
        method = EnsembleAll(recovery=toys.HASTY, bank_images=50, whiten=whiten, dimensions=6)
        ensemble = method.fit(tiny_pool, kept, 0)
        assert isinstance(ensemble, Ensemble)
        assert ensemble.projection is None if not whiten else ensemble.projection.shape[1] == 6
        bank = recover_pool(tiny_pool, toys.HASTY, kept)
        images = bank.labelled("by-name", tiny_pool.input).images
        return ensemble.encode(to_float(images)).square().mean(0)

    torch.testing.assert_close(strengths(1.0), torch.ones(6), rtol=1e-2, atol=1e-2)
    half = strengths(0.5)
    assert half.max() / half.min() > 1.5
    assert strengths(0.0).shape[0] > 6


def test_average_is_the_mean_of_the_parameters_of_one_architecture(stripes: tuple[ModelPool, Store]) -> None:
    pool = stripes[0]
    averaged = SOLVED["average"].fit(*stripes, seed=0)
    assert isinstance(averaged, Ensemble)
    (found,) = averaged.models
    states = [model.network.state_dict() for model in pool]
    for name, value in found.network.state_dict().items():
        if name.endswith(("weight", "bias")) and not name.startswith("head."):
            mean = sum(state[name].double() for state in states) / 3
            torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-6)
            assert not torch.equal(value, states[0][name])
        elif name.endswith("running_mean"):
            mean = sum(state[name] for state in states) / 3
            assert not torch.allclose(value, mean), "statistics belong to the averaged weights: they are estimated anew"
    fresh = pool.get(found.id).network.state_dict()
    torch.testing.assert_close(dict(fresh), dict(states[0]), rtol=0, atol=0)


def test_the_average_of_one_model_is_that_model(stripes: tuple[ModelPool, Store]) -> None:
    pool, store = stripes
    averaged = SOLVED["average"].fit(pool[1:2], store, 0)
    state = dict(averaged.models[0].network.named_parameters())
    torch.testing.assert_close(state, dict(pool[1].network.named_parameters()), rtol=0, atol=0)


def test_untrained_depends_on_the_seed_and_the_bank_s_statistics_only(tiny_pool: ModelPool, kept: Store) -> None:
    model = ALL["untrained"].fit(tiny_pool, kept, 0)
    assert isinstance(model, MetaModel)
    assert model.history == []
    buffers = {name: value for name, value in model.network.named_buffers() if name.endswith("running_mean")}
    assert all(value.abs().sum() > 0 for value in buffers.values())


# Reading a saved model ------------------------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[Path], object]] = {
    "no folder": shutil.rmtree,
    "no model.json": lambda folder: (folder / "model.json").unlink(),
    "no JSON": lambda folder: (folder / "model.json").write_text("{"),
    "a list": lambda folder: (folder / "model.json").write_text("[]"),
    "no kind": lambda folder: (folder / "model.json").write_text("{}"),
    "unknown kind": lambda folder: (folder / "model.json").write_text(json.dumps({"kind": "pickle"})),
    "not text": lambda folder: (folder / "model.json").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_holds_no_model(how: str, tmp_path: Path) -> None:
    folder = toys.saved_model(tmp_path / "model")
    assert isinstance(load_model(folder), MetaModel)
    BROKEN[how](folder)
    with pytest.raises(MetapoolError, match=str(folder)):
        load_model(folder)
