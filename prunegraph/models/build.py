"""Build a target network from its name on the command line."""

import inspect
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from prunegraph.core.errors import ModelError, one_line, suggest
from prunegraph.core.extras import Late
from prunegraph.core.user_code import (
    HF_PREFIX,
    LIBRARIES,
    TIMM_PREFIX,
    TORCHVISION_PREFIX,
    as_one_line,
    find_factory,
    is_factory,
)
from prunegraph.models.library import (
    TORCHVISION_ARGUMENTS,
    check_library_name,
    create_timm,
    pretrained_folder,
    torchvision_names,
)
from prunegraph.models.mobilenet import MobileNetV2
from prunegraph.models.pretrained import build_image_classifier
from prunegraph.models.random_family import PATTERN as RANDOM_PATTERN
from prunegraph.models.random_family import random_classifier
from prunegraph.models.resnet import CifarResNet
from prunegraph.models.vgg import VGG16

torchvision = Late("torchvision")

CIFAR_RESNETS = ("resnet20", "resnet32", "resnet44", "resnet56", "resnet110")
KNOWN_MODELS = (*CIFAR_RESNETS, "vgg16_bn", "mobilenetv2", "digits_resnet")
DIGITS_PATTERN = re.compile(
    r"digits_resnet(?P<depth>[1-9]\d{0,3})?(?:_w(?P<width>[1-9]\d{0,3}))?(?P<group_norm>_gn)?"
)
DIGITS_DEPTH = 8
DIGITS_WIDTH = 16
DIGITS_LARGEST = 10**7  # depth times squared width: 600 million parameters
MIN_SIDE_VGG = 32  # five poolings by 2


