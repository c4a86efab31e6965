"""Modules that stay as they are, and widths that stay at least."""

import math

import numpy as np
import pytest
import torch
import torchvision

from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask
from prunegraph.graph.narrowing import narrow


@pytest.fixture(scope="module")
def resnet() -> tuple[torch.nn.Module, StructureGraph]:
    model = torchvision.models.resnet18(num_classes=10).eval()
    return model, analyse(model, torch.randn(1, 3, 32, 32))


def pruned(graph: StructureGraph, share: float) -> np.ndarray:
    scores = np.random.default_rng(0).random(graph.num_units)
    return graph.project(scores, Budget(keep_macs=share)).keep


@pytest.mark.parametrize("pattern", ["layer2", "layer2.*", "layer2.?.conv2", "fc", "layer3.0.bn1"])
def test_an_excluded_module_keeps_the_shape_of_every_weight(
    pattern: str, resnet: tuple[torch.nn.Module, StructureGraph]
) -> None:
    model, graph = resnet
    own = narrow(graph, exclude=[pattern])
    small = apply_mask(model, own, own.mask(pruned(own, 0.6)))
    shapes = {name: value.shape for name, value in small.state_dict().items()}
    stem = pattern.rstrip("*").replace("?", "0")
    inside = {name: v.shape for name, v in model.state_dict().items() if name.startswith(stem)}
    assert inside
    assert all(shapes[name] == shape for name, shape in inside.items())
    assert shapes != {name: value.shape for name, value in model.state_dict().items()}
    reasons = {group.frozen for group in own.groups} - {group.frozen for group in graph.groups}
    assert reasons == {f"excluded by {pattern!r}"}
    assert own.fingerprint() == graph.fingerprint()


def test_without_it_that_module_is_cut(resnet: tuple[torch.nn.Module, StructureGraph]) -> None:
    model, graph = resnet
    small = apply_mask(model, graph, graph.mask(pruned(graph, 0.6)))
    assert small.layer2[0].conv2.weight.shape != model.layer2[0].conv2.weight.shape


def test_groups_keep_at_least_the_largest_share_asked(
    resnet: tuple[torch.nn.Module, StructureGraph],
) -> None:
    _, graph = resnet
    own = narrow(graph, keep_at_least={"layer4.*": 0.5, "layer4.0.conv1": 0.8, "layer1": 0.001})
    keep = pruned(own, 0.3)
    for number, group in enumerate(own.groups):
        kept = keep[group.units].sum()
        asked = 0.8 if any(m.startswith("layer4.0.conv1.") for m in group.members) else 0.5
        if any(member.startswith("layer4.") for member in group.members):
            assert kept >= math.ceil(asked * len(group.units))
        else:
            assert group.min_keep == graph.groups[number].min_keep
    assert own.fits(keep, Budget(keep_macs=0.3))
    inner = next(group for group in own.groups if group.name == "layer3.0.conv1")
    assert keep[inner.units].mean() < 0.5


def test_nothing_asked_changes_nothing(resnet: tuple[torch.nn.Module, StructureGraph]) -> None:
    assert narrow(resnet[1]) is resnet[1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exclude": ["layr1.*"]}, "exclude='layr1.*' matches no module .* the nearest: .*layer1"),
        ({"exclude": ["zzz"]}, "the nearest: bn1, conv1, fc"),
        ({"keep_at_least": {"heed": 0.5}}, "keep_at_least='heed' matches no module"),
        ({"keep_at_least": {"fc": 80}}, r"keep_at_least=80 of 'fc' must lie in \(0, 1\]"),
    ],
)
def test_bad_input_is_one_sentence(
    given: dict[str, object], message: str, resnet: tuple[torch.nn.Module, StructureGraph]
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        narrow(resnet[1], **given)
    assert "\n" not in str(error.value)
