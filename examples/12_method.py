"""
Write a method
==============

A method is given a problem and returns a mask. The registered methods are written in the same way.
"""

import matplotlib.pyplot as plt
import torch

import prunegraph as pg
from prunegraph.data import load_dataset
from prunegraph.methods.method import Result
from prunegraph.models import build_model


class Product:
    """L1 times activation, or its square root times activation, whichever mask is better."""

    name = "product"

    def prune(self, problem):
        found = []
        for power in (0.5, 1.0):
            scores = problem.statistics["l1"] ** power * problem.statistics["activation_mean"]
            mask = problem.project(scores)  # the best scores [N] within the budget
            found.append((problem.evaluator.evaluate(mask).accuracy, power, mask))
        return Result(mask=max(found)[-1])


# %%
# ``pg.prune`` takes the object. On the command line it is ``prune FILE:Product``.

torch.manual_seed(0)
digits = load_dataset("digits")
model = build_model("digits_resnet8_w8", num_classes=10, image_shape=(1, 8, 8))
task = pg.tasks.image_classification(model, train=digits.train, search=digits.search)
pg.finetune(model, task, pg.FinetuneConfig(epochs=4, batch_size=32, peak_lr=0.1), seed=0)
results = {
    name: pg.prune(task, method, pg.Budget(keep_macs=0.25))
    for name, method in {"product": Product(), "l1/uniform": "l1/uniform"}.items()
}

# %%
# The widths differ, and so does the accuracy.

figure, axes = plt.subplots(layout="constrained")
for place, (name, result) in enumerate(results.items()):
    widths = result.report["pruned"]["widths"]
    label = f"{name}: {result.report['pruned']['score']:.1%}"
    axes.barh([n + 0.4 * place for n in range(len(widths))], widths.values(), 0.38, label=label)
axes.set_yticks(range(len(widths)), widths)
axes.set_xlabel("channels kept")
axes.legend(title="search accuracy", frameon=False)
