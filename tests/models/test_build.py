import sys
from pathlib import Path

import pytest
import torch

from prunegraph.core.errors import ModelError
from prunegraph.models import KNOWN_MODELS, build_model

CIFAR = (3, 32, 32)
# Counted in the originals: He et al. table 6 (0.27M .. 1.7M), K. Liu's pytorch-cifar.
PARAMETERS = {
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "resnet110": 1_727_962,
    "vgg16_bn": 14_728_266,
    "mobilenetv2": 2_296_922,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_known_networks_have_the_published_size(name: str) -> None:
    model = build_model(name, num_classes=10, image_shape=CIFAR)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", KNOWN_MODELS)
def test_known_networks_run_and_train(name: str) -> None:
    model = build_model(name, num_classes=7, image_shape=CIFAR)
    logits = model(torch.randn(2, *CIFAR))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_every_known_name_has_a_pinned_size_or_is_a_family() -> None:
    assert set(KNOWN_MODELS) - set(PARAMETERS) == {"digits_resnet"}


@pytest.mark.parametrize(
    ("name", "blocks", "width"),
    [
        ("digits_resnet", 1, 16),
        ("digits_resnet8", 1, 16),
        ("digits_resnet14", 2, 16),
        ("digits_resnet8_w12", 1, 12),
        ("digits_resnet_w24", 1, 24),
        ("digits_resnet20_w5", 3, 5),
    ],
)
def test_digits_family_varies_in_depth_and_width(name: str, blocks: int, width: int) -> None:
    model = build_model(name, num_classes=10, image_shape=(1, 8, 8))
    assert model(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert model.conv1.weight.shape == (width, 1, 3, 3)
    assert model.fc.weight.shape == (10, 4 * width)
    assert len(model.layer2) == blocks


@pytest.mark.parametrize("name", ["digits_resnet9", "digits_resnet2"])
def test_digits_depth_must_fit(name: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}: depth \d is not 6n \+ 2; use 8, 14"):
        build_model(name, num_classes=10, image_shape=(1, 8, 8))


@pytest.mark.parametrize("name", ["resnet21", "digits_resnet8_w0", "digits_resnet8_", ""])
def test_unknown_name_lists_the_known_ones(name: str) -> None:
    with pytest.raises(
        ModelError, match=r"unknown architecture .*resnet20.*digits_resnet.*factory"
    ):
        build_model(name, num_classes=10, image_shape=CIFAR)


def test_vgg_refuses_small_images() -> None:
    with pytest.raises(ModelError, match="at least 32 x 32, these are 8 x 8"):
        build_model("vgg16_bn", num_classes=10, image_shape=(1, 8, 8))


@pytest.mark.parametrize("name", ["resnet18", "googlenet", "vit_b_16"])
def test_torchvision_networks_by_name(name: str) -> None:
    shape = (3, 64, 64)
    model = build_model(f"torchvision:{name}", num_classes=5, image_shape=shape)
    assert model(torch.randn(2, *shape)).shape == (2, 5)


def test_torchvision_bad_names_and_channels() -> None:
    with pytest.raises(
        ModelError, match=r"no classification network 'resnet19'; the nearest: resnet18, resnet"
    ):
        build_model("torchvision:resnet19", num_classes=5, image_shape=CIFAR)
    with pytest.raises(ModelError, match=r"takes RGB images, these have 1 channel\(s\)"):
        build_model("torchvision:resnet18", num_classes=5, image_shape=(1, 8, 8))


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "users_nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "nets.py").write_text(
        "from torch import nn\n"
        "def make(num_classes): return nn.Linear(4, num_classes)\n"
        "def fixed(): return nn.Linear(4, 2)\n"
        "def keywords(**options): return nn.Linear(4, options['num_classes'])\n"
        "def number(): return 3\n"
        "def broken(num_classes):\n    raise ValueError('two\\nlines')\n"
        "class Net(nn.Linear):\n"
        "    def __init__(self, num_classes): super().__init__(4, num_classes)\n"
    )
    (package / "syntax.py").write_text("def (\n")
    (package / "needs.py").write_text("import package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("factory", "outputs"), [("make", 6), ("fixed", 2), ("keywords", 6), ("Net", 6)]
)
def test_users_factory_is_found_in_the_current_folder(factory: str, outputs: int) -> None:
    model = build_model(f"users_nets.nets:{factory}", num_classes=6, image_shape=CIFAR)
    assert model.out_features == outputs


@pytest.mark.usefixtures("user_module")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users_nets.nets:number", "returned int; it must return a torch.nn.Module"),
        ("users_nets.nets:broken", "broken failed: ValueError: two lines"),
        ("users_nets.nets:absent", "no callable 'absent'; it has: make, fixed, keywords"),
        ("users_nets.absent:make", "cannot import 'users_nets.absent'.*ModuleNotFoundError"),
        ("users_nets.syntax:make", "cannot import .*SyntaxError"),
        ("users_nets.needs:make", "cannot import .*package_that_is_not_there"),
        (":make", "cannot import ''"),
    ],
)
def test_users_mistakes_are_one_line(spec: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        build_model(spec, num_classes=6, image_shape=CIFAR)
    assert "\n" not in str(caught.value)


def test_the_shortcut_exports() -> None:
    model = build_model("digits_resnet", num_classes=10, image_shape=(1, 8, 8)).eval()
    example = torch.randn(2, 1, 8, 8)
    exported = torch.export.export(model, (example,)).module()
    assert torch.equal(exported(example), model(example))
