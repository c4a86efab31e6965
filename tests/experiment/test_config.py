import dataclasses
from pathlib import Path

import pytest
import yaml

from prunegraph.errors import BudgetError, ConfigError
from prunegraph.experiment.config import (
    ApplyConfig,
    CompareConfig,
    ExportConfig,
    InspectConfig,
    PretrainConfig,
    TrainConfig,
    VerifyConfig,
    from_dict,
    load_config,
    read_yaml,
    same_run,
    save_config,
    to_dict,
)
from prunegraph.types import Budget

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


def test_unknown_key_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown option 'keep_mac' \(did you mean 'keep_macs'"
    ) as e:
        from_dict(TrainConfig, {"keep_mac": 0.5}, where="f.yaml")
    assert "finetune_epochs" in str(e.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "zero"}, "seed='zero' is not a int"),
        ({"seed": True}, "seed=True is not a int"),
        ({"keep_macs": "half"}, "keep_macs='half' is not a float"),
        ({"constraint": "hard"}, "not one of bias, lagrangian"),
        ({"json": 1}, "json=1 is not a bool"),
        ({"command": "apply"}, "options of `prunegraph apply`"),
        ({"keep-macs": 0.5, "keep_macs": 0.4}, "given twice"),
    ],
)
def test_bad_yaml_values_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values, where="f.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [("- a\n- b\n", "must hold"), ("a: [1\n", "is not YAML"), (None, "cannot read")],
)
def test_bad_yaml_files_raise_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "options.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message) as error:
        read_yaml(path)
    assert "\n" not in str(error.value)


def test_options_survive_the_file(tmp_path: Path) -> None:
    config = TrainConfig(
        arch=("resnet20", "resnet32"),
        weights=(tmp_path / "a", tmp_path / "b"),
        keep_macs=0.4,
        finetune_epochs=3,
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["command"] == "train"


def test_runs_are_the_same_if_only_runtime_options_differ() -> None:
    config = TrainConfig(keep_macs=0.4)
    other = dataclasses.replace(config, threads=7, json=True, out=Path("elsewhere"))
    assert same_run(config, to_dict(other)) == []
    assert same_run(config, to_dict(dataclasses.replace(config, seed=1))) == ["seed"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arch": ("a", "b"), "weights": (Path("w"),)}, "2 networks but 1 weights files"),
        ({"finetune_epochs": -1}, "finetune_epochs=-1"),
        ({"distill": 1.5}, "distill=1.5"),
        ({"search_seeds": 0}, "search_seeds=0"),
        ({"networks": 3}, "networks=3"),
        ({"threads": 0}, "threads=0"),
        ({"search_share": 2.0}, "search_share=2.0"),
        ({"finetune_lr": -0.1}, "finetune_lr=-0.1"),
    ],
)
def test_contradictory_or_impossible_options_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**values)  # type: ignore[arg-type]  # each key's type is right


def test_budget_defaults_to_half_of_the_macs_and_is_checked() -> None:
    assert TrainConfig().budget() == Budget(keep_macs=0.5)
    assert TrainConfig(keep_params=0.3).budget() == Budget(keep_params=0.3)
    with pytest.raises(BudgetError, match=r"keep_macs=1\.5"):
        TrainConfig(keep_macs=1.5)


def test_family_is_split_into_single_networks() -> None:
    config = TrainConfig(arch=("a", "b"), dataset="digits", seed=5)
    first, second = config.networks_configs()
    assert (first.arch, second.arch) == ("a", "b")
    assert first.dataset == "digits"
    assert second.seed == 5
    assert TrainConfig().networks_configs()[0].arch is None
