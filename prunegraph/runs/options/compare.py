"""The options of ``compare``: of one comparison, and of the command, which may make several."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from prunegraph.core.errors import ConfigError
from prunegraph.runs.options.checks import check_at_least, check_at_most
from prunegraph.runs.options.config import (
    ApplyConfig,
    NetworkConfig,
    NetworksConfig,
    PruneConfig,
    PruningOptions,
    RecipeOptions,
    SearchOptions,
    TrainConfig,
)
from prunegraph.runs.options.help import HIDDEN, Section
from prunegraph.runs.options.tasks import TaskOptions


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """What is compared.

    Attributes:
        no_agent: compare the baselines alone; the report shows the best of them on the search split
            as the pruned network.
        methods: all; heuristics (those that need no search); torch_pruning (its own pruners, if it
            is installed; not part of all); names of baselines; or package.module:method, your own.
        seeds: search and fine-tuning seeds.
        finetune_best: fine-tune the agent, the best baseline on the search split and the dense
            network alone; default: eight rows and the dense network.
        out: run folder; default: runs/compare-ARCH-DATASET-KEEP, of several comparisons
            runs/compare-ARCH-KEEP+ARCH-KEEP. The same command resumes.
    """

    section: ClassVar[str] = "search"
    no_agent: bool = False
    methods: tuple[str, ...] = ("all",)
    seeds: int = 3
    finetune_best: Annotated[bool, Section("fine-tune"), HIDDEN] = False
    out: Annotated[Path | None, Section("what")] = None


@dataclass(frozen=True, kw_only=True)
class CompareConfig(MethodOptions, SearchOptions, TaskOptions, PruningOptions, NetworkConfig):
    """One comparison: of one network at one budget."""

    command: ClassVar[str] = "compare"

    def __post_init__(self) -> None:
        NetworkConfig.__post_init__(self)
        PruningOptions.check(self)
        SearchOptions.check(self)
        self.check_task()
        if not self.methods and self.no_agent:
            msg = (
                "methods names none and --no-agent leaves the agent out: nothing is left to compare"
            )
            raise ConfigError(msg)
        if self.policy is not None and self.no_agent:
            msg = (
                f"the policy {self.policy} is for the agent, which --no-agent leaves out: drop one"
            )
            raise ConfigError(msg)
        check_at_least("seeds", self.seeds, 1)


@dataclass(frozen=True, kw_only=True)
class ComparisonsConfig(MethodOptions, SearchOptions, TaskOptions, RecipeOptions, NetworksConfig):
    """Compare the agent with every baseline at the same budget, in two stages.

    Stage 1 reconstructs and recalibrates every row; stage 2 fine-tunes eight rows, chosen on the
    search split, with every seed. With several networks or budgets each network is compared at each
    budget, and a summary made of all.

    Attributes:
        keep_macs: at most this share of the multiply-adds remains; default 0.5 without a limit.
        keep_params: at most this share of the parameters remains; as many as keep_macs, if both are
            given: the first of each is the first budget.
        max_memory: at most this many bytes of activations alive at once, for one image, in every
            comparison.
        max_latency: at most this many milliseconds a forward of one image, predicted from layers
            that are timed on this device before, in every comparison.
    """

    command: ClassVar[str] = "compare"
    section: ClassVar[str] = "budget"
    keep_macs: tuple[float, ...] = ()
    keep_params: tuple[float, ...] = ()
    max_memory: int | None = None
    max_latency: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_macs and self.keep_params and len(self.keep_macs) != len(self.keep_params):
            msg = (
                f"{len(self.keep_macs)} keep_macs but {len(self.keep_params)} keep_params: they "
                "make budgets together, so give as many of each, or one kind alone"
            )
            raise ConfigError(msg)
        networks = max(len(self.arch), len(self.weights), 1)
        count = networks * max(len(self.keep_macs), len(self.keep_params), 1)
        check_at_most("networks x budgets", count, MAX_COMPARISONS)
        self.comparisons()

    def comparisons(self) -> tuple[CompareConfig, ...]:
        """Return the options of each comparison, all budgets of the first network first."""
        own = {field.name for field in dataclasses.fields(self)}
        names = [f.name for f in dataclasses.fields(CompareConfig) if f.name in own - SINGLE]
        shared = {name: getattr(self, name) for name in names}
        count = max(len(self.keep_macs), len(self.keep_params), 1)
        budgets = zip(
            self.keep_macs or [None] * count, self.keep_params or [None] * count, strict=True
        )
        return tuple(
            CompareConfig(
                **shared,
                arch=network.arch,
                weights=network.weights,
                keep_macs=keep_macs,
                keep_params=keep_params,
            )
            for network, (keep_macs, keep_params) in itertools.product(
                self.network_configs(), budgets
            )
        )


MAX_COMPARISONS = 1000
"""Networks times budgets of one command, at the most."""

SINGLE = frozenset({"arch", "weights", "keep_macs", "keep_params"})
"""Options of which every comparison has one."""

RunConfig = TrainConfig | ApplyConfig | PruneConfig | CompareConfig
"""The options of a command that prunes: each is a plan for the one runner."""
