import dataclasses
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunegraph.agent.options import AgentOptions
from prunegraph.core.errors import ConfigError
from prunegraph.methods.fedmap.method import FedMap
from prunegraph.runs.choose import method_of
from prunegraph.runs.options.config import ApplyConfig, PruneConfig, TrainConfig
from prunegraph.runs.options.fields import with_options
from prunegraph.runs.options.yaml_file import (
    command_line,
    differences,
    from_dict,
    load_config,
    parse,
    read_yaml,
    save_config,
    to_dict,
)


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
        ({"agent": {"constraint": "hard"}}, "agent: constraint='hard' is not one of bias, lagr"),
        ({"agent": {"update_sise": 4}}, "agent: unknown option 'update_sise'.*'update_size'"),
        ({"agent": 4}, "agent must hold"),
        ({"update_size": 4}, "unknown option 'update_size'"),
        ({"json": 1}, "json=1 is not a bool"),
        ({"command": "apply"}, "options of `prunegraph apply`"),
        ({"keep-macs": 0.5, "keep_macs": 0.4}, "given twice"),
    ],
)
def test_bad_yaml_values_raise(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values, where="f.yaml")


def test_controls_beside_a_method_take_its_options() -> None:
    words = ("pathways.start=random", "pathways.reselect=true", "pathways.epochs=1")
    config = PruneConfig(method="pathways", method_options=words)
    for name in ("pathways", "one_mask_of_union"):
        method: Any = method_of(config, name)
        assert (method.start, method.reselect, method.epochs) == ("random", True, 1)


def test_numbers_may_have_an_exponent_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text("finetune_lr: 1e-3\n", encoding="utf-8")
    assert from_dict(TrainConfig, read_yaml(path), where="f.yaml")["finetune_lr"] == 0.001
    assert with_options(FedMap(), {"lr": "2E-1"}) == FedMap(lr=0.2)
    for word, kind in (("nan", "usable float"), ("2024-13-45", "float"), ("fast", "float")):
        with pytest.raises(ConfigError, match=rf"fedmap\.lr='?{word}'? is not a {kind}"):
            with_options(FedMap(), {"lr": word})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n- b\n", "must hold"),
        ("a: [1\n", "is not YAML"),
        (None, r"cannot read options from .*options.yaml is a folder: name a file in it"),
    ],
)
def test_bad_yaml_files_raise_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "options.yaml"
    if content is None:
        path.mkdir()
    else:
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


def test_folders_may_have_any_name(tmp_path: Path) -> None:
    config = TrainConfig(out=Path("写真\u3000r4"))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(TrainConfig, tmp_path / "config.yaml").out == config.out.resolve()


def test_runs_are_the_same_if_only_runtime_options_differ() -> None:
    config = TrainConfig(keep_macs=0.4)
    other = dataclasses.replace(config, threads=7, json=True, out=Path("elsewhere"))
    assert differences(config, to_dict(other)) == []
    assert differences(config, to_dict(dataclasses.replace(config, seed=1))) == [
        "seed 1 there, 0 here"
    ]
    written = {name: value for name, value in to_dict(config).items() if name != "networks"}
    assert differences(config, written) == []
    assert differences(dataclasses.replace(config, networks=40), written) == [
        "networks 400 there, 40 here"
    ]


def test_links_keep_their_names_and_lead_to_the_same_run(tmp_path: Path) -> None:
    blob, link = tmp_path / "blob", tmp_path / "model.safetensors"
    blob.touch()
    link.symlink_to(blob)
    linked, plain = TrainConfig(weights=(link,)), TrainConfig(weights=(blob,))
    assert to_dict(linked)["weights"] == [str(link)]
    assert differences(linked, to_dict(plain)) == []
    other = differences(linked, to_dict(TrainConfig(weights=(tmp_path / "another",))))
    assert len(other) == 1


def test_the_command_line_of_options_gives_them_back() -> None:
    config = TrainConfig(
        keep_macs=0.4,
        arch=("resnet20", "resnet32"),
        round_to=8,
        weights=(Path("a b"), Path("c")),
        reconstruct=False,
        no_flip=True,
        agent=AgentOptions(swaps=0, granularity="group"),
    )
    command = command_line(dataclasses.replace(config, out=Path("x"), json=True))
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["prunegraph", "train"]
    assert parse(TrainConfig, words[2:]) == config
    assert command_line(TrainConfig()) == "prunegraph train"


def test_the_name_of_a_shipped_policy_stays_a_name() -> None:
    assert to_dict(ApplyConfig(policy=Path("resnet-cifar")))["policy"] == "resnet-cifar"
    assert Path(to_dict(ApplyConfig(policy=Path("runs/mine")))["policy"]).is_absolute()


def test_help_shows_an_option_that_may_be_left_out_by_its_type(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse(TrainConfig, ["--help"]) is None
    printed = capsys.readouterr().out
    assert "--threads N " in printed
    assert "--out PATH " in printed
    assert "None" not in printed
