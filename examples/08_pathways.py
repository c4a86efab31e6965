"""
A mask for each language
========================

One set of weights serves two languages, each with its own mask. The data are a stand-in for speech:
rows of digits, read to the right and upwards, each way with an alphabet of its own.
"""

import matplotlib.pyplot as plt

import prunegraph as pg

task = pg.tasks.speech_recognition(languages=["right", "up"])
pg.finetune(task.model, task, pg.FinetuneConfig(epochs=2, optimizer="adamw", peak_lr=4e-3), seed=0)

# %%
# The masks are chosen while the network trains on.

method = pg.methods.Pathways(epochs=2, every=5)
result = pg.prune(task, method, pg.Budget(sparsity=0.7))
groups = result.report["groups"]
print(f"weights that a language runs with: {groups['active']:.0%}")
print(f"weights in the file: {groups['stored']:.0%}")

# %%
# The masks part as weights leave.

steps, active, stored, overlap = zip(*groups["history"], strict=True)
figure, axes = plt.subplots(layout="constrained")
for label, values in {
    "weights of a language": active,
    "weights of both together": stored,
    "overlap of the masks": overlap,
}.items():
    axes.plot(steps, [100 * value for value in values], label=label)
axes.set(xlabel="step", ylabel="%", ylim=(0, 103))
axes.legend(frameon=False)
