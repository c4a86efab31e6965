"""
A budget in milliseconds
========================

Half of the multiply-adds is seldom half of the time. A budget of time is measured on this device.
"""

import torch
from torch import nn

import prunegraph as pg
from prunegraph.data import load_dataset
from prunegraph.graph.costs.clock import measure_latency

torch.manual_seed(0)
torch.set_num_threads(1)
digits = load_dataset("digits")
model = nn.Sequential(
    *(nn.Conv2d(1, 64, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()),
    *(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()),
    *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 10)),
)
task = pg.tasks.image_classification(model, train=digits.train, search=digits.search)
recipe = pg.FinetuneConfig(epochs=2, batch_size=32, optimizer="adamw", peak_lr=2e-3)
pg.finetune(model, task, recipe, seed=0)

# %%
# The fastest of several runs counts: what else the machine does only adds.

dense = measure_latency(model, task.example_inputs).least
print(f"one image takes {dense:.2f} ms")

# %%
# With ``round_to`` widths are multiples of 8, which most processors like.

result = pg.prune(task, "taylor/global", pg.Budget(max_latency=0.7 * dense, round_to=8))
result.summary()

# %%
# This is left of each layer.

result.plot()
