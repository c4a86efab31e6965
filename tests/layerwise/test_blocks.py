"""Walks by blocks: the order, what is re-fed, and what an interrupted walk keeps."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prunegraph.core.errors import ArtefactError, ConfigError
from prunegraph.layerwise import blocks as blocks_module
from prunegraph.layerwise import reads as reads_module
from prunegraph.layerwise.blocks import BlockWalk, Matrix
from prunegraph.layerwise.order import Segment, find_segments
from prunegraph.layerwise.reads import read_rows
from prunegraph.layerwise.weights import prunable_weights
from support.language import tiny_llama

TOKENS = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "intermediate_size": 32}


def language_model(name: str) -> nn.Module:
    """A language model of three blocks, with fresh weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    groups = {"num_key_value_heads": 2}
    gpt2 = {"n_embd": 16, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}
    state = {"state_size": 8}
    heads = {**state, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    configs: dict[str, Callable[[], Any]] = {
        "Llama": lambda: transformers.LlamaConfig(**TOKENS, **HEADS, **groups),
        "Qwen2": lambda: transformers.Qwen2Config(**TOKENS, **HEADS, **groups),
        "Mistral": lambda: transformers.MistralConfig(**TOKENS, **HEADS, **groups),
        "GPT2": lambda: transformers.GPT2Config(vocab_size=64, **gpt2),
        "OPT": lambda: transformers.OPTConfig(
            **TOKENS, num_attention_heads=4, ffn_dim=32, word_embed_proj_dim=16
        ),
        "Mamba": lambda: transformers.MambaConfig(**TOKENS, **state),
        "Mamba2": lambda: transformers.Mamba2Config(**TOKENS, **heads),
    }
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model: nn.Module = getattr(transformers, head)(configs[name]()).eval()
    return model


class ToyEncoder(nn.Module):
    """A stem, a chain of residual blocks, a head; the blocks lie in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.ReLU(inplace=True))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Parallel(nn.Module):
    """Branches that all read the same: a list that is no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(sum(branch(x) for branch in self.branches))


def ids(rows: int = 6, length: int = 12) -> Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(0))


def run_model(model: nn.Module, batch: Tensor) -> Any:
    if batch.is_floating_point():
        return model(batch)
    return model(input_ids=batch, use_cache=False)


def segments(model: nn.Module, batch: Tensor, blocks: str | None = None) -> list[Segment]:
    weights = prunable_weights(model)
    return find_segments(model, weights, lambda: run_model(model, batch), blocks=blocks)


def halve(matrix: Matrix) -> tuple[Tensor, Tensor]:
    """Remove the odd inputs, and scale by what the matrix reads."""
    keep = torch.zeros_like(matrix.weight, dtype=torch.bool)
    keep[:, ::2] = True
    size = torch.stack([item.norms.mean() for item in matrix.hessians]).mean()
    return matrix.weight * (1.0 + 0.1 * size.tanh()), keep


def walked(model: nn.Module, batches: list[Tensor], **options: Any) -> dict[str, Tensor]:
    walk = BlockWalk(model, prunable_weights(model), batches, run_model, **options)
    return walk.run(halve)


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Mistral", "GPT2", "OPT", "Mamba", "Mamba2"])
def test_decoder_blocks_of_every_family_are_a_chain(name: str) -> None:
    model = language_model(name)
    (chain,) = segments(model, ids())
    assert len(chain.blocks) == 3
    assert chain.place is not None
    seen: list[str] = []

    def note(matrix: Matrix) -> tuple[Tensor, Tensor]:
        seen.append(matrix.name)
        assert matrix.seen, f"{matrix.name} was not seen"
        return halve(matrix)

    weights = prunable_weights(model)
    keep = BlockWalk(model, weights, [ids(), ids(2)], run_model).run(note)
    assert sorted(seen) == sorted(weights) == sorted(keep)
    if name == "Mamba":
        assert any("dt_proj" in item for item in seen)


def test_encoders_and_their_heads_run_in_order() -> None:
    found = segments(ToyEncoder(), torch.randn(2, 3, 6, 6))
    assert [list(item.blocks) for item in found] == [
        ["stem"],
        ["blocks.0", "blocks.1", "blocks.2"],
        ["head"],
    ]


def test_branches_are_no_chain() -> None:
    found = segments(Parallel(), torch.randn(4, 6))
    assert [item.place for item in found] == [None, None, None]


def test_blocks_can_be_named() -> None:
    found = segments(Parallel(), torch.randn(4, 6), blocks="branches.*")
    assert [list(item.blocks) for item in found] == [["branches.0"], ["branches.1"], ["head"]]
    with pytest.raises(ConfigError, match=r"blocks='layers\.\*' names no module"):
        segments(Parallel(), torch.randn(4, 6), blocks="layers.*")


