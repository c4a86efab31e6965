import copy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from prunegraph.artefacts.export import SUFFIXES, export
from prunegraph.artefacts.export import export as export_function
from prunegraph.core.errors import ConfigError, ExportError
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import apply_mask

onnxruntime = pytest.importorskip("onnxruntime")
module = sys.modules[export_function.__module__]


@pytest.fixture
def pruned(
    digits_net: nn.Module, digits_graph: StructureGraph, make_mask: Callable[..., ChannelMask]
) -> nn.Module:
    return apply_mask(digits_net, digits_graph, make_mask(digits_graph, 0)).train()


EXAMPLE = torch.zeros(1, 1, 8, 8)


def reference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def test_onnx_gives_the_same_outputs_at_any_batch(pruned: nn.Module, tmp_path: Path) -> None:
    path = export(pruned, EXAMPLE, tmp_path / "net.onnx")
    assert pruned.training
    session = onnxruntime.InferenceSession(path.read_bytes())
    for batch in (1, 5):
        x = torch.randn(batch, 1, 8, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), reference(pruned, x))
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert b"prunegraph/models" not in path.read_bytes()  # nor any other path or line of code
    assert b"stack_trace" not in path.read_bytes()


def test_a_torch_program_gives_the_same_outputs(pruned: nn.Module, tmp_path: Path) -> None:
    path = export(pruned, EXAMPLE, tmp_path / "net.pt2", format="torch-export")
    x = torch.randn(5, 1, 8, 8)
    torch.testing.assert_close(torch.export.load(path).module()(x), reference(pruned, x))


def test_weights_alone_load_strictly(pruned: nn.Module, tmp_path: Path) -> None:
    path = export(pruned, EXAMPLE, tmp_path / "net.safetensors", format="safetensors")
    state = pruned.state_dict()
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.items())


def test_a_file_holds_what_it_is_told_about_the_network(pruned: nn.Module, tmp_path: Path) -> None:
    texts = {"mean": "[0.5]", "classes": '["é"]'}
    onnx = export(pruned, EXAMPLE, tmp_path / "net.onnx", metadata=texts)
    found = onnxruntime.InferenceSession(onnx).get_modelmeta().custom_metadata_map
    assert found.items() >= texts.items()
    program = export(pruned, EXAMPLE, tmp_path / "net.pt2", format="torch-export", metadata=texts)
    extra = dict.fromkeys(texts, "")
    torch.export.load(program, extra_files=extra)
    assert extra == texts
    weights = export(
        pruned, EXAMPLE, tmp_path / "net.safetensors", format="safetensors", metadata=texts
    )
    with safe_open(weights, "pt") as stream:
        assert stream.metadata() == texts


