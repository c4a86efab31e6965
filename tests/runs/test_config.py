import dataclasses
from pathlib import Path
from typing import Any

import pytest

from prunegraph.agent.options import AgentOptions
from prunegraph.core.budget import Budget
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.runs.options.compare import CompareConfig
from prunegraph.runs.options.config import ApplyConfig, PretrainConfig, TrainConfig
from prunegraph.runs.options.tools import ExportConfig, InspectConfig, VerifyConfig

KINDS = [
    ApplyConfig,
    CompareConfig,
    ExportConfig,
    InspectConfig,
    PretrainConfig,
    TrainConfig,
    VerifyConfig,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_takes_the_common_options(kind: type) -> None:
    names = {field.name for field in dataclasses.fields(kind)}
    assert {"device", "seed", "config", "json", "threads"} <= names


@pytest.mark.parametrize("kind", KINDS)
def test_configs_are_frozen_and_keyword_only(kind: type) -> None:
    with pytest.raises(TypeError):
        kind("auto")
    required = {"policy": Path("p")} if kind is ApplyConfig else {}
    required |= {"run": Path("r")} if kind in (ExportConfig, VerifyConfig) else {}
    config = kind(**required)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": ("a", "b"), "weights": (Path("w"),)}, "2 networks but 1 weights files"),
        ({"finetune_epochs": -1}, "finetune_epochs=-1"),
        ({"batch_size": 1}, "batch_size=1"),
        ({"distill": 1.5}, "distill=1.5"),
        ({"search_seeds": 0}, "search_seeds=0"),
        ({"networks": 0}, "networks=0"),
        ({"threads": 0}, "threads=0"),
        ({"search_share": 2.0}, "search_share=2.0"),
        ({"finetune_lr": -0.1}, "finetune_lr=-0.1"),
        ({"seed": 2**32}, "seed=4294967296 must be at most"),
        ({"threads": 10**6}, "threads=1000000 must be at most"),
    ],
)
def test_contradictory_or_impossible_options_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)  # type: ignore[arg-type]  # each key's type is right


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"learning_rate": -1.0}, "agent.learning_rate=-1.0"),
        ({"learning_rate": float("nan")}, "agent.learning_rate=nan"),
        ({"update_size": 1}, "agent.update_size=1 must be at least 2"),
        ({"subset": 0}, "agent.subset=0"),
        ({"swaps": -1}, "agent.swaps=-1"),
    ],
)
def test_impossible_options_of_the_agent_raise(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AgentOptions(**values)


def test_budget_defaults_to_half_of_the_macs_and_is_checked() -> None:
    assert TrainConfig().budget() == Budget(keep_macs=0.5)
    assert TrainConfig(round_to=8).budget() == Budget(keep_macs=0.5, round_to=8)
    assert TrainConfig(keep_params=0.3).budget() == Budget(keep_params=0.3)
    with pytest.raises(BudgetError, match=r"keep_macs=1\.5"):
        TrainConfig(keep_macs=1.5)


def test_family_is_split_into_single_networks() -> None:
    config = TrainConfig(arch=("a", "b"), dataset="digits", seed=5)
    first, second = config.network_configs()
    assert (first.arch, second.arch) == ("a", "b")
    assert first.dataset == "digits"
    assert second.seed == 5
    assert TrainConfig().network_configs()[0].arch is None