@pytest.mark.parametrize("make", [ToyEncoder, lambda: tiny_llama(vocab_size=64)])
def test_a_chain_gives_what_whole_runs_give(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    batches = [torch.randn(4, 3, 6, 6)] if isinstance(model, ToyEncoder) else [ids(), ids(2)]
    other = make().eval()
    other.load_state_dict(model.state_dict())
    walked(model, batches)
    monkeypatch.setattr(blocks_module, "STATES", -1)
    walked(other, batches)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], msg=name)


def test_each_block_reads_what_the_changed_ones_before_return() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    batch, grams = torch.randn(20, 4), {}

    def zero(matrix: Matrix) -> tuple[Tensor, Tensor]:
        grams[matrix.name] = matrix.hessians[0].norms
        return matrix.weight * 0.0, torch.ones_like(matrix.weight, dtype=torch.bool)

    BlockWalk(model, prunable_weights(model), [batch], run_model).run(zero)
    bias = model[0].bias.detach().relu()
    torch.testing.assert_close(grams["2.weight"], bias)


def test_projections_of_one_input_share_a_hessian() -> None:
    model, found = tiny_llama(vocab_size=64), {}

    def note(matrix: Matrix) -> tuple[Tensor, Tensor]:
        found[matrix.name] = matrix.hessians[0]
        return halve(matrix)

    BlockWalk(model, prunable_weights(model), [ids(), ids(3)], run_model).run(note)
    layer = "model.layers.0"
    q, k = (found[f"{layer}.self_attn.{name}_proj.weight"] for name in "qk")
    gate, up = (found[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up"))
    assert q is k
    assert gate is up is not q


class Loop(nn.Module):
    """Two layers that read one tensor first; ``more`` of them reads another after it."""

    def __init__(self, more: str) -> None:
        super().__init__()
        self.first, self.second, self.more = nn.Linear(4, 4), nn.Linear(4, 4), more

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) + self.second(x)
        z: Tensor = self.get_submodule(self.more)(y)
        return z


@pytest.mark.parametrize("more", ["first", "second"])
def test_layers_that_read_one_tensor_of_several_have_hessians_of_their_own(more: str) -> None:
    torch.manual_seed(0)
    block, batches = Loop(more), [torch.randn(8, 4) for _ in range(2)]
    found: dict[str, Tensor] = {}

    def note(matrix: Matrix) -> tuple[Tensor, Tensor]:
        found[matrix.name.partition(".")[0]] = matrix.hessians[0].norms.square()
        return matrix.weight, torch.ones_like(matrix.weight, dtype=torch.bool)

    model = nn.Sequential(block)
    walk = BlockWalk(model, prunable_weights(model), batches, run_model, blocks="0")
    walk.run(lambda matrix: note(replace(matrix, name=matrix.name.removeprefix("0."))))
    x = torch.cat(batches)
    with torch.no_grad():
        y = block.first(x) + block.second(x)
    once, twice = (rows.square().mean(0) for rows in (x, torch.cat([x, y])))
    other = "second" if more == "first" else "first"
    assert torch.allclose(found[more], twice)
    assert torch.allclose(found[other], once)


def test_a_convolution_that_is_called_by_keyword_is_seen() -> None:
    class Named(nn.Conv2d):
        def __call__(self, x: Tensor) -> Any:
            return super().__call__(input=x)

    model = nn.Sequential(Named(3, 4, 3))
    walk = BlockWalk(model, prunable_weights(model), [torch.randn(2, 3, 8, 8)], run_model)
    walk.run(halve)
    assert walk.unseen == []


def test_a_layer_that_does_not_run_is_told() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.unused = nn.Linear(4, 4)  # type: ignore[assignment]
    model.forward = lambda x: model[1](model[0](x))  # type: ignore[method-assign]
    walk = BlockWalk(model, prunable_weights(model), [torch.randn(8, 4)], run_model)
    keep = walk.run(halve)
    assert walk.unseen == ["unused.weight"]
    assert "unused.weight" in keep


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, padding=1, stride=2),
        nn.Conv2d(4, 6, (1, 3), dilation=2, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 6, 3, groups=2),
        nn.Conv1d(4, 6, 3, padding=1),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
        nn.Linear(4, 6),
    ],
)
def test_rows_times_the_matrix_are_outputs(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reads_module, "POSITIONS", 10**6)
    layout = next(iter(prunable_weights(layer).values()))
    dims = len(layout.shape) - 2
    inputs = torch.randn(3, 4) if dims == 0 else torch.randn(3, 4, *[7] * dims)
    rows = read_rows(layer, layout, inputs, torch.Generator())  # [G, S, B]
    matrix = layout.matrix(layer.weight.detach()).unflatten(0, (layout.groups, -1))
    found = (rows @ matrix.transpose(1, 2)).transpose(0, 1).flatten(1)  # [S, C]
    bare = layer(inputs) - layer.bias.detach().reshape(-1, *[1] * dims)
    outputs = bare.flatten(2).movedim(1, 2).flatten(0, 1) if dims else bare
    assert found.shape == outputs.shape
    torch.testing.assert_close(found.norm(dim=0), outputs.norm(dim=0), rtol=1e-4, atol=1e-5)