def build_model(spec: str, *, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a network with fresh weights, drawn from torch's global generator.

    Args:
        spec: ``resnet20|32|44|56|110``, ``vgg16_bn``, ``mobilenetv2`` (their CIFAR forms);
            ``digits_resnet``, or a variant ``digits_resnet<depth>[_w<width>]`` with depth 6n + 2,
            such as ``digits_resnet14_w12``, and ``_gn`` behind it for group norm;
            ``random_<family>_<seed>``, a network of a family of ``random_family.FAMILIES``;
            ``torchvision:NAME``, ``timm:NAME``, ``hf:FOLDER_OR_NAME``, a classification network;
            ``package.module:factory``, a callable of the user, found also in the current folder,
            called with ``num_classes=`` if it takes that.
        num_classes: number of classes.
        image_shape: (channels, height, width) of the images.

    Returns:
        The network, in training mode, on the CPU.

    Raises:
        ModelError: the name is unknown, the network cannot take such images, or a factory fails.
    """
    check_arch(spec)
    if spec.startswith(TORCHVISION_PREFIX):
        name = spec.removeprefix(TORCHVISION_PREFIX)
        return _build_torchvision(name, num_classes, image_shape)
    if spec.startswith(TIMM_PREFIX):
        return _build_timm(spec, num_classes, image_shape)
    if spec.startswith(HF_PREFIX):
        return build_image_classifier(pretrained_folder(spec), num_classes, image_shape)
    if is_factory(spec):
        return _build_from_factory(spec, num_classes)
    return _build_builtin(spec, num_classes, image_shape)


def check_arch(spec: str) -> None:
    """Raise ModelError if no network has this name; a factory is not looked for."""
    if spec.startswith(LIBRARIES):
        check_library_name(spec)
    elif not (
        is_factory(spec)
        or spec in KNOWN_MODELS
        or DIGITS_PATTERN.fullmatch(spec)
        or RANDOM_PATTERN.fullmatch(spec)
    ):
        module, _, name = spec.rpartition(".")
        hint = suggest(spec, KNOWN_MODELS)
        if module:
            hint = f" (your own code? write {module}:{name})"
        elif spec in torchvision_names():
            small = [f"{name!r}, or " for name in KNOWN_MODELS if name == spec.replace("_", "")]
            hint = f" (did you mean {''.join(small)}'{TORCHVISION_PREFIX}{spec}'?)"
        msg = (
            f"unknown architecture {spec!r}{hint}; known: {', '.join(KNOWN_MODELS)}, "
            "digits_resnet<depth>_w<width>[_gn], random_<family>_<seed>, torchvision:NAME, "
            "timm:NAME, hf:FOLDER_OR_NAME, package.module:factory"
        )
        raise ModelError(msg)


def _build_builtin(spec: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build one of ``KNOWN_MODELS``, or a variant for digits."""
    channels, height, width = image_shape
    if spec in CIFAR_RESNETS:
        depth = int(spec.removeprefix("resnet"))
        return CifarResNet(depth, in_channels=channels, num_classes=num_classes)
    if spec == "mobilenetv2":
        return MobileNetV2(in_channels=channels, num_classes=num_classes)
    if spec == "vgg16_bn":
        if min(height, width) < MIN_SIDE_VGG:
            msg = f"vgg16_bn needs images of at least 32 x 32, these are {height} x {width}"
            raise ModelError(msg)
        return VGG16(in_channels=channels, num_classes=num_classes)
    if drawn := RANDOM_PATTERN.fullmatch(spec):
        return random_classifier(
            drawn["family"], int(drawn["seed"]), num_classes=num_classes, image_shape=image_shape
        )
    match = DIGITS_PATTERN.fullmatch(spec)
    assert match is not None
    depth = int(match["depth"] or DIGITS_DEPTH)
    stage_width = int(match["width"] or DIGITS_WIDTH)
    if depth < 8 or depth % 6 != 2:
        msg = f"{spec}: depth {depth} is not 6n + 2; use 8, 14, 20, ..."
        raise ModelError(msg)
    if depth * stage_width**2 > DIGITS_LARGEST:
        msg = f"{spec} has too many parameters for 8 x 8 digits; use a smaller depth or width"
        raise ModelError(msg)
    return CifarResNet(
        depth,
        width=stage_width,
        in_channels=channels,
        num_classes=num_classes,
        norm="group" if match["group_norm"] else "batch",
    )


def _build_torchvision(name: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a torchvision classification network without weights."""
    if image_shape[0] != 3:
        msg = f"torchvision:{name} takes RGB images, these have {image_shape[0]} channel(s)"
        raise ModelError(msg)
    arguments = TORCHVISION_ARGUMENTS.get(name, {})
    if name.startswith("vit_"):
        arguments = {"image_size": image_shape[1]}
    elif name == "maxvit_t":
        arguments = {"input_size": image_shape[1:]}
    try:
        model: nn.Module = torchvision.models.get_model(
            name, weights=None, num_classes=num_classes, **arguments
        )
    except Exception as error:
        msg = f"torchvision:{name} cannot be built for images {image_shape}: {one_line(error)}"
        raise ModelError(msg) from error
    return model


def _build_timm(spec: str, num_classes: int, image_shape: tuple[int, int, int]) -> nn.Module:
    """Build a network of timm without weights; those that fix their images get the side."""
    channels, height, width = image_shape
    arguments: dict[str, Any] = {"num_classes": num_classes, "in_chans": channels}
    model = create_timm(spec, **arguments)
    if getattr(getattr(model, "patch_embed", None), "img_size", None) not in (
        None,
        (height, width),
    ):
        model = create_timm(spec, **arguments, img_size=(height, width))
    return model


def _build_from_factory(spec: str, num_classes: int) -> nn.Module:
    """Call the user's ``package.module:factory``."""
    factory = find_factory(spec)
    with as_one_line(spec, ModelError):
        arguments = {"num_classes": num_classes} if _accepts_num_classes(factory) else {}
        model = factory(**arguments)
    if not isinstance(model, nn.Module):
        msg = f"{spec} returned {type(model).__name__}; it must return a torch.nn.Module"
        raise ModelError(msg)
    return model


def _accepts_num_classes(factory: Callable[..., Any]) -> bool:
    """Tell whether the factory takes ``num_classes=`` by name or by ``**kwargs``."""
    if getattr(factory, "__init__", None) is nn.Module.__init__:
        return False  # a class without its own constructor: Module's **kwargs refuse all
    parameters = inspect.signature(factory).parameters
    named = parameters.get("num_classes")
    if named is not None:
        return named.kind is not inspect.Parameter.POSITIONAL_ONLY
    return any(item.kind is inspect.Parameter.VAR_KEYWORD for item in parameters.values())
