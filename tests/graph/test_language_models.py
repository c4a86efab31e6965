"""Language models of transformers, an optional dependency, are pruned and go on generating."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegraph.graph import StructureGraph, analyse
from prunegraph.graph.apply import apply_mask, zero_mask

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = 99
"""The word in whose place a part of an image goes."""

Inputs = dict[str, Any]
Case = tuple[Any, Inputs]


def causal(kind: str, **sizes: Any) -> Case:
    config = getattr(transformers, f"{kind}Config")(**SIZES | sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config), {"input_ids": WORDS}


def mamba(kind: str) -> Case:
    own = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "attn_layer_indices": [1]}
    return causal(kind, num_key_value_heads=2, **own)


def words_and_image(network: Any, **inputs: Any) -> Case:
    words = WORDS.clone()
    words[0, 2:6] = IMAGE
    return network, {"input_ids": words, **inputs}


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def llava() -> Case:
    vision = transformers.CLIPVisionConfig(**VISION, image_size=16, patch_size=8)
    text = transformers.LlamaConfig(**SIZES)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4
    )
    network = transformers.LlavaForConditionalGeneration(config)
    return words_and_image(network, pixel_values=torch.randn(1, 3, 16, 16))


def gemma3() -> Case:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=16, patch_size=4),
        text_config=transformers.Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=16),
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    network = transformers.Gemma3ForConditionalGeneration(config)
    return words_and_image(network, pixel_values=torch.randn(1, 3, 16, 16))


def smolvlm() -> Case:
    config = transformers.SmolVLMConfig(
        vision_config=transformers.SmolVLMVisionConfig(**VISION, image_size=32, patch_size=8),
        text_config=transformers.LlamaConfig(**SIZES, pad_token_id=0),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    network = transformers.SmolVLMForConditionalGeneration(config)
    return words_and_image(network, pixel_values=torch.randn(1, 1, 3, 32, 32))


def t5(d_kv: int) -> Case:
    sizes = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(
        **sizes, d_kv=d_kv, vocab_size=128, decoder_start_token_id=0, eos_token_id=None
    )
    network = transformers.T5ForConditionalGeneration(config)
    return network, {"input_ids": WORDS, "decoder_input_ids": WORDS[:, :8]}


CASES: dict[str, tuple[Callable[[], Case], set[int]]] = {
    "Llama": (lambda: causal("Llama"), {4, 64, 128}),
    "Llama, grouped queries": (lambda: causal("Llama", num_key_value_heads=2), {2, 64, 128}),
    "Llama, one head of keys": (lambda: causal("Llama", num_key_value_heads=1), {4, 64, 128}),
    "the same, written out": (
        lambda: causal("Llama", num_key_value_heads=1, attn_implementation="eager"),
        {4, 64, 128},
    ),
    "Gemma": (lambda: causal("Gemma", num_key_value_heads=1, head_dim=16), {4, 64, 128}),
    "Qwen3": (lambda: causal("Qwen3", num_key_value_heads=2, head_dim=16), {2, 64, 128}),
    "Phi3": (lambda: causal("Phi3", num_key_value_heads=2, pad_token_id=0), {2, 64, 128}),
    "Falcon": (lambda: causal("Falcon", multi_query=True, ffn_hidden_size=128), {4, 64, 128}),
    "Bamba": (lambda: mamba("Bamba"), {2, 8, 64, 128}),
    "T5": (lambda: t5(16), {4, 64, 128}),
    "T5, narrow heads": (lambda: t5(8), {4, 64, 128}),
    "LLaVA": (llava, {4, 32, 64, 128}),
    "Gemma 3": (gemma3, {2, 4, 32, 64, 128}),
    "SmolVLM": (smolvlm, {4, 32, 64, 128}),
}


class Logits(nn.Module):
    """Returns these alone: what else a network returns, as what it makes of images, would stay."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, **inputs: Any) -> Tensor:
        logits: Tensor = self.network(**inputs).logits
        return logits


def half(graph: StructureGraph) -> Any:
    rng, keep = np.random.default_rng(0), graph.dense_mask().keep.copy()
    for group in graph.groups:
        if not group.frozen:
            keep[rng.permutation(group.units)[: group.units.size // 2]] = False
    return graph.mask(keep)


def written(model: Logits, inputs: Inputs) -> Tensor:
    generate: Callable[..., Tensor] = model.network.generate  # type: ignore[assignment]
    own = {name: value for name, value in inputs.items() if not name.startswith("decoder")}
    return generate(**own, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("name", CASES)
def test_a_pruned_model_generates_what_the_masked_one_does(name: str) -> None:
    torch.manual_seed(0)
    make, sizes = CASES[name]
    network, inputs = make()
    model = Logits(network).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)  # so that words differ
    graph = analyse(model, {**inputs, "use_cache": False})
    assert {group.units.size for group in graph.groups if not group.frozen} == sizes
    mask = half(graph)
    small, silent = (cut(model, graph, mask).eval() for cut in (apply_mask, zero_mask))
    assert isinstance(small, Logits)
    assert isinstance(silent, Logits)
    assert torch.equal(written(small, inputs), written(silent, inputs))
    if "pixel_values" in inputs or "decoder_input_ids" in inputs:
        return
    padded = {
        "input_ids": WORDS.view(2, 6),
        "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]]),
    }
    last = [each(**padded)[:, -1] for each in (small, silent)]
    torch.testing.assert_close(*last, rtol=1e-3, atol=1e-4)
