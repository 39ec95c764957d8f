"""One thread, fixed seeds, deterministic operations; and small things on disk that many tests start from."""

from collections.abc import Iterator
from pathlib import Path

import cases
import pytest
import torch

from metapool.bank import TaskBank
from metapool.base.images import LabelledImages
from metapool.base.store import Store
from metapool.pool import ModelPool, PretrainedModel
from metapool.recover import GeneratorRecovery, recover_pool


def pytest_configure() -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order() -> Iterator[None]:
    """No test sees what another left of the global seed, the number of threads or the default type."""
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", threads=1)


@pytest.fixture(scope="session")
def toy_images() -> LabelledImages:
    """Eight classes of 16×16 grey images that a small network tells apart within a second."""
    return cases.toy_images(classes=8, per_class=24, shape=(1, 16, 16), seed=0)


@pytest.fixture(scope="session")
def fitted_model() -> PretrainedModel:
    """A small Conv4 that knows its three classes."""
    return cases.fitted("fitted", "conv4", classes=3, shape=(1, 16, 16))


@pytest.fixture(scope="session")
def tiny_pool(tmp_path_factory: pytest.TempPathFactory) -> ModelPool:
    """Four fitted models of two architectures, two sizes, one and three channels, with 3, 2, 3 and 4 classes."""
    pool = ModelPool.create(tmp_path_factory.mktemp("pools") / "tiny", "tiny")
    pool.add(cases.fitted("a-conv4", "conv4", classes=3, shape=(1, 16, 16)), torch.float16)
    pool.add(cases.fitted("b-resnet10", "resnet10", classes=2, shape=(1, 16, 16)), torch.float16)
    pool.add(cases.fitted("c-conv4", "conv4", classes=3, shape=(3, 32, 32)), torch.float16)
    pool.add(cases.fitted("d-conv4", "conv4", classes=4, shape=(1, 16, 16), width=6), torch.float16)
    return pool


@pytest.fixture(scope="session")
def tiny_bank(tiny_pool: ModelPool, tmp_path_factory: pytest.TempPathFactory) -> TaskBank:
    """Four images of every class of every model of ``tiny_pool``."""
    recovery = GeneratorRecovery(per_class=4, steps=3, code=8, width=4, shift=1)
    return recover_pool(tiny_pool, recovery, Store(tmp_path_factory.mktemp("bank"), threads=1))
