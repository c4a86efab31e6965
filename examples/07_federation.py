"""
A federation
============

Five clients keep their images. The server averages their weights and removes the smallest, so that
less and less is sent.
"""

import matplotlib.pyplot as plt
import torch

import prunegraph as pg
from prunegraph.data import load_dataset
from prunegraph.models import build_model

torch.manual_seed(0)
digits = load_dataset("digits")
model = build_model("digits_resnet8_w8_gn", num_classes=10, image_shape=(1, 8, 8))
task = pg.tasks.image_classification(model, train=digits.train, search=digits.search)

# %%
# ``dirichlet`` deals the classes out unevenly. ``FedAvg`` is the same without pruning.

settings = {"clients": 5, "rounds": 8, "epochs": 1, "dirichlet": 0.5}
results = {
    "FedMap, 90 % zeros": pg.prune(task, pg.methods.FedMap(**settings), pg.Budget(sparsity=0.9)),
    "FedAvg, dense": pg.prune(task, pg.methods.FedAvg(**settings), pg.Budget(sparsity=0.9)),
}
for name, result in results.items():
    print(f"{name}: accuracy {result.report['pruned']['score']:.1%}")

# %%
# Bytes are those of the messages.

figure, axes = plt.subplots(layout="constrained")
for place, (name, result) in enumerate(results.items()):
    sent = [result.report[way] / 1e6 for way in ("bytes_up", "bytes_down")]
    axes.bar([place / 3, 1 + place / 3], sent, 0.3, label=name)
axes.set_xticks([1 / 6, 7 / 6], ["to the server", "to the clients"])
axes.set_ylabel("sent in eight rounds, MB")
figure.legend(loc="outside upper center", ncols=2, frameon=False)
