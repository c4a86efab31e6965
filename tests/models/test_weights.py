import copy
import json
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError
from prunegraph.models import WeightsInfo, build_model, load_weights, save_weights, weights_info

INFO = WeightsInfo(
    arch="digits_resnet", dataset="digits", mean=(0.3,), std=(0.4,), extra={"epochs": 3}
)


def digits(name: str = "digits_resnet8_w4", num_classes: int = 10) -> nn.Module:
    return build_model(name, num_classes=num_classes, image_shape=(1, 8, 8))


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_saved_weights_load_bit_equal(tmp_path: Path) -> None:
    source, target = digits(), digits()
    assert not same(source.state_dict(), target.state_dict())
    save_weights(source, tmp_path / "w.safetensors", INFO)
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source.state_dict(), target.state_dict())
    assert weights_info(tmp_path / "w.safetensors") == INFO
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


def test_tied_and_strided_weights_save(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].weight.data = model[0].weight.data.t()
    save_weights(model, tmp_path / "w.safetensors", INFO)
    stored = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert torch.equal(stored["1.weight"], model[0].weight)


def test_weights_are_never_saved_as_a_pickle(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"w\.pt: weights are written as safetensors"):
        save_weights(digits(), tmp_path / "w.pt", INFO)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["state_dict_ema", "model_ema"])
