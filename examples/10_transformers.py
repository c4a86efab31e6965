"""
Masks in the Trainer of transformers
====================================

A callback prunes while the trainer trains. ``log=`` is a function of step and figures, which serves
every tracker; here it fills MLflow's local store.
"""

import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import mlflow
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import prunegraph as pg
from prunegraph.training.masked import MaskPlan
from prunegraph.training.schedules import Levels

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"  # its other stores need a database
folder = Path(tempfile.mkdtemp())
mlflow.set_tracking_uri((folder / "mlruns").as_uri())


def log(step, figures):
    mlflow.log_metrics(figures, step)


# %%
# At step 10 half of the weights become zero, and stay so.

torch.manual_seed(0)
sizes = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
rows = [{"input_ids": row, "labels": row} for row in torch.arange(16).repeat(240, 1)]
arguments = TrainingArguments(
    str(folder),
    num_train_epochs=1,
    learning_rate=1e-2,
    logging_steps=3,
    disable_tqdm=True,
    use_cpu=True,
    report_to=[],  # the callback tells MLflow, the sparsity too
)
callback = pg.trainer_callback(MaskPlan(schedule=Levels([(10, 0.5)])), log=log)
with mlflow.start_run() as run:
    Trainer(llama, arguments, train_dataset=rows, callbacks=[callback]).train()

# %%
# This is what the store has.

client, figure = mlflow.MlflowClient(), plt.figure(layout="constrained")
for name, axes in zip(("loss", "sparsity"), figure.subplots(2, sharex=True), strict=True):
    found = client.get_metric_history(run.info.run_id, name)
    axes.plot([item.step for item in found], [item.value for item in found], ".-")
    axes.set(ylabel=name, ylim=0)
axes.set_xlabel("step")
