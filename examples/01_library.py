"""
A network of a library
======================

``pg.load`` finds networks of torchvision, timm and transformers by name. This one of timm is made
for tests, and small.
"""

import torch
from torch.nn.functional import interpolate

import prunegraph as pg
from prunegraph.data import load_dataset

# %%
# With ``weights=True``, the default, it has its published weights, from the library's cache. Here
# it is trained on the embedded digits.

torch.manual_seed(0)
model = pg.load("timm:test_resnet", weights=False, num_classes=10)


def coloured(split):
    images, labels = next(split.batches(2048))
    return interpolate(images, 16).expand(-1, 3, -1, -1), labels


digits = load_dataset("digits")
task = pg.tasks.image_classification(
    model, train=coloured(digits.train), search=coloured(digits.search)
)
recipe = pg.FinetuneConfig(epochs=3, batch_size=64, peak_lr=0.03)
pg.finetune(model, task, recipe, seed=0)

# %%
# One statement prunes it, and one trains what is left.

result = pg.prune(task, "taylor/uniform", pg.Budget(keep_macs=0.5))
pg.finetune(result.model, task, recipe, seed=0)
result.summary()
print(f"accuracy after the fine-tune: {task.score(result.model).value:.1%}")

# %%
# This is left of each group of channels.

result.plot()
