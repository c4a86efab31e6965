"""Small language models for tests; transformers, an optional dependency, is imported if needed."""

from typing import Any

import torch

TEXT = "".join(
    f"The {n} small words of a text {n * n % 97}, and {n % 7} more.\n" for n in range(99)
)
"""A few thousand bytes."""


def encode(text: str) -> list[int]:
    """Return the bytes of a text, as token numbers."""
    return list(text.encode())


def bos_tokenizer() -> Any:
    """Return a tokenizer of bytes that puts token 0 before a text, as Llama's and Gemma's do."""
    from tokenizers.processors import TemplateProcessing

    from prunegraph.models.embedded_language import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.convert_ids_to_tokens(0)
    begin = [(tokenizer.bos_token, 0)]
    template = TemplateProcessing(single=f"{tokenizer.bos_token} $A", special_tokens=begin)
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def tiny_llama(seed: int = 0, **sizes: Any) -> Any:
    """Return a Llama with fresh weights, of 256 tokens unless it is said otherwise."""
    import transformers

    given = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**given | sizes)).eval()


EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 4, "layer_types": ["full_attention"] * 2},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 8},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 4},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "num_key_value_heads": 4,
        "v_head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
    },
}
"""Families whose experts are one parameter of three axes, with what their configs need."""


def tiny_experts(family: str) -> Any:
    """Return a language model of such a family with fresh weights, of 256 tokens."""
    import transformers

    given = {
        "vocab_size": 256,
        "hidden_size": 16,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**given | EXPERTS[family])
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()
