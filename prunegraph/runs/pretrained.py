"""Pruned networks of transformers in folders that need no prunegraph."""

import re
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from prunegraph.artefacts.masked import save_masked
from prunegraph.artefacts.pruned import PrunedInfo, save_pruned
from prunegraph.core.errors import ModelError
from prunegraph.core.files import write_bytes
from prunegraph.core.masks import ChannelMask
from prunegraph.graph import unwrap
from prunegraph.models import resized_network
from prunegraph.runs.result import PruneResult, compared

CARD = "README.md"

OPENED = """```python
from transformers import {name}

model = {name}.from_pretrained(".")
```"""

REBUILT = """This is a `load_pruned` folder: {reason}.

```python
import prunegraph as pg

network = pg.load_pruned(".", build_model, example_inputs).model
```

`build_model` makes the dense network, `example_inputs` are of the shape {shape}."""


def save_pretrained(result: PruneResult, folder: Path | str, *, tokenizer: Any = None) -> None:
    """Write a pruned network of transformers as a folder that ``from_pretrained`` reads.

    It holds the weights, the config with the new widths, the tokenizer's files, and a model card
    with costs and scores. ``AutoModel*.from_pretrained(folder)`` gives equal outputs, and asks for
    transformers alone. A config has one width for all layers of a kind: prune with
    ``Budget(uniform=True)``. Where it cannot hold the network, a warning says why, and the folder
    is one for ``load_pruned``.

    Args:
        result: what ``prune`` has returned; its network may be fine-tuned since.
        folder: where to write; made if missing.
        tokenizer: the folder that holds it, or itself; default: that of the task.

    Raises:
        ArtefactError: a file cannot be written.
    """
    folder, task, reason = Path(folder), result.task, None
    if tokenizer is None:
        folder_of, own = (getattr(task, name, None) for name in ("tokenizer_folder", "tokenizer"))
        tokenizer = folder_of or own or False
    model, shape = unwrap(result.model), _shape(task.example_inputs)
    try:
        model = resized_network(model, task.example_inputs)
    except ModelError as error:
        reason, tokenizer = str(error), None
        warnings.warn(f"{reason}: {folder} is a folder for load_pruned", stacklevel=2)
    info = PrunedInfo(arch=task.name, example_shape=shape, extra={"task": task.kind})
    if isinstance(result.mask, ChannelMask):
        assert result.graph is not None  # of channels
        save_pruned(
            folder,
            model=model,
            mask=result.mask,
            graph=result.graph,
            info=info,
            pretrained=tokenizer,
        )
    else:
        save_masked(folder, model=model, mask=result.mask, info=info, pretrained=tokenizer)
    opened = OPENED.format(name=type(model).__name__)
    if reason is not None:
        opened = REBUILT.format(reason=_plain(reason), shape=list(shape))
    write_bytes(folder / CARD, model_card(result, opened).encode())


def _shape(example_inputs: Any) -> tuple[int, ...]:
    """Return the shape of the first tensor that a forward takes."""
    first = next(leaf for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor))
    return tuple(first.shape)


def _plain(text: object) -> str:
    """Return a text for Markdown that makes no line, tag, link or cell of its own."""
    return re.sub(r"([\\`*\[\]<>|#!~&])", r"\\\1", " ".join(str(text).split()))


def _code(text: object) -> str:
    """Return a text as a span of code, between more backticks than it holds."""
    words = " ".join(str(text).split())
    fence = "`" * (max(map(len, re.findall("`+", words)), default=0) + 1)
    space = " " if words[:1] == "`" or words[-1:] == "`" else ""
    return f"{fence}{space}{words}{space}{fence}"


def model_card(result: PruneResult, opened: str) -> str:
    """Return the model card: costs, scores, method, and how to open the folder.

    Args:
        result: what was pruned.
        opened: how the folder is opened.
    """
    report = result.report
    told = [f"| {' | '.join(map(_plain, row))} |" for row in compared(report)]
    budget = ", ".join(f"{name}={value}" for name, value in report["budget"].items())
    widths = sorted(set(report["pruned"].get("widths", {}).items()))
    kept = "\n".join(f"- {_code(name)}: {width}" for name, width in widths)
    return f"""---
library_name: transformers
tags:
- pruned
- prunegraph
---
# {_plain(result.task.name)}, pruned

| | dense | pruned | left |
|---|--:|--:|--:|
{chr(10).join(told)}

Made by prunegraph: method {_code(report["method"])},
{_code(f"Budget({budget})")}, {report["networks_evaluated"]} networks run on the way.
The scores are those before any fine-tune.

## Opening it

{opened}

## Kept units

{kept or "Single weights became zero; all layers have their widths."}
"""
