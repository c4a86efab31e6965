"""The options of every command: frozen dataclasses, read from the command line and from YAML.

``tyro`` makes the command line from them. ``--config FILE.yaml`` gives defaults that the command
line overrides; a run folder holds the merged options as ``config.yaml``, which can be given back.

A class names the section of the help that its options stand in; an option may name another one.
``Hidden`` ones show with ``--help-all`` alone.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from prunegraph.agent.options import AgentOptions
from prunegraph.core.budget import AttentionUnit, Budget
from prunegraph.core.checks import check_at_least, check_at_most, check_positive, check_range
from prunegraph.core.errors import ConfigError
from prunegraph.core.reading import MAX_IMAGE_SIZE
from prunegraph.runs.options.checks import check_usable
from prunegraph.runs.options.help import ABSENT, HIDDEN, Section
from prunegraph.runs.options.tasks import IMAGES, TaskOptions

MAX_SEED = 2**32 - 10_000
"""The largest seed: numpy takes 32 bits, and runs count on from it."""

MAX_THREADS = 4096

DEFAULT_KEEP_MACS = 0.5
"""What a command prunes to if it is told no limit."""


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """Options that every command takes.

    Attributes:
        device: where networks run: auto (cuda if there is one), cpu, cuda, cuda:0, ...
        threads: CPU threads; default: one a core, at most OMP_NUM_THREADS; one for digits and
            clutter, whose networks are tiny.
        seed: seed of everything random.
        config: YAML file with options; those on the command line come first.
        json: print the result as JSON on standard output, and progress on standard error.
    """

    command: ClassVar[str] = ""
    section: ClassVar[str] = "machine"
    device: str = "auto"
    threads: int | None = None
    seed: int = 0
    config: Path | None = None
    json: bool = False

    def __post_init__(self) -> None:
        for name in (item.name for item in dataclasses.fields(self)):
            check_usable(name, getattr(self, name))
        check_at_least("threads", self.threads, 1)
        check_at_most("threads", self.threads, MAX_THREADS)
        check_at_least("seed", self.seed, 0)
        check_at_most("seed", self.seed, MAX_SEED)


@dataclass(frozen=True, kw_only=True)
class DataConfig(CommonConfig):
    """Which images.

    Attributes:
        dataset: digits; clutter, digits among pieces of others; cifar10, cifar100, imagenet,
            folder, or package.module:function, your own; default: what the weights' JSON names,
            else digits.
        data_dir: folder or tar that holds the data set.
        image_size: side to which images are scaled; default: what the weights' JSON names, else the
            data set's own.
        search_share: share of the training images that is set aside for the search where the data
            set has no validation folder.
        split_seed: seed of that cut; give all commands that use the same weights the same one.
        no_flip: do not mirror training images: digits, letters, signs (those of dataset digits
            never are); default: what the weights' JSON names.
    """

    section: ClassVar[str] = "data"
    dataset: str | None = None
    data_dir: Path | None = None
    image_size: Annotated[int | None, HIDDEN] = None
    search_share: Annotated[float, HIDDEN] = 0.1
    split_seed: Annotated[int, HIDDEN] = 0
    no_flip: Annotated[bool, HIDDEN] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("image_size", self.image_size, 1)
        check_at_most("image_size", self.image_size, MAX_IMAGE_SIZE)
        check_range("search_share", self.search_share, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class StructureConfig(DataConfig):
    """What can leave a network, and how one without weights is trained.

    Attributes:
        exclude: modules whose weights keep their shapes: names, or globs as 'layer1.*'.
        keep_at_least: MODULES=SHARE, as 'layer4.*=0.8': at least this share of the channels that
            these modules write and read stays.
        pretrain_epochs: epochs to train a network that has no weights; default: 40 on digits, 12 of
            the embedded language model, 8 on the embedded utterances, 60 on recordings; 0 for
            package.module:factory; other image sets need weights, or this option.
        attention: what is removed of an attention: whole heads, or a part of each head's width.
    """

    section: ClassVar[str] = "what"
    exclude: Annotated[tuple[str, ...], Section("budget")] = ()
    keep_at_least: Annotated[tuple[str, ...], Section("budget"), HIDDEN] = ()
    pretrain_epochs: Annotated[int | None, HIDDEN] = None
    attention: Annotated[AttentionUnit, HIDDEN] = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("pretrain_epochs", self.pretrain_epochs, 0)
        self.least_shares()

    def least_shares(self) -> dict[str, float]:
        """Return the least share of channels by module.

        Raises:
            ConfigError: an entry is not MODULES=SHARE.
        """
        found = {}
        for entry in self.keep_at_least:
            modules, _, share = entry.rpartition("=")
            try:
                found[modules] = float(share)
            except ValueError:
                modules = ""
            if not modules:
                msg = f"keep_at_least holds {entry!r}, which is not MODULES=SHARE as 'layer4.*=0.8'"
                raise ConfigError(msg)
        return found


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(StructureConfig):
    """Which network, and on which images.

    Attributes:
        arch: resnet20, vgg16_bn, digits_resnet, torchvision:NAME, timm:NAME, hf:FOLDER_OR_NAME,
            package.module:factory, ...; default: what the weights' JSON names, else digits_resnet.
        weights: weights file (.safetensors, or .pt/.pth without pickled code), or of networks of
            transformers a folder or hf:NAME; default: trained first on digits, those that a library
            publishes on imagenet, those of hf:FOLDER, else what the factory returns.
    """

    section: ClassVar[str] = "what"
    arch: str | None = None
    weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class TaskNetworkConfig(TaskOptions, NetworkConfig):
    """Which network, and for what."""


@dataclass(frozen=True, kw_only=True)
class NetworksConfig(StructureConfig):
    """Which networks, on the same images.

    Attributes:
        arch: one or more networks: resnet20, vgg16_bn, torchvision:NAME, timm:NAME,
            hf:FOLDER_OR_NAME, package.module:factory; default: what the weights' JSON names, else
            digits_resnet.
        weights: one weights file a network, in the same order.
    """

    section: ClassVar[str] = "what"
    arch: tuple[str, ...] = ()
    weights: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch and self.weights and len(self.arch) != len(self.weights):
            msg = (
                f"{len(self.arch)} networks but {len(self.weights)} weights files: "
                "give --weights once for each --arch, in the same order"
            )
            raise ConfigError(msg)

    def network_configs(self) -> tuple[NetworkConfig, ...]:
        """Return the options of each network alone."""
        count = max(len(self.arch), len(self.weights), 1)
        names = {field.name for field in dataclasses.fields(TaskNetworkConfig)}
        shared = {name: getattr(self, name) for name in names - {"arch", "weights"}}
        return tuple(
            TaskNetworkConfig(**shared, arch=arch, weights=weights)
            for arch, weights in zip(
                self.arch or [None] * count, self.weights or [None] * count, strict=True
            )
        )


@dataclass(frozen=True, kw_only=True)
class BudgetOptions:
    """How small.

    Attributes:
        keep_macs: at most this share of the multiply-adds remains; default 0.5 without a limit.
        keep_params: at most this share of the parameters remains.
        max_memory: at most this many bytes of activations are alive at once, for one image.
        max_latency: at most this many milliseconds a forward of one image, on this device: apply
            measures it (fastest of 50, 5 % for noise), others predict it from timed layers.
        sparsity: this share of the weights becomes zero, for methods of single weights.
        pattern: where the zeros lie: n:m, as 2:4, keeps n of each m weights in a row; columns:
            whole inputs of layers; default: anywhere.
    """

    section: ClassVar[str] = "budget"
    keep_macs: float | None = None
    keep_params: float | None = None
    max_memory: int | None = None
    max_latency: float | None = None
    sparsity: float | None = None
    pattern: str | None = None


@dataclass(frozen=True, kw_only=True)
class PruningOptions(BudgetOptions, TaskOptions, CommonConfig):
    """For what, how small, in which widths, and how to fine-tune.

    Attributes:
        round_to: keep a multiple of this many channels (8, 16) in every group, within the budget.
        uniform: the same width for every layer of a kind, as one config can hold (from_pretrained).
        depth: whole sub-layers of residual blocks may be removed too, an attention or an MLP.
        finetune_epochs: epochs of the fine-tune, the same for every network that gets one; default:
            40 on digits, 10 on other images, else none.
        finetune_lr: peak learning rate of the fine-tune; default: 0.05 of images, 0.0001 of texts,
            0.003 of utterances.
        finetune_lora: rank of LoRA matrices that the fine-tune trains in place of all weights
            (needs peft); they are merged at its end.
        batch_size: samples a step of the fine-tune; default: 128 images, 8 texts, 32 sentences or
            utterances.
        finetune_on_search: fine-tune on the search images too, after every choice.
        distill: weight in [0, 1] of the dense network's outputs in the loss; 0: labels alone.
        calibration_images: training images that recalibrate batch norm after pruning; in searches
            512 at most.
        reconstruct: leave the kept weights as they are; default: they are reconstructed by least
            squares on those images before a pruned network is scored or fine-tuned.
        layer_by_layer: reconstruct all layers at once, which takes less time; default: one after
            another, each on its inputs in the pruned network.
        workers: searches and fine-tunes that run side by side, each in a process with its share of
            the threads; default: one a thread on a CPU, else one. If the number is given, it is
            also how many networks of a single search are evaluated at once.
    """

    section: ClassVar[str] = "fine-tune"
    round_to: Annotated[int | None, Section("budget")] = None
    uniform: Annotated[bool, Section("budget"), HIDDEN] = False
    depth: Annotated[bool, Section("budget"), HIDDEN] = False
    finetune_epochs: int | None = None
    finetune_lr: Annotated[float | None, HIDDEN] = None
    finetune_lora: Annotated[int | None, HIDDEN] = None
    batch_size: Annotated[int | None, HIDDEN] = None
    finetune_on_search: Annotated[bool, HIDDEN] = False
    distill: Annotated[float, HIDDEN] = 0.5
    calibration_images: Annotated[int, HIDDEN] = 1024
    reconstruct: Annotated[bool, HIDDEN] = True
    layer_by_layer: Annotated[bool, HIDDEN] = True
    workers: Annotated[int | None, Section("machine")] = None

    def budget(self) -> Budget:
        """Return what may remain; half of the multiply-adds if nothing is asked."""
        names = [each.name for each in dataclasses.fields(BudgetOptions)]
        asked = {name: getattr(self, name) for name in names}
        if all(value is None for value in asked.values()):
            asked["keep_macs"] = DEFAULT_KEEP_MACS
        return Budget(**asked, round_to=self.round_to, uniform=self.uniform, depth=self.depth)

    def __post_init__(self) -> None:
        super().__post_init__()
        kind = self.budget().kind
        check_at_least("calibration_tokens", self.calibration_tokens, 1)
        check_at_least("window", self.window, 2)
        check_at_least("finetune_epochs", self.finetune_epochs, 0)
        check_at_least("finetune_lora", self.finetune_lora, 1)
        if self.finetune_lora is not None and kind == "weights":
            msg = "finetune_lora would fill the zeros of a sparsity: leave one of them out"
            raise ConfigError(msg)
        check_at_least("batch_size", self.batch_size, 2)
        check_at_least("calibration_images", self.calibration_images, 1)
        check_at_least("workers", self.workers, 1)
        check_range("distill", self.distill, 0.0, 1.0)
        check_positive("finetune_lr", self.finetune_lr)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(CommonConfig):
    """How the agent searches.

    Attributes:
        networks: pruned networks that one search may evaluate, everything counted.
        policy: trained policy that the agent's search begins with: resnet-cifar, which comes with
            the package, a run folder of train, or a policy file; default: a heuristic.
        budgets: shares of the multiply-adds to train the policy for, one an episode; default: the
            run's budget.
        ray: evaluate the networks of a search on a Ray cluster: its address, auto (this machine's
            own), or local.
        agent: what studies of the agent change.
    """

    section: ClassVar[str] = "search"
    networks: int = 400
    policy: Path | None = None
    budgets: Annotated[tuple[float, ...], HIDDEN] = ()
    ray: Annotated[str | None, Section("machine"), HIDDEN] = None
    agent: AgentOptions = field(default_factory=AgentOptions)

    def __post_init__(self) -> None:
        super().__post_init__()
        for share in self.budgets:
            Budget(keep_macs=share)
        if len(set(self.budgets)) < len(self.budgets):
            msg = f"budgets={' '.join(map(str, self.budgets))} names one twice: give each once"
            raise ConfigError(msg)
        check_at_least("networks", self.networks, 1)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataConfig):
    """Train a network on the train split, from scratch or further; resumes if interrupted.

    Attributes:
        arch: resnet20, vgg16_bn, digits_resnet, torchvision:NAME, package.module:factory, ...;
            default: what the weights' JSON names, else digits_resnet.
        weights: weights file that is trained further; default: from scratch.
        slimmable: train another random part of the network in each step, of at least this share of
            the multiply-adds, so that pruning costs less accuracy; give --weights too.
        distill: weight in [0, 1] in the loss of the outputs that --weights give.
        epochs: passes over the train split; default: 40 on digits, elsewhere 60, with weights 10.
        lr: peak learning rate; default: 0.1, with weights 0.05.
        batch_size: images a step.
        out: weights file to write, with a JSON beside it; default: runs/ARCH-DATASET.safetensors.
    """

    command: ClassVar[str] = "pretrain"
    section: ClassVar[str] = "what"
    arch: str | None = None
    weights: Path | None = None
    slimmable: Annotated[float | None, Section("train")] = None
    distill: Annotated[float, Section("train")] = 0.0
    epochs: Annotated[int | None, Section("train")] = None
    lr: Annotated[float | None, Section("train")] = None
    batch_size: Annotated[int, Section("train")] = 128
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("epochs", self.epochs, 1)
        check_at_least("batch_size", self.batch_size, 2)
        check_positive("lr", self.lr)
        if self.slimmable is not None:
            check_range("slimmable", self.slimmable, 0.001, 1.0)
            if self.weights is None:
                msg = "--slimmable makes a trained network slimmable: give its --weights"
                raise ConfigError(msg)
        check_range("distill", self.distill, 0.0, 1.0)
        if self.distill and self.weights is None:
            msg = "--distill learns from the outputs of a trained network: give its --weights"
            raise ConfigError(msg)


@dataclass(frozen=True, kw_only=True)
class TrainConfig(SearchOptions, PruningOptions, NetworksConfig):
    """Train the agent, prune with it, fine-tune, compare with the baselines, report.

    Several networks train one policy. A catalogue trains a policy alone: no network is pruned.

    Attributes:
        catalogue: folder of weights files with their JSON files; the policy learns by --networks
            pruned networks of each, but of those whose JSON names a part other than train.
        search_seeds: independent searches; the best mask on the search split wins.
        baselines: all: thirteen heuristics, CEM, random search, sampler; heuristics: those; none.
        out: run folder; default: runs/ARCH-DATASET-KEEP. The same command resumes.
    """

    command: ClassVar[str] = "train"
    section: ClassVar[str] = "what"
    catalogue: Path | None = None
    search_seeds: Annotated[int, Section("search")] = 3
    baselines: Annotated[Literal["all", "heuristics", "none"], Section("search")] = "all"
    sparsity: Annotated[float | None, *ABSENT] = None
    pattern: Annotated[str | None, *ABSENT] = None
    out: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("search_seeds", self.search_seeds, 1)
        asked = self.arch or self.weights or self.task != IMAGES
        if self.catalogue and (asked or self.budget() != Budget(keep_macs=DEFAULT_KEEP_MACS)):
            msg = "--catalogue takes --budgets: leave --arch, --weights, --task, other limits away"
            raise ConfigError(msg)


@dataclass(frozen=True, kw_only=True)
class PruneConfig(SearchOptions, PruningOptions, NetworkConfig):
    """Prune a network with one method, fine-tune it, report.

    Attributes:
        method: a heuristic (l1/uniform, taylor/per_mac, ...), cem, random_search, netadapt, amc, a
            method of single weights (magnitude, ...), agent, policy:NAME (a trained one), or
            package.module:method, your own.
        out: run folder; default: runs/METHOD-ARCH-DATASET-KEEP. The same command resumes.
    """

    command: ClassVar[str] = "prune"
    section: ClassVar[str] = "what"
    method: Annotated[str, tyro.conf.Positional]
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class ApplyConfig(PruningOptions, NetworkConfig):
    """Prune a network with a trained policy, without a search.

    Attributes:
        policy: resnet-cifar, which comes with the package; run folder of ``train``, or a policy
            file.
        out: run folder; default: runs/apply-ARCH-DATASET-KEEP. The same command resumes.
    """

    command: ClassVar[str] = "apply"
    section: ClassVar[str] = "what"
    policy: Path
    sparsity: Annotated[float | None, *ABSENT] = None
    pattern: Annotated[str | None, *ABSENT] = None
    out: Path | None = None
