"""
Your own network, data and loop
===============================

A regression on scikit-learn's diabetes data. prunegraph needs batches, a loss and a score.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_diabetes
from sklearn.metrics import r2_score
from torch import nn

import prunegraph as pg

torch.manual_seed(0)
inputs, target = (torch.tensor(item).float() for item in load_diabetes(return_X_y=True))
inputs, target = 20 * inputs, ((target - target.mean()) / target.std())[:, None]
batches, unseen = list(zip(inputs.split(32), target.split(32), strict=True))[:-4], inputs[320:]


class Regressor(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(10, 64), nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, inputs):
        hidden = self.first(inputs).relu()
        return self.out(hidden + self.second(hidden).relu())  # joins first and second


def loss(network, batch):
    return nn.functional.mse_loss(network(batch[0]), batch[1])


def train(network, epochs):
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.1)
    for batch in batches * epochs:
        optimizer.zero_grad()
        loss(network, batch).backward()
        optimizer.step()
    return network


# %%
# ``higher_is_better`` has no default, so that no error is ever maximised by mistake.

model = train(Regressor(), epochs=10)
score = {
    "score": lambda network: r2_score(target[320:], network(unseen).detach()),
    "score_name": "R²",
}
data = {"example_inputs": (inputs[:1],), "train": batches, "loss": loss}
task = pg.tasks.custom(model, **data, **score, higher_is_better=True)
result = pg.prune(task, "obs/uniform", pg.Budget(keep_macs=0.2))
small = train(result.model, epochs=3)
result.summary()

# %%
# The small network says nearly the same.

plt.scatter(model(unseen).detach(), small(unseen).detach(), s=12)
plt.gca().set(xlabel="dense network", ylabel=f"pruned network, R² {task.score(small).value:.2f}")
