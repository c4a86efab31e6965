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