def test_tuples_and_mappings_are_exported(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.linear(left) - self.linear(right)

    left, right = torch.randn(2, 4), torch.randn(2, 4)
    for number, example in enumerate([(left, right), {"left": left, "right": right}]):
        path = export(Two(), example, tmp_path / f"{number}.onnx")
        session = onnxruntime.InferenceSession(path.read_bytes())
        assert [node.name for node in session.get_inputs()] == ["left", "right"]


@pytest.mark.parametrize("name", ["onnx", "torch-export", "safetensors"])
def test_a_file_that_computes_something_else_is_not_written(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    function = {"onnx": "_to_onnx", "torch-export": "_to_program", "safetensors": "_to_weights"}
    honest = getattr(module, function[name])

    def tampered(network: nn.Module, *args: object, **kwargs: object) -> object:
        changed = copy.deepcopy(network)
        with torch.no_grad():
            changed.fc.weight.mul_(1.01)
        return honest(changed, *args, **kwargs)

    monkeypatch.setattr(module, function[name], tampered)
    with pytest.raises(ExportError, match=f"{name} file's outputs differ"):
        export(pruned, EXAMPLE, tmp_path / f"net{SUFFIXES[name]}", format=name)
    assert list(tmp_path.iterdir()) == []


class Domain(nn.Module):
    """Takes positive numbers alone, and rules classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.log()).masked_fill(torch.arange(3) < 1, -torch.inf)


@pytest.mark.parametrize("name", ["onnx", "torch-export", "safetensors"])
def test_infinite_answers_and_inputs_of_a_domain_are_exported(tmp_path: Path, name: str) -> None:
    path = export(Domain(), torch.rand(2, 4) + 0.1, tmp_path / f"net{SUFFIXES[name]}", format=name)
    assert path.stat().st_size > 0


def test_a_literal_batch_size_needs_a_fixed_batch(tmp_path: Path) -> None:
    class Literal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).view(2, 3)

    with pytest.raises(ExportError, match=r"of Literal failed.*use dynamic_batch=False"):
        export(Literal(), torch.randn(2, 4), tmp_path / "net.onnx")
    assert list(tmp_path.iterdir()) == []
    path = export(Literal(), torch.randn(2, 4), tmp_path / "net.onnx", dynamic_batch=False)
    assert path.stat().st_size > 0


class Tokens(nn.Module):
    """Attends over tokens, some of them masked out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(20, 8), nn.Embedding(64, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.layer(x, src_key_padding_mask=mask).mean(1))


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
@pytest.mark.parametrize("kind", ["images", "tokens"])
def test_further_axes_may_be_left_open(tmp_path: Path, name: str, kind: str) -> None:
    torch.manual_seed(0)
    path = tmp_path / f"net{SUFFIXES[name]}"
    model: nn.Module
    if kind == "images":
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)
        )
        sizes = [(16, 16), (24, 40)]
        example, other = ((torch.randn(1, 3, *size),) for size in sizes)
        axes = (2, 3)
    else:
        model, axes = Tokens(), (1,)
        example, other = (
            (torch.randint(20, (2, length)), torch.arange(length).expand(2, length) > length - 3)
            for length in (6, 11)
        )
    expected = [reference_of(model, inputs) for inputs in (example, other)]
    export(model, example, path, format=name, dynamic_axes=axes)
    for inputs, wanted in zip((example, other), expected, strict=True):
        if name == "onnx":
            session = onnxruntime.InferenceSession(path.read_bytes())
            names = [node.name for node in session.get_inputs()]
            feed = {key: tensor.numpy() for key, tensor in zip(names, inputs, strict=True)}
            found = torch.from_numpy(session.run(None, feed)[0])
        else:
            found = torch.export.load(path).module()(*inputs)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def reference_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return model.eval()(*inputs)


def test_an_axis_that_the_network_fixes_is_named(tmp_path: Path) -> None:
    fixed = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(ExportError, match=r"if it fixes one of the axes \[1\], leave that out"):
        export(fixed, torch.randn(1, 16), tmp_path / "net.onnx", dynamic_axes=(1,))
    with pytest.raises(ConfigError, match=r"dynamic_axes holds 2: name axes from 1 to 1"):
        export(fixed, torch.randn(1, 16), tmp_path / "net.onnx", dynamic_axes=(2,))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_says_how_to_install_it(
    pruned: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match="onnxruntime: pip install onnx onnxruntime onnxscript"):
        export(pruned, EXAMPLE, tmp_path / "net.onnx")


def test_an_unknown_format_lists_the_known_ones(pruned: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"onnx, torch-export, safetensors; .*save_sparse writes"):
        export(pruned, EXAMPLE, tmp_path / "net.xyz", format="xyz")


def test_a_file_of_another_kind_is_not_replaced(pruned: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"weights\.pt must end in \.onnx, as onnx files do"):
        export(pruned, EXAMPLE, path)
    assert path.read_text() == "mine"


class Unsteady(nn.Module):
    """Decides by its values, or adds noise."""

    def __init__(self, *, noise: bool) -> None:
        super().__init__()
        self.noise, self.linear = noise, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.noise:
            return x + torch.randn_like(x)
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("name", ["onnx", "torch-export"])
def test_what_cannot_be_exported_says_why_without_its_graph(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"net{SUFFIXES[name]}"
    with pytest.raises(ExportError, match="failed: Could not guard on data-dependent"):
        export(Unsteady(noise=False), torch.randn(2, 4), path, format=name)
    with pytest.raises(ExportError, match="Unsteady draws random numbers in eval mode"):
        export(Unsteady(noise=True), torch.randn(2, 4), path, format=name)
    assert capsys.readouterr() == ("", "")
    assert not path.exists()
