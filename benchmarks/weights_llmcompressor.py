"""One pruning by llm-compressor, for ``weights.py llmcompressor``: in an environment of its own.

It needs another transformers than the one that prunegraph is tested with, so prunegraph is not
imported here. Reads a folder with ``windows.npy`` ``[n, t]``; writes the weights that changed and
the seconds beside it.

    python benchmarks/weights_llmcompressor.py MODEL FOLDER SparseGPT|Wanda 0.5 0:0|2:4 [LAYERS]
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

MODIFIERS = {"SparseGPT": SparseGPTModifier, "Wanda": WandaPruningModifier}


def main() -> None:
    model_folder, folder, name, sparsity, structure, *layers = sys.argv[1:]
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    if layers:
        model.model.layers = model.model.layers[: int(layers[0])]
        model.config.num_hidden_layers = int(layers[0])
    before = {name: item.detach().clone() for name, item in model.named_parameters()}
    rows = np.load(Path(folder) / "windows.npy", allow_pickle=False)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": np.ones_like(rows)})
    recipe = MODIFIERS[name](
        sparsity=float(sparsity),
        mask_structure=structure,
        targets=["Linear"],
        ignore=["re:.*lm_head"],
    )
    cpu, wall = time.process_time(), time.perf_counter()
    oneshot(
        model=model,
        dataset=data,
        recipe=[recipe],
        max_seq_length=rows.shape[1],
        num_calibration_samples=len(rows),
        shuffle_calibration_samples=False,
    )
    found = {
        "cpu_seconds": time.process_time() - cpu,
        "wall_seconds": time.perf_counter() - wall,
        "versions": {each: version(each) for each in ("llmcompressor", "transformers", "torch")},
    }
    after = dict(model.named_parameters())
    changed = {
        name: after[name].detach().contiguous()
        for name, item in before.items()
        if name in after and not torch.equal(item, after[name])
    }
    save_file(changed, Path(folder) / "changed.safetensors")
    (Path(folder) / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
