"""The options of ``compare``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from prunegraph.core.checks import check_at_least
from prunegraph.core.errors import ConfigError
from prunegraph.runs.options.config import (
    ApplyConfig,
    NetworkConfig,
    PruneConfig,
    PruningOptions,
    SearchOptions,
    TrainConfig,
)
from prunegraph.runs.options.help import HIDDEN, Section


@dataclass(frozen=True, kw_only=True)
class CompareConfig(SearchOptions, PruningOptions, NetworkConfig):
    """Compare the agent with every baseline at the same budget, in two stages.

    Stage 1 reconstructs and recalibrates every row. Stage 2 fine-tunes eight rows, chosen on the
    search split, with every seed.

    Attributes:
        no_agent: compare the baselines alone; the report shows the best of them on the search split
            as the pruned network.
        methods: all; heuristics (without a search); torch_pruning (its own pruners, if it is
            installed; not part of all); names of methods; or package.module:method, your own.
        seeds: search and fine-tuning seeds.
        finetune_best: fine-tune the agent, the best baseline on the search split and the dense
            network alone; default: eight rows and the dense network.
        out: run folder; default: runs/compare-ARCH-DATASET-KEEP. The same command resumes.
    """

    command: ClassVar[str] = "compare"
    section: ClassVar[str] = "search"
    no_agent: bool = False
    methods: tuple[str, ...] = ("all",)
    seeds: int = 3
    finetune_best: Annotated[bool, Section("fine-tune"), HIDDEN] = False
    out: Annotated[Path | None, Section("what")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
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


RunConfig = TrainConfig | ApplyConfig | PruneConfig | CompareConfig
"""The options of a command that prunes: each is a plan for the one runner."""
