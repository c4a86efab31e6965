"""
A language model
================

Five ways to make zeros in a small Llama that reads bytes. It has learned one page by heart; the
English text that comes with Python is the default, and takes minutes.
"""

import matplotlib.pyplot as plt
from sklearn.datasets import load_digits

import prunegraph as pg
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer

page = [load_digits().DESCR]
model, text = build_embedded(seed=0), {"calibration": page, "search": page}
task = pg.tasks.causal_lm(model, byte_tokenizer(), **text, window=64, calibration_tokens=None)
settings = {"optimizer": "adamw", "peak_lr": 3e-3, "autocast": False}
pg.finetune(model, task, pg.FinetuneConfig(epochs=40, batch_size=4, **settings), seed=0)

# %%
# Of each four consecutive weights two become zero, a pattern that GPUs know.

perplexity = {"dense": task.score(model).value}
for method in ("magnitude", "wanda", "sparsegpt", "thanos", "apt"):
    result = pg.prune(task, method, pg.Budget(pattern="2:4"))
    perplexity[method] = result.report["pruned"]["score"]
result.summary()

# %%
# Lower is better. Three of the methods change the weights that stay.

bars = plt.bar(perplexity.keys(), perplexity.values())
plt.bar_label(bars, fmt="%.1f")
plt.ylabel("perplexity a byte")
