"""
Compare methods
===============

Accuracy against multiply-adds, for one network and three heuristics, without a fine-tune. On the
command line ``compare`` does it with seeds, searches, fine-tunes, controls and a verdict.
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

# %%
# Every point is a network that was cut out, reconstructed and scored on images that no training has
# seen.

shares = (0.5, 0.3, 0.15)
dense = 100 * task.score(model).value
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for method in ("taylor/uniform", "l1/uniform", "random/uniform"):
    results = [pg.prune(task, method, pg.Budget(keep_macs=share)) for share in shares]
    accuracies = [100 * result.report["pruned"]["score"] for result in results]
    axes.plot([100, *(100 * share for share in shares)], [dense, *accuracies], "o-", label=method)

axes.set(xlabel="multiply-adds kept, %", ylabel="search accuracy, %")
axes.legend(frameon=False)
