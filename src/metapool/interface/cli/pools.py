"""Commands that make models from images, and pools of models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metapool.base.networks import TIMM
from metapool.base.store import Store
from metapool.interface import recipe as recipes
from metapool.interface.cli.progress import Progress
from metapool.interface.run import pool_summary
from metapool.pool.join import join_pools
from metapool.realdata.pretrain import OracleSettings, PoolSettings, build_pool, train_oracle


@dataclass
class Oracle:
    """Train the same learner on the real meta-train images: the upper reference, the one command that reads them."""

    data: str = "icons"
    """A shipped domain or a published benchmark (meta-train classes), a CSV file or a folder."""
    root: str | None = None
    """Folder of a published benchmark's files."""
    size: int | None = None
    """Side of the images in pixels; 32 for a folder or CSV when not given, else the data's own."""
    channels: int = 3
    """Image channels, for a folder or CSV: 1 grey, 3 colour."""
    out: Path = Path("runs/oracle/model")
    """Where the model goes."""
    settings: Annotated[OracleSettings, tyro.conf.arg(name="")] = field(default_factory=OracleSettings)
    """How it is trained."""
    seed: int = 0
    """Of everything random."""

    def __call__(self) -> None:
        """Trains and saves."""
        with Progress() as progress:
            images = recipes.training_images(self.data, self.size, self.channels, self.root)
            train_oracle(images, self.settings, self.seed, self.out, progress)
        root = f" --root {self.root}" if self.root else ""
        print(f"saved {self.out}; score it with: metapool evaluate --model {self.out} --data {self.data}{root}")


@dataclass
class PoolBuild:
    """Train a pool from images: each model on its own random classes."""

    out: Path
    """Folder of the new pool."""
    data: str = "icons"
    """A shipped domain or a published benchmark (meta-train classes), a CSV file `path,label`, or a folder
    `<class>/<images>`."""
    root: str | None = None
    """Folder of a published benchmark's files (`--data cifar_fs`, `cub`, `mini_imagenet`)."""
    size: int | None = None
    """Side of the images in pixels; 32 for a folder or CSV when not given, else the data's own."""
    channels: int = 3
    """Image channels, for a folder or CSV: 1 grey, 3 colour."""
    backbone_data: str | None = None
    """What the backbone of `vit-lora` models learns from, named like --data; the shipped domains other than --data when
    not given, so that it knows none of the pool's classes."""
    settings: Annotated[PoolSettings, tyro.conf.arg(name="")] = field(default_factory=PoolSettings)
    """How the models are trained."""
    licence: str = ""
    """Licence of the weights, noted in the pool."""
    seed: int = 0
    """Of everything random."""
    jobs: int = 0
    """Worker processes; 0 takes as many as there are cores."""
    store: Path = Path("store")
    """Folder where finished models are kept until the pool is whole."""

    def __call__(self) -> None:
        """Trains and shows the pool."""
        with Progress() as progress:
            images = recipes.training_images(self.data, self.size, self.channels, self.root)
            store = Store(self.store, jobs=recipes.workers(self.jobs), progress=progress)
            backbone_images = None
            if any(text.startswith("vit-lora") for text in self.settings.architectures):
                backbone_images = recipes.backbone_images(self.data, self.backbone_data, self.size, self.channels)
            build_pool(
                images, self.settings, store, self.out, name=self.out.name, seed=self.seed, licence=self.licence,
                backbone_images=backbone_images,
            )  # fmt: skip
        PoolShow(str(self.out))()


@dataclass
class PoolShow:
    """List the models of a pool."""

    pool: Annotated[str, tyro.conf.Positional] = "icons-30"
    """A shipped pool's name, or a folder."""
    json: bool = False
    """Print pool.json instead of a table."""

    def __call__(self) -> None:
        """Prints."""
        pool = recipes.open_pool(self.pool)
        if self.json:
            print(pool.manifest.model_dump_json(indent=1))
            return
        table = Table(
            "id", "architecture", "input", "accuracy %", "licence", "classes", title=escape(pool.manifest.name)
        )
        for entry in pool.manifest.models:
            network, size = entry.network, "x".join(map(str, entry.input.shape))
            accuracy = "" if entry.accuracy is None else f"{entry.accuracy:.1f}"
            name = network.architecture + f":{network.width}" * (not network.architecture.startswith(TIMM))
            table.add_row(entry.id, name, size, accuracy, escape(entry.licence), escape(", ".join(entry.classes)))
        Console().print(table)
        print(pool_summary(pool))


@dataclass
class PoolJoin:
    """Make one pool of several: of other domains, architectures, makers."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the new pool."""
    pools: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="POOL [POOL ...]")]
    """Shipped pools by name, or folders."""

    def __call__(self) -> None:
        """Joins and shows the pool."""
        join_pools([recipes.open_pool(name) for name in self.pools], self.out)
        PoolShow(str(self.out))()


@dataclass
class Pool:
    """Build a pool of models, join several, or list one (`metapool pool build`, `join`, `show`)."""

    command: Annotated[
        Annotated[PoolBuild, tyro.conf.subcommand("build", prefix_name=False)]
        | Annotated[PoolJoin, tyro.conf.subcommand("join", prefix_name=False)]
        | Annotated[PoolShow, tyro.conf.subcommand("show", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def __call__(self) -> None:
        """Passes on."""
        self.command()
