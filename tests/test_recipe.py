"""Recipes: read, laid over, written, refused; and the data that they name."""

from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from metapool.base.errors import MetapoolError
from metapool.interface import recipe as recipes
from metapool.interface.recipe import (
    Evaluation,
    Recipe,
    evaluation_images,
    load_recipe,
    open_pool,
    recipe_text,
    training_images,
    validation_images,
)
from metapool.learners import MAML
from metapool.methods import NAMED, recovery_of
from metapool.methods.baselines import EnsembleAll
from metapool.methods.free import FREE
from metapool.methods.tgr import TGR
from metapool.realdata import datasets
from metapool.recover import GeneratorRecovery, PixelRecovery

SHIPPED = recipes.shipped_recipes()


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


# Reading and writing --------------------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_there_and_no_name_means_the_main_job() -> None:
    assert {"main", "quick", "paper/cub"} <= set(SHIPPED)
    assert load_recipe(None) == load_recipe("main")
    assert load_recipe("quick").quick
    assert not load_recipe("main").quick


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_whole(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name.replace("/", "-")
    assert load_recipe(written(tmp_path / "again.yaml", recipe_text(recipe))) == recipe
    methods = recipe.methods()
    assert list(methods) == [recipe.method.name, *recipe.compare]
    if (recipes.SHIPPED / recipe.pool).is_dir():
        assert len(open_pool(recipe.pool)) >= (recipe.limit or 1)
    else:
        text = (recipes.RECIPES / f"{name}.yaml").read_text()
        assert f"--out {recipe.pool}\n" in text or f"pool join {recipe.pool} " in text, "it says how to make its pool"


@pytest.mark.parametrize(
    "changes",
    [
        {"method": TGR(recovery=PixelRecovery(per_class=3))},
        {"method": EnsembleAll(size=3)},
        {"method": TGR(learner=MAML(first_order=True), task_loss="classify")},
        {"variants": {"mine": TGR(steps=3), "other": EnsembleAll()}, "compare": ("mine", "other", "ensemble-2")},
        {"references": {"older": "runs/older/model"}, "limit": 3, "seed": -4, "jobs": 7},
        {"evaluation": Evaluation(data="/some/folder", validation=None, shots=(2,), root="x")},
        {"evaluation": Evaluation(data=("icons", "cub"), root=("", "x"), validation=("icons", "logos"))},
    ],
    ids=lambda changes: ",".join(changes),
)
def test_every_recipe_goes_through_yaml_and_back(changes: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe(**changes)
    again = load_recipe(written(tmp_path / "recipe.yaml", recipe_text(recipe)))
    assert again == recipe != Recipe()
    assert again.digest() == recipe.digest() != Recipe().digest()


def test_fields_left_out_have_their_defaults(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path / "empty.yaml", "")) == Recipe()
    only = load_recipe(written(tmp_path / "one.yaml", {"method": {"name": "tgr", "steps": 3}, "seed": 5}))
    assert only == Recipe(method=TGR(steps=3), seed=5)


WRONG: dict[str, tuple[object, str]] = {
    "unknown field": ({"methode": {"name": "tgr"}}, "methode: "),
    "unknown nested field": ({"method": {"name": "tgr", "stepz": 1}}, "method.tgr.stepz: "),
    "unknown method": ({"method": {"name": "maml"}}, "method: .*'maml'"),
    "method without a name": ({"method": {"steps": 3}}, "method: .*name"),
    "unknown recovery": ({"method": {"name": "tgr", "recovery": {"name": "guess"}}}, "method.tgr.recovery: .*'guess'"),
    "wrong type": ({"seed": "many"}, "seed: .*integer"),
    "wrong nested type": ({"evaluation": {"way": "all"}}, "evaluation.way: .*integer"),
    "one class": ({"evaluation": {"way": 1}}, "evaluation.way: "),
    "shot zero": ({"evaluation": {"shots": [5, 0]}}, "evaluation.shots.1: "),
    "negative shot": ({"evaluation": {"shots": [-1]}}, "evaluation.shots.0: "),
    "no shots": ({"evaluation": {"shots": []}}, "evaluation.shots: "),
    "one episode": ({"evaluation": {"episodes": 1}}, "evaluation.episodes: "),
    "a student too wide to be saved": ({"method": {"name": "tgr", "width": 513}}, "method.tgr.width: "),
    "no data": ({"evaluation": {"data": []}}, "evaluation.data: .*name one data set"),
    "data given twice": ({"evaluation": {"data": ["icons", "icons"]}}, "evaluation.data: .*different"),
    "a root too many": ({"evaluation": {"data": "cub", "root": ["a", "b"]}}, "evaluation: .*root: 2 folders for 1"),
    "name with a slash": ({"name": "a/b"}, "name: "),
    "name of the folder above": ({"name": ".."}, "name: "),
    "no model": ({"limit": 0}, "limit: "),
    "a list": ([1, 2], "the file: .*dictionary"),
    "a sentence": ("just words", "the file: .*dictionary"),
    "no YAML": ("a: [1", "is no YAML"),
    "a tab": ("a:\n\t- 1", "is no YAML"),
    "too deep": ("[" * 5000, "is no YAML"),
    "code": ('pool: !!python/object/apply:os.system ["touch hacked"]', "is no YAML.*python/object"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_recipe_is_one_line_that_names_file_and_field(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = written(tmp_path / "wrong.yaml", content)
    with pytest.raises(MetapoolError, match=f"^{path}:? {message}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00")
    with pytest.raises(MetapoolError, match=r"image\.yaml is no YAML"):
        load_recipe(str(tmp_path / "image.yaml"))


@pytest.mark.parametrize("path", ["nowhere.yaml", ".", "mian"])
def test_no_such_recipe_lists_the_shipped_ones(path: str) -> None:
    with pytest.raises(MetapoolError, match=f"^{path}: no such recipe file.*main.*quick"):
        load_recipe(path)


# Methods of a recipe --------------------------------------------------------------------------------------------------


def test_all_methods_share_the_recovery_of_the_recipe_s_own() -> None:
    recovery = PixelRecovery(per_class=9, seed=4)
    rivals = tuple(name for name in NAMED if name != "tgr")
    recipe = Recipe(
        method=TGR(recovery=recovery), compare=(*rivals, "ensemble-12", "mine"), variants={"mine": TGR(steps=3)}
    )
    methods = recipe.methods()
    assert list(methods) == ["tgr", *rivals, "ensemble-12", "mine"]
    found = {name: recovery_of(method) for name, method in methods.items()}
    alone = {name for name, one in found.items() if one is None}
    assert alone == {"free", "purer", "bidf-mkd", "frozen-backbone"}, "they make their own images, or need none"
    assert {one.digest() for one in found.values() if one is not None} == {recovery.digest()}
    assert methods["ensemble-12"] == EnsembleAll(recovery=recovery, size=12)
    assert methods["mine"] == TGR(recovery=recovery, steps=3)
    for name in rivals:
        shared = {"recovery": recovery} if found[name] is not None else {}
        assert methods[name] == NAMED[name].model_copy(update=shared)


def test_a_method_that_recovers_no_bank_has_no_input_control() -> None:
    with pytest.raises(MetapoolError, match="'free' recovers no bank"):
        Recipe(method=FREE(), compare=("input-control",)).methods()
    methods = Recipe(method=FREE(), compare=("untrained",)).methods()
    assert methods["untrained"] == NAMED["untrained"], "a rival then keeps its own recovery"


def test_the_input_control_is_the_same_method_on_images_of_untrained_generators() -> None:
    recipe = Recipe(method=TGR(steps=3, recovery=PixelRecovery(per_class=9, seed=4)), compare=("input-control",))
    control = recipe.methods()["input-control"]
    assert control == TGR(steps=3, recovery=GeneratorRecovery(per_class=9, seed=4, steps=0))
    assert control.recovery != recipe.methods()["tgr"].recovery


@pytest.mark.parametrize("name", ["nosuch", "ensemble-", "ensemble-0", "ensemble-x", "ensemble-3 ", "Untrained", ""])
def test_an_unknown_rival_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(MetapoolError, match=f"{name!r}.*known are .*untrained.*ensemble-K, input-control, mine"):
        Recipe(compare=(name,), variants={"mine": TGR()}).methods()


def test_no_two_lines_of_a_table_have_one_name() -> None:
    with pytest.raises(MetapoolError, match="compare: 'tgr' is the recipe's own method"):
        Recipe(method=TGR(steps=3), compare=("untrained", "tgr")).methods()
    for name in ("tgr", "untrained"):
        with pytest.raises(MetapoolError, match=f"references: '{name}'"):
            Recipe(compare=("untrained",), references={name: "runs/main/model"}).methods()
    assert "own" in Recipe(method=TGR(), compare=("own",), variants={"own": TGR(steps=3)}).methods()


# The data that a recipe names -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``plain/<class>`` and ``split/{train,val,test}/<class>``."""
    root = tmp_path_factory.mktemp("folders")
    toys.write_images(root / "plain", toys.stripes((0, 1, 2), 2))
    for split, kinds in {"train": (0, 1, 2), "val": (3, 4), "test": (5, 6, 7, 8)}.items():
        toys.write_images(root / "split" / split, toys.stripes(kinds, 2))
    return root


INPUT = recipes.InputSpec(channels=3, height=20, width=24, mean=(0.5,) * 3, std=(0.5,) * 3)


def test_evaluation_images_of_a_folder_are_its_test_classes_or_the_whole(folders: Path) -> None:
    whole = evaluation_images(str(folders / "plain"), "test", INPUT)
    assert whole.classes == tuple(sorted(toys.stripes((0, 1, 2), 1).classes))
    assert tuple(whole.images.shape) == (6, 3, 20, 24)
    split = evaluation_images(str(folders / "split"), "test", INPUT)
    assert set(split.classes) == set(toys.stripes((5, 6, 7, 8), 1).classes)
    assert set(evaluation_images(str(folders / "split"), "val", INPUT).classes) == set(toys.stripes((3, 4), 1).classes)


def test_validation_is_of_the_same_data_where_that_has_a_split(folders: Path) -> None:
    split = validation_images(Evaluation(data=str(folders / "split")), INPUT)
    assert split is not None
    assert set(split.classes) == set(toys.stripes((3, 4), 1).classes)
    assert validation_images(Evaluation(data=str(folders / "plain")), INPUT) is None, "never the scored images"
    assert validation_images(Evaluation(data=str(folders / "split"), validation=None), INPUT) is None
    given = validation_images(Evaluation(data=str(folders / "split"), validation=str(folders / "plain")), INPUT)
    assert given is not None
    assert len(given.classes) == 3
    icons = validation_images(Evaluation(data="icons"), INPUT)
    assert icons is not None
    assert icons.digest() == datasets.shipped("icons", "val").digest()
    assert icons.digest() != evaluation_images("icons", "test", INPUT).digest()


def test_training_images_are_the_train_classes_or_the_whole(folders: Path) -> None:
    assert len(training_images(str(folders / "split"), 16, 1).classes) == 3
    plain = training_images(str(folders / "plain"), 18, 3)
    assert tuple(plain.images.shape) == (6, 3, 18, 18)
    assert training_images("emoji", 18, 1).images.shape[1:] == (3, 18, 18)
    with pytest.raises(MetapoolError, match="--size 0: at least 1 pixel"):
        training_images("emoji", 0, 3)
    assert training_images("icons", None, 0).digest() == datasets.shipped("icons", "train").digest()


def test_a_pool_is_opened_by_shipped_name_or_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = open_pool("icons-30")
    assert shipped.path.parent == recipes.SHIPPED
    assert open_pool(str(shipped.path)).digest() == shipped.digest()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MetapoolError, match=r"^icons-31 is not a pool"):
        open_pool("icons-31")


def test_workers_are_as_many_as_told_or_as_there_are_cores() -> None:
    assert recipes.workers(3) == 3
    assert recipes.workers() == recipes.workers(0) >= 1
    with pytest.raises(MetapoolError, match="--jobs -3"):
        recipes.workers(-3)
