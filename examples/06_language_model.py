"""
A language model
================

Five ways to make zeros in a small Llama that reads bytes. It learns from a part of the text that
comes with Python, for a few seconds; ``prunegraph.training.embedded`` trains it properly.
"""

import matplotlib.pyplot as plt

import prunegraph as pg
from prunegraph.models.embedded_language import build_embedded, byte_tokenizer

model, sizes = build_embedded(seed=0), {"window": 128, "calibration_tokens": 65_536}
task = pg.tasks.causal_lm(model, byte_tokenizer(), **sizes)
recipe = pg.FinetuneConfig(epochs=1, batch_size=4, optimizer="adamw", peak_lr=4e-3, autocast=False)
pg.finetune(model, task, recipe, seed=0)

# %%
# Of each four consecutive weights two become zero, a pattern that GPUs know. 4,096 tokens of text
# say which.

task = pg.tasks.causal_lm(model, byte_tokenizer(), window=128, calibration_tokens=4096)
perplexity = {"dense": task.score(task.model).value}
for method in ("magnitude", "wanda", "sparsegpt", "thanos", "apt"):
    result = pg.prune(task, method, pg.Budget(pattern="2:4"))
    perplexity[method] = result.report["pruned"]["score"]
result.summary()

# %%
# Lower is better.

plt.bar(perplexity.keys(), perplexity.values())
plt.ylabel("perplexity a byte, search text")