def test_a_moving_average_is_taken_where_a_checkpoint_holds_one(tmp_path: Path, name: str) -> None:
    source, target = digits(), digits()
    averaged = {f"module.{k}": v for k, v in source.state_dict().items()}
    content = {"model": digits().state_dict(), name: {"n_averaged": torch.tensor(5), **averaged}}
    torch.save(content, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(source.state_dict(), target.state_dict())
    torch.save({"model": source.state_dict(), name: {}}, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(source.state_dict(), target.state_dict())


@pytest.mark.parametrize(
    "wrap", ["plain", "state_dict", "model", "net", "module.", "_orig_mod.", "_orig_mod.module."]
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar", ".ckpt"])
def test_torch_checkpoints_unwrap(tmp_path: Path, wrap: str, suffix: str) -> None:
    source, target = digits(), digits()
    state = dict(source.state_dict())
    if wrap.endswith("."):
        content = {"epoch": 3, "state_dict": {f"{wrap}{k}": v for k, v in state.items()}}
    else:
        content = state if wrap == "plain" else {"epoch": 3, wrap: state}
    torch.save(content, tmp_path / f"w{suffix}")
    load_weights(target, tmp_path / f"w{suffix}")
    assert same(source.state_dict(), target.state_dict())


def test_lightnings_prefix_and_an_averaged_model_s_count_are_taken_off(tmp_path: Path) -> None:
    own = nn.Sequential(OrderedDict(model=nn.Linear(2, 2)))  # which has that prefix itself
    for network in (nn.Linear(3, 2), own):
        state = network.state_dict()
        averaged = {"module." + name: value for name, value in state.items()}
        files = ({f"model.{name}": value for name, value in state.items()}, state)
        for content in (*files, {"n_averaged": torch.tensor(3), **averaged}):
            torch.save({"state_dict": content}, tmp_path / "w.pt")
            fresh = copy.deepcopy(network)
            for parameter in fresh.parameters():
                nn.init.zeros_(parameter)
            load_weights(fresh, tmp_path / "w.pt")
            assert all(
                torch.equal(value, state[name]) for name, value in fresh.state_dict().items()
            )


def test_public_cifar_checkpoints_call_the_last_layer_otherwise(tmp_path: Path) -> None:
    source, target = digits(), digits()
    state = {k.replace("fc.", "linear."): v for k, v in source.state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.th")
    load_weights(target, tmp_path / "w.th")
    assert same(source.state_dict(), target.state_dict())


def test_auxiliary_heads_of_published_weights_are_left_out(tmp_path: Path) -> None:
    source, target = digits(), digits()
    state = {**source.state_dict(), "AuxLogits.conv0.conv.weight": torch.ones(3)}
    torch.save(state, tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    assert same(source.state_dict(), target.state_dict())


def test_infinity_where_the_networks_own_buffer_has_it_is_no_error(tmp_path: Path) -> None:
    source, target = digits(), digits()
    for network in (source, target):
        network.register_buffer("causal", torch.tensor([0.0, -torch.inf]))
    save_weights(source, tmp_path / "w.safetensors", INFO)
    load_weights(target, tmp_path / "w.safetensors")
    assert same(source.state_dict(), target.state_dict())


def test_missing_step_counters_are_no_error(tmp_path: Path) -> None:
    state = {k: v for k, v in digits().state_dict().items() if "num_batches_tracked" not in k}
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    target = digits()
    load_weights(target, tmp_path / "w.safetensors")
    assert torch.equal(target.fc.weight, state["fc.weight"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (digits("digits_resnet14_w4"), r"layer1\.1\.\S+ is unexpected \(and 35 more\)"),
        (digits("digits_resnet8_w5"), r"conv1\.weight has shape \(5, 1, 3, 3\) instead of \(4, 1"),
        (digits(num_classes=7), r"fc\.weight has shape \(7, 16\) instead of \(10, 16\)"),
        (nn.Linear(2, 2), r"conv1\.weight is missing"),
    ],
)
def test_another_network_is_named_and_nothing_changes(
    tmp_path: Path, other: nn.Module, message: str
) -> None:
    save_weights(other, tmp_path / "w.safetensors", INFO)
    target = digits()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(ArtefactError, match=f"of another network: {message}.*w.json beside it"):
        load_weights(target, tmp_path / "w.safetensors")
    assert same(before, target.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_names_the_tensor(tmp_path: Path, value: float) -> None:
    source = digits()
    source.layer2[0].bn1.running_var[1] = value
    save_weights(source, tmp_path / "w.safetensors", INFO)
    with pytest.raises(ArtefactError, match=r"tensor layer2\.0\.bn1\.running_var holds NaN"):
        load_weights(digits(), tmp_path / "w.safetensors")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.target),)  # type: ignore[return-value]

    def __init__(self, target: str) -> None:
        self.target = target


def write_bad(kind: str, folder: Path) -> Path:
    save_weights(digits(), folder / "w.safetensors", INFO)
    torch.save(digits().state_dict(), folder / "w.pt")
    path = folder / ("w.safetensors" if "safetensors" in kind else "w.pt")
    if kind.startswith("truncated"):
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind.startswith("pickle"):
        path.write_bytes(pickle.dumps({"a": Payload(str(folder / "owned"))}))
    elif kind == "whole model":
        torch.save(digits(), path)
    elif kind.startswith("empty"):
        path.write_bytes(b"")
    return path


@pytest.mark.parametrize(
    "kind",
    [
        "truncated safetensors",
        "truncated pt",
        "pickle safetensors",
        "pickle pt",
        "whole model",
        "empty safetensors",
        "empty pt",
    ],
)
def test_damaged_and_dangerous_files_are_one_line(tmp_path: Path, kind: str) -> None:
    path = write_bad(kind, tmp_path)
    with pytest.raises(ArtefactError, match=f"{path.name} is truncated or") as caught:
        load_weights(digits(), path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "owned").exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(str(tmp_path / "owned"))))
    assert (tmp_path / "owned").exists()


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="is a folder: name the weights file"):
        weights_info(".")
    with pytest.raises(ArtefactError, match=r"no weights file .*absent\.safetensors; check"):
        load_weights(digits(), tmp_path / "absent.safetensors")
    (tmp_path / "w.onnx").write_bytes(b"x")
    with pytest.raises(ArtefactError, match=r"end in one of \.safetensors, \.pt"):
        load_weights(digits(), tmp_path / "w.onnx")
    torch.save([torch.zeros(2)], tmp_path / "w.pt")
    with pytest.raises(ArtefactError, match="holds no state dict"):
        load_weights(digits(), tmp_path / "w.pt")


def test_info_is_optional(tmp_path: Path) -> None:
    assert weights_info(tmp_path / "w.safetensors") is None
    (tmp_path / "w.json").write_text('{"arch": "resnet20"}')
    assert weights_info(tmp_path / "w.safetensors") == WeightsInfo(arch="resnet20")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"w\.json is damaged: it is no JSON"),
        ("[]", r"w\.json is a list, where an object belongs"),
        ('{"arch": 3}', r"w\.json: arch is 3, where a printable text belongs"),
        ('{"arch": "a", "normalisation": {"mean": [0]}}', "normalisation.std is missing"),
        ('{"arch": "a", "normalisation": {"mean": [0], "std": [0]}}', "std above 0"),
        ('{"arch": "a", "normalisation": {"mean": [0, 1], "std": [1]}}', "of one length"),
        ('{"arch": "a", "normalisation": {"mean": [NaN], "std": [1]}}', "NaN is no number"),
        ('{"arch": "a", "normalisation": {"mean": [], "std": []}}', "of one length"),
    ],
)
def test_malformed_info_is_one_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(ArtefactError, match=message):
        weights_info(tmp_path / "w.safetensors")


@pytest.mark.data
def test_every_shared_checkpoint_loads(shared_dir: Path) -> None:
    paths = sorted((shared_dir / "weights").glob("*.safetensors"))
    assert paths
    for path in paths:
        info = weights_info(path)
        assert info is not None
        assert info.arch == json.loads(path.with_suffix(".json").read_text())["arch"]
        model = build_model(info.arch, num_classes=10, image_shape=(3, 32, 32))
        load_weights(model, path)
        assert torch.equal(
            model.state_dict()["fc.weight"], safetensors.torch.load_file(path)["fc.weight"]
        )
