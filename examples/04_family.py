"""
A policy for a family of networks
=================================

The agent searches on two networks at once. What it has learned then prunes a third, larger one,
without a search. The searches are far too short here: 400 networks each are usual.
"""

import matplotlib.pyplot as plt
import torch

import prunegraph as pg
from prunegraph.agent.method import AppliedPolicy
from prunegraph.agent.options import AgentOptions
from prunegraph.agent.search import train_policy
from prunegraph.data import load_dataset
from prunegraph.methods.context import make_problem
from prunegraph.models import build_model

digits = load_dataset("digits")
budget = pg.Budget(keep_macs=0.3)


def trained(arch):
    torch.manual_seed(0)
    model = build_model(arch, num_classes=10, image_shape=(1, 8, 8))
    task = pg.tasks.image_classification(model, train=digits.train, search=digits.search)
    pg.finetune(model, task, pg.FinetuneConfig(epochs=4, batch_size=32, peak_lr=0.1), seed=0)
    return task


# %%
# One policy is trained on both networks.

problems = []
for arch in ("digits_resnet8_w4", "digits_resnet8_w6"):
    task = trained(arch)
    graph = pg.analyse(task.model, task.example_inputs)
    problems.append(make_problem(task, graph, budget, max_networks=20, num_calibration=128))
options = AgentOptions(update_size=4, subset=128, surrogate_steps=2)
family = train_policy(problems, options)
print(f"{family.networks} pruned networks were run")

# %%
# It decides about a deeper one, from its structure and statistics of train images.

task = trained("digits_resnet14_w6")
accuracy = {"dense": task.score(task.model).value}
for name, method in {
    "policy": AppliedPolicy(family.policy),
    "L1": "l1/uniform",
    "chance": "random/uniform",
}.items():
    accuracy[name] = task.score(pg.prune(task, method, budget).model).value

plt.bar(accuracy.keys(), [100 * value for value in accuracy.values()])
plt.ylabel("search accuracy of digits_resnet14_w6, %")