def test_a_convolution_is_seen_at_other_positions_in_each_batch() -> None:
    image = torch.arange(256.0).reshape(1, 1, 16, 16) / 256.0  # the same in each batch
    model = nn.Sequential(nn.Conv2d(1, 2, 1))
    found: list[float] = []

    def note(matrix: Matrix) -> tuple[Tensor, Tensor]:
        found.append(float(matrix.hessians[0].norms.square()))
        return matrix.weight, torch.ones_like(matrix.weight, dtype=torch.bool)

    BlockWalk(model, prunable_weights(model), [image] * 64, run_model).run(note)
    assert found == pytest.approx([float(image.square().mean())], rel=0.03)


def test_an_interrupted_walk_goes_on_to_the_same_network(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return tiny_llama(vocab_size=64, num_hidden_layers=3)

    whole, half = make(), make()
    expected = walked(whole, [ids()])
    changed = 0

    def stop(matrix: Matrix) -> tuple[Tensor, Tensor]:
        nonlocal changed
        changed += 1
        if changed > 10:  # in the second block
            raise KeyboardInterrupt
        return halve(matrix)

    options: dict[str, Any] = {"folder": tmp_path, "identity": {"method": "halve"}}
    walk = BlockWalk(half, prunable_weights(half), [ids()], run_model, **options)
    with pytest.raises(KeyboardInterrupt):
        walk.run(stop)
    assert [file.name for file in sorted(tmp_path.glob("block-*"))] == ["block-0000.safetensors"]
    again = make()
    keep = walked(again, [ids()], **options)
    assert all(torch.equal(keep[name], bits) for name, bits in expected.items())
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_folder_of_another_walk_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    walked(model, [torch.randn(8, 4)], folder=tmp_path, identity={"budget": 1})
    with pytest.raises(ArtefactError, match="give another folder"):
        walked(model, [torch.randn(8, 4)], folder=tmp_path, identity={"budget": 2})


def test_progress_is_told_block_by_block() -> None:
    told: list[tuple[int, int]] = []
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    walked(model, [torch.randn(8, 4)], progress=lambda done, all_: told.append((done, all_)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_a_weight_that_a_function_multiplies_by_is_seen() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(x, self.one.weight)
            return self.two.weight @ hidden.transpose(-1, -2)

    model = Functional()
    walk = BlockWalk(model, prunable_weights(model), [torch.randn(2, 8, 4)], run_model)
    walk.run(halve)
    assert walk.unseen == []


@pytest.mark.parametrize("bfloat16", [True, False])
def test_blocks_run_in_the_precision_of_the_network(bfloat16: bool) -> None:
    model, seen = tiny_llama(vocab_size=64), set()
    last = model.get_submodule("model.layers.1.mlp.down_proj")
    last.register_forward_hook(lambda _, __, outputs: seen.add(outputs.dtype))

    def forward(network: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            run_model(network, batch)

    BlockWalk(model, prunable_weights(model), [ids()], forward).run(halve)
    assert seen == {torch.bfloat16 if bfloat16 else torch.float32}


@pytest.mark.parametrize("width", [6, 700])
def test_statistics_are_float32_where_the_network_is_not(width: int) -> None:
    """Neither bfloat16 of the forward around them nor columns by parts may change them."""
    model, found = nn.Sequential(nn.Linear(width, 3)), {}
    batch = torch.randn(50, width, generator=torch.Generator().manual_seed(0))

    def note(matrix: Matrix) -> tuple[Tensor, Tensor]:
        found[matrix.name] = matrix.hessians[0].with_damping(1e-9).matrix
        return halve(matrix)

    def forward(network: nn.Module, batch: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            network(batch)

    BlockWalk(model, prunable_weights(model), [batch], forward).run(note)
    (own,) = found.values()
    torch.testing.assert_close(own, batch.T @ batch / 50, rtol=1e-4, atol=1e-5)
