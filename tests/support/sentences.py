"""A tiny encoder of transformers, and tables of sentences that it can learn."""

import random
from pathlib import Path
from typing import Any

import torch

GOOD, BAD = ("fine", "warm", "bright"), ("poor", "cold", "dull")
OTHERS = ("the", "film", "is", "a", "very", "short", "story", "of", "two", "friends")
WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *OTHERS)


def tiny_tokenizer() -> Any:
    """Return a tokenizer of transformers whose tokens are words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokens = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_encoder(seed: int = 0, outputs: int | None = None, **sizes: Any) -> Any:
    """Return a BERT with fresh weights; with a number of outputs a classifier of sequences."""
    import transformers

    given = {
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    torch.manual_seed(seed)
    if outputs is None:
        return transformers.BertModel(transformers.BertConfig(**given | sizes)).eval()
    config = transformers.BertConfig(**given | sizes, num_labels=outputs)
    return transformers.BertForSequenceClassification(config).eval()


def save_encoder(folder: Path, model: Any = None) -> Path:
    """Write a ``from_pretrained`` folder of an encoder and its tokenizer; return it."""
    (tiny_encoder() if model is None else model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def sentence(label: int, generator: random.Random) -> str:
    """Return words, one of which tells the class."""
    words = generator.choices(OTHERS, k=generator.randint(2, 8))
    words.insert(generator.randrange(len(words)), generator.choice((BAD, GOOD)[label]))
    return " ".join(words)


def write_table(path: Path, *, pairs: bool = False, numbers: bool = False, **sizes: int) -> Path:
    """Write a table; of pairs label 1 says that both sentences are of one class; return it."""
    generator = random.Random(0)
    lines = ["\t".join(["split", "label", "sentence1", "sentence2"][: 3 + pairs])]
    for split, count in {"train": 256, "search": 64, "dev": 64, **sizes}.items():
        for number in range(count):
            classes = [number % 2, generator.randrange(2)]
            texts = [sentence(each, generator) for each in classes[: 1 + pairs]]
            label = int(classes[0] == classes[1]) if pairs else classes[0]
            lines.append("\t".join([split, f"{label}.5" if numbers else str(label), *texts]))
    path.write_text("\n".join(lines) + "\n")
    return path
