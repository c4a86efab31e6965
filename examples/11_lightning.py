"""
Masks in the Trainer of Lightning
=================================

The sparsity rises as a cubic while Lightning trains.
"""

import matplotlib.pyplot as plt
import pytorch_lightning as lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import prunegraph as pg
from prunegraph.training.masked import MaskPlan
from prunegraph.training.schedules import Cubic


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, _):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


pixels, labels = (torch.tensor(item) for item in load_digits(return_X_y=True))
batches = DataLoader(TensorDataset(pixels.float() / 16, labels), batch_size=64)

# %%
# The callback is all that changes. Here ``log=`` fills a list.

told = []
plan = MaskPlan(schedule=Cubic(0.9, end=20))
callback = pg.lightning_callback(plan, log=lambda *figures: told.append(figures))
parts = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
quiet = dict.fromkeys(parts, False)
trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
trainer.fit(Classifier(), batches)
print(f"{callback.masked.mask.sparsity:.0%} of the weights are zero")

# %%
# Loss and zeros, step by step.

figure, (above, below) = plt.subplots(2, sharex=True, layout="constrained")
steps, figures = zip(*told, strict=True)
above.plot(steps, [item["loss"] for item in figures], ".-")
above.set(ylabel="loss", ylim=0)
below.plot(steps, [100 * item["sparsity"] for item in figures], ".-")
below.set(xlabel="step", ylabel="zeros, %", ylim=0)
