"""The options of the commands that look at networks and runs: inspect, export, verify."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from prunegraph.core.checks import check_at_least
from prunegraph.core.errors import ConfigError
from prunegraph.core.user_code import is_factory
from prunegraph.runs.options.config import CommonConfig, NetworkConfig

OF_A_NETWORK = (
    *("arch", "weights", "dataset", "data_dir", "image_size", "num_classes"),
    *("attention", "exclude", "keep_at_least", "device", "seed"),
)
"""Options of ``inspect`` that say which network and how to analyse it, which a run folder knows."""

NOT_OF_INSPECT = ("pretrain_epochs", "search_share", "split_seed", "no_flip")
"""Options of a network that ``inspect``, which trains nothing and splits nothing, does not take."""


@dataclass(frozen=True, kw_only=True)
class InspectConfig(NetworkConfig):
    """Print a network's channel groups, sizes and costs, and what is frozen and why.

    Attributes:
        dataset: whose images the network takes; default: what the weights' JSON names, else
            imagenet for torchvision:NAME, timm:NAME and package.module:factory, digits for
            digits_resnet..., cifar10 for the others. Of an --arch hf:FOLDER_OR_NAME its own.
        weights: weights file, for the data set that its JSON names; nothing is trained.
        num_classes: outputs of the network; default: the data set's.
        run: run folder of a command that prunes: show what its network keeps. It names the
            network itself; only package.module:factory, code that is run, needs --arch too.
        all: show every group; default: the first 25.
        plot: PNG file to draw the groups and their MACs in.
    """

    command: ClassVar[str] = "inspect"
    section: ClassVar[str] = "what"
    pretrain_epochs: tyro.conf.Suppress[int | None] = None
    search_share: tyro.conf.Suppress[float] = NetworkConfig.search_share
    split_seed: tyro.conf.Suppress[int] = NetworkConfig.split_seed
    no_flip: tyro.conf.Suppress[bool] = NetworkConfig.no_flip
    num_classes: int | None = None
    run: Path | None = None
    all: bool = False
    plot: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("num_classes", self.num_classes, 1)
        if self.plot is not None and self.plot.suffix.lower() != ".png":
            msg = f"plot={self.plot} must be a PNG file: give a name that ends in .png"
            raise ConfigError(msg)
        given = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        odd = [name for name in NOT_OF_INSPECT if name in given]
        if odd:
            msg = f"inspect makes no use of {', '.join(odd)}: drop it"
            raise ConfigError(msg)
        named = [name for name in OF_A_NETWORK if name in given]
        if self.arch is not None and is_factory(self.arch):
            named.remove("arch")
        if self.run is not None and named:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in named)
            msg = f"--run names the network itself: drop {flags}, or drop --run"
            raise ConfigError(msg)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CommonConfig):
    """Export the pruned network of a run, and check that the file computes the same.

    Attributes:
        run: run folder of a command that prunes; of ``compare`` a folder in its ``cells``.
        format: onnx; torch-export (a .pt2 program, which needs torch alone); safetensors: the
            weights, with a recipe beside them that cuts a freshly built network to fit them;
            sparse: a small file without the weights that are zero (artefacts.sparse.load_sparse).
        out: file to write, a new one with the format's suffix; default: RUN/pruned.onnx,
            RUN/pruned.pt2, RUN/exported.safetensors (and exported.recipe.json), RUN/pruned.sparse.
        language: whose network is written, where there is a mask for each language.
        arch: the network's name, needed if it is package.module:factory: it is code that is run.
        dynamic_axes: axes of the input, besides the batch, whose size the file leaves open: 2 3
            for images of any size, 1 for sequences of any length.
    """

    command: ClassVar[str] = "export"
    section: ClassVar[str] = "what"
    run: Annotated[Path, tyro.conf.Positional]
    format: Literal["onnx", "torch-export", "safetensors", "sparse"] = "onnx"
    language: str | None = None
    out: Path | None = None
    dynamic_axes: tuple[int, ...] = ()
    arch: str | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(CommonConfig):
    """Rebuild a run from its files and check every figure that it reports.

    Attributes:
        run: run folder of a command that prunes.
        data_dir: where the data set lies now, if it was moved.
        dataset: the name of its data set, if that is package.module:function: it is code that is
            run.
        arch: the names of its networks that are package.module:factory: they are code that is run.
    """

    command: ClassVar[str] = "verify"
    section: ClassVar[str] = "what"
    run: Annotated[Path, tyro.conf.Positional]
    data_dir: Path | None = None
    dataset: str | None = None
    arch: tuple[str, ...] = ()
