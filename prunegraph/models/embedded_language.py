"""The embedded default language model: a small Llama that reads bytes."""

from typing import Any

from torch import nn

from prunegraph.core.seeding import seeded
from prunegraph.models.pretrained import transformers

WINDOW = 128
"""Bytes that it takes at once."""

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build_embedded(seed: int = 0) -> nn.Module:
    """Return the network with fresh weights, 201,280 parameters, fixed by a seed.

    Raises:
        ConfigError: transformers is not installed.
    """
    library = transformers()
    config = library.LlamaConfig(
        **SIZES,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with seeded(seed):
        network: nn.Module = library.LlamaForCausalLM(config)
    return network


def byte_tokenizer() -> Any:
    """Return a tokenizer of transformers whose tokens are the bytes of UTF-8.

    Raises:
        ConfigError: transformers is not installed.
    """
    library = transformers()
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's letters for bytes
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    letters |= {chr(256 + place): byte for place, byte in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return library.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
