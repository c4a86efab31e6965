"""
Masks drawn at random
=====================

Six masks are drawn for each sparsity, and trained for a few steps. The best goes on.
"""

import matplotlib.pyplot as plt
import torch

import prunegraph as pg
from prunegraph.data import load_dataset
from prunegraph.models import build_model

torch.manual_seed(0)
digits = load_dataset("digits")
model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
task = pg.tasks.image_classification(model, train=digits.train, search=digits.search)
pg.finetune(model, task, pg.FinetuneConfig(epochs=4, batch_size=32, peak_lr=0.1), seed=0)

method = pg.methods.Randomized(candidates=6, early=4, steps=12)
result = pg.prune(task, method, pg.Budget(sparsity=0.9))
result.summary()

# %%
# In the last level all six are trained to the end. This shows whether the loss after four steps
# tells which is best after twelve.

selection = result.report["selection"]
figure, axes = plt.subplots(layout="constrained")
axes.scatter(selection["early"][-1], selection["final"])
axes.set(
    xlabel="loss after four steps",
    ylabel="loss after twelve",
    title=f"rank correlation {selection['rank_correlation']:.2f}",
)
