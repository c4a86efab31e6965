"""What masks cost while a network trains: a step, choosing them anew, a round of a federation.

CPU seconds of one thread. Dense and masked trainings alternate; each figure is the least of three.

    python benchmarks/masked_speed.py --speech FOLDER --whisper FOLDER --out FILE
    python benchmarks/masked_speed.py                        # the small proxy in Whisper's place
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from prunegraph.core.budget import Budget
from prunegraph.core.files import write_json
from prunegraph.data.load import load_dataset
from prunegraph.data.recordings import read_recordings
from prunegraph.data.speech import proxy_speech
from prunegraph.graph import copy_network
from prunegraph.methods.context import Context
from prunegraph.methods.fedmap import rounds
from prunegraph.methods.fedmap.method import FedMap
from prunegraph.methods.obs.magnitude import magnitude_mask
from prunegraph.models import build_model
from prunegraph.runs.report.report import machine
from prunegraph.tasks import image_classification
from prunegraph.tasks.speech_recognition import SpeechRecognition, speech_recognition
from prunegraph.tasks.whisper import whisper_recognition
from prunegraph.training.loop import FinetuneConfig, finetune
from prunegraph.training.masked import MaskPlan, dense_mask
from prunegraph.training.schedules import Constant

BATCH, STEPS, SPARSITY = 16, 3, 0.7


def seconds(work: Callable[..., Any], *given: Any, **options: Any) -> float:
    """Return the CPU seconds of a call."""
    begun = time.process_time()
    work(*given, **options)
    return time.process_time() - begun


def step(task: SpeechRecognition) -> dict[str, float]:
    """Return the seconds of a training step without and with a mask that stays."""
    posed = dataclasses.replace(task, train=task.train.take(torch.arange(BATCH * STEPS)))
    plan = MaskPlan(masks=magnitude_mask(task.model, Budget(sparsity=SPARSITY)))

    def epochs(count: int, masks: MaskPlan | None) -> float:
        recipe = FinetuneConfig(epochs=count, batch_size=BATCH)
        return seconds(finetune, copy_network(task.model), posed, recipe, seed=0, masks=masks)

    found: dict[str, list[float]] = {"dense": [], "masked": []}
    for _ in range(3):
        for name, masks in (("dense", None), ("masked", plan)):
            found[name].append((epochs(2, masks) - epochs(1, masks)) / STEPS)  # without the setup
    return {name: min(times) for name, times in found.items()}


def selection(task: SpeechRecognition) -> dict[str, float]:
    """Return the seconds of choosing the masks of one and of all languages anew."""
    found = {}
    for count in (1, len(task.languages)):
        network = copy_network(task.model)
        names = task.languages[:count]
        plan = MaskPlan(
            masks=dict.fromkeys(names, dense_mask(network)),
            schedule=Constant(SPARSITY),
            group_of=str,
            emphasis=0.5,
            reselect=True,
        )
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        masked = plan.attach(network, optimizer)
        for name in names:  # so that each has gradients to tell its weights by
            masked.use(name)
            for parameter in network.parameters():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        found[str(count)] = seconds(plan.begin, masked, 1, names[0])
    return found


def federation() -> dict[str, float]:
    """Return the seconds of ten clients' trainings, and of all else, in a round on digits."""
    data = load_dataset("digits")
    model = build_model("digits_resnet8_w8_gn", num_classes=10, image_shape=(1, 8, 8))
    task = image_classification(model, train=data.train, search=data.search)
    context = Context(task=task, structure=None, seed=0, reconstruct=False)
    problem = context.problem(Budget(sparsity=0.9), folder=None)
    inside: list[float] = []
    train = rounds._train

    def timed(*given: Any) -> Any:
        begun = time.process_time()
        loss = train(*given)
        inside.append(time.process_time() - begun)
        return loss

    method = FedMap(dirichlet=0.3)
    with patch.object(rounds, "_train", timed):
        whole = seconds(method.prune, problem)
    clients = sum(inside)
    return {
        "clients": clients / method.rounds,
        "else": (whole - clients) / method.rounds,
        "share": (whole - clients) / clients,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--speech", type=Path, help="folder of recordings; default: the proxy")
    parser.add_argument("--whisper", type=Path, help="folder; default: a small recogniser")
    parser.add_argument("--out", type=Path, help="file of the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = proxy_speech() if options.speech is None else read_recordings(options.speech, words=1)
    task = speech_recognition(data=data, seed=0)
    if options.whisper is not None:
        task = whisper_recognition(options.whisper, data)
    found = {
        "weights": dense_mask(task.model).size,
        "step": step(task),
        "selection": selection(task),
        "federation": federation(),
        "machine": machine(),
    }
    print(found)
    if options.out is not None:
        write_json(options.out, found)


if __name__ == "__main__":
    main()
