"""Every reader of files, on hostile ones: it succeeds or says in one error what is wrong.

Nothing else may be raised, and time and memory stay bounded. ``make endurance`` tries more files.
"""

import contextlib
import hashlib
import json
import os
import resource
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import sparse
from torch import nn

from prunegraph.agent.policies import load_policy
from prunegraph.artefacts.pruned import MASK_FILE, load_pruned, read_info
from prunegraph.core.errors import PruneGraphError
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.tensors import parameter_digest
from prunegraph.data.decode import decode, stored_shape
from prunegraph.data.lazy import centre_crop
from prunegraph.data.load import load_dataset
from prunegraph.data.records import Record
from prunegraph.evaluation.log import WRITE_EVERY, OutcomeLog
from prunegraph.graph import StructureGraph
from prunegraph.graph.costs.clock import Latency
from prunegraph.graph.costs.latency import LatencyTable
from prunegraph.models import build_model, load_weights, weights_info
from prunegraph.runs.choose import CURVES
from prunegraph.runs.finetune import read_accuracy
from prunegraph.runs.folder import RunFolder
from prunegraph.runs.measure import read_measured
from prunegraph.runs.options.config import TrainConfig
from prunegraph.runs.options.yaml_file import differences, load_config, read_yaml
from prunegraph.runs.predicted_latency import read_table, write_table
from prunegraph.runs.report.page import read_findings
from prunegraph.runs.report.plots import _search, draw_once
from prunegraph.runs.report.report import machine, read_report, read_rows
from prunegraph.runs.report.tables import methods_table
from prunegraph.runs.searches import read_decision, read_finished, summary
from prunegraph.runs.store import Candidate, CandidateStore, read_masks, write_masks
from prunegraph.runs.tasks import image_classification
from prunegraph.tasks.image_classification import training_task
from prunegraph.training.loop import FinetuneConfig, Watch, finetune
from support.parts import part

MAX_SECONDS = 5.0
MAX_BYTES = 2**30
PROFILE = settings.get_profile(os.environ.get("PRUNEGRAPH_PROFILE", "hostile"))
ARCH = "digits_resnet8_w4"
Mutate = Callable[[bytes, Random], bytes]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A file that is changed, and what reads it."""

    path: Path
    mutate: str
    read: Callable[[], object]
    sign: Callable[[], None] = lambda: None


def network() -> nn.Module:
    torch.manual_seed(0)
    return build_model(ARCH, num_classes=10, image_shape=(1, 8, 8))


def sign_policy(folder: Path) -> None:
    path = folder / "policy.json"
    record = json.loads(path.read_text())
    content = (folder / "policy.safetensors").read_bytes()
    record["weights"]["sha256"] = hashlib.sha256(content).hexdigest()
    path.write_text(json.dumps(record))


def read_pruned(folder: Path) -> None:
    info = read_info(folder)
    if ":" not in info.arch:
        load_pruned(folder, lambda: image_classification.build(None, info))


def read_weights(path: Path) -> None:
    """Load weights: all of them, or the network stays as it was."""
    model = network()
    before = parameter_digest(model)
    try:
        load_weights(model, path)
    except PruneGraphError:
        assert parameter_digest(model) == before
        raise
    assert all(bool(torch.isfinite(value).all()) for value in model.parameters())


def read_options(path: Path) -> None:
    written = read_yaml(path)
    assert isinstance(differences(TrainConfig(), written), list)
    load_config(TrainConfig, path)


def show_history(folder: Path, graph: StructureGraph) -> None:
    findings = read_findings(RunFolder(path=folder), graph)
    plot = _search(findings)
    if plot is not None:
        draw_once(plot.figure)


def show_report(folder: Path) -> None:
    content = read_report(RunFolder(path=folder))
    assert len(read_rows(content)) == len(content["methods"])
    assert methods_table(content).columns


def decode_image(path: Path) -> None:
    record = Record("train", "cat", path.name, str(path))
    stored_shape(record)
    assert decode(record, partial(centre_crop, shape=(8, 8))).shape == (3, 8, 8)


def load_tar(path: Path) -> None:
    dataset = load_dataset("folder", data_dir=path)
    images, _ = next(iter(dataset.train.batches(4)))
    assert bool(torch.isfinite(images).all())


def write_images(folder: Path) -> Path:
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            for number in range(3):
                path = folder / split / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(path)
    return folder


def make_tar(folder: Path) -> Path:
    path = folder.with_suffix(".tar")
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname="images")
    return path


def finetune_case(folder: Path) -> Case:
    path = folder / "finetune.safetensors"
    task = training_task(network(), load_dataset("digits").train.sample(64, 0))
    config = FinetuneConfig(epochs=1, batch_size=32)

    def read(watch: Watch | None = None) -> None:
        finetune(network(), task, config, seed=0, checkpoint=path, watch=watch)

    def stop(*_: float) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(sys.modules[finetune.__module__], "CHECKPOINT_SECONDS", 0.0)
        read(stop)  # within the epoch
    return Case(path=path, mutate="safetensors", read=read)


def outcomes_case(folder: Path, graph: StructureGraph, mask: ChannelMask) -> Case:
    """Return what an interrupted search of a baseline has found."""
    path, log = folder / "outcomes.json", OutcomeLog(folder / "outcomes.json")
    for number in range(WRITE_EVERY):
        found = Outcome(
            accuracy=0.5,
            loss=1.0,
            kl=None,
            num_images=64,
            cost=graph.cost(mask),
            digest=f"{mask.digest()}{number}",
            seconds=0.1,
        )
        log.add(found, "")
    return Case(path=path, mutate="json", read=lambda: OutcomeLog(path).get(mask.digest(), ""))


def latency_case(folder: Path, graph: StructureGraph) -> Case:
    """Return the layer times that a search under a latency goes by."""
    path, bits = folder / "latency.json", np.ones((1, graph.num_units))
    positions = sparse.csr_array(np.repeat(bits, 2, axis=0))
    table = LatencyTable(
        positions=positions,
        widths=np.array([[[1.0, 9.0]], [[1.0, 9.0]]]),
        times=np.array([[[1.0, 2.0], [2.0, 4.0]]]),
        dense=Latency(least=4.0, median=4.0, p90=4.0, num_runs=3, ran=1.0),
        smallest=Latency(least=1.0, median=1.0, p90=1.0, num_runs=3, ran=1.0),
        scale=1.0,
        offset=0.0,
        rates=np.full(graph.num_units, 0.1),
        excess=1.0,
    )
    write_table(path, table)

    def read() -> None:
        found = read_table(path, graph)
        assert found.expected(bits).shape == (1,)
        assert found.slopes(bits).shape == bits.shape

    return Case(path=path, mutate="json", read=read)


@pytest.fixture(scope="session")
def cases(
    run_folder: Path,
    sign_recipe: Callable[[Path], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Case]:
    run, made = run_folder, tmp_path_factory.mktemp("made")
    dense = run / "dense.safetensors"
    torch.save(network().state_dict(), made / "weights.pth")
    pruned = run / "pruned"
    saved = load_pruned(pruned, network)
    graph, mask = saved.graph, saved.mask
    store = CandidateStore(made / "candidates.json", graph)
    store.add(
        Candidate(
            name="cem", **part("cem"), seed=0, mask=mask, networks_evaluated=3, search_accuracy=0.5
        )
    )
    write_masks(made / "masks.json", [mask])
    accuracies, here = {mask.digest(): 0.5}, machine()
    measured = {"machine": here, "search": accuracies, "test": accuracies}
    write_json(made / "measured.json", measured)
    decision = {"start": "l1/uniform", "share": 0.5, "divergence": {"0.5": 0.1}, "seconds": 1.0}
    write_json(made / "decision.json", decision)
    write_json(made / "accuracy.json", {"test_accuracy_finetuned": 0.5, "machine": here})
    curves = {key: [0.5, 0.6] for key in CURVES}
    ended = {"policy": "policy.safetensors", "seconds": 1.0, "evaluation_seconds": 1.0}
    ended |= {"networks_evaluated": 3, "history": curves}
    write_json(made / "finished.json", ended)
    images = write_images(made / "images")
    tar = make_tar(images)
    sign, policy = partial(sign_recipe, pruned), partial(sign_policy, run)
    found = {
        "weights": Case(path=dense, mutate="safetensors", read=partial(read_weights, dense)),
        "weights_json": Case(
            path=run / "dense.json", mutate="json", read=lambda: weights_info(dense)
        ),
        "weights_pth": Case(
            path=made / "weights.pth",
            mutate="bytes",
            read=partial(read_weights, made / "weights.pth"),
        ),
        "recipe": Case(
            path=pruned / MASK_FILE, mutate="json", read=partial(read_pruned, pruned), sign=sign
        ),
        "pruned": Case(
            path=pruned / "pruned.safetensors",
            mutate="safetensors",
            read=partial(read_pruned, pruned),
            sign=sign,
        ),
        "policy_json": Case(path=run / "policy.json", mutate="json", read=lambda: load_policy(run)),
        "policy": Case(
            path=run / "policy.safetensors",
            mutate="safetensors",
            read=lambda: load_policy(run),
            sign=policy,
        ),
        "report": Case(path=run / "report.json", mutate="json", read=partial(show_report, run)),
        "options": Case(
            path=run / "config.yaml",
            mutate="yaml",
            read=partial(read_options, run / "config.yaml"),
        ),
        "candidates": Case(
            path=made / "candidates.json",
            mutate="json",
            read=lambda: CandidateStore(made / "candidates.json", graph),
        ),
        "masks": Case(
            path=made / "masks.json",
            mutate="json",
            read=lambda: read_masks(made / "masks.json", graph),
        ),
        "history": Case(
            path=run / "history.json", mutate="json", read=partial(show_history, run, graph)
        ),
        "decision": Case(
            path=made / "decision.json",
            mutate="json",
            read=lambda: read_decision(made / "decision.json"),
        ),
        "accuracy": Case(
            path=made / "accuracy.json",
            mutate="json",
            read=lambda: read_accuracy(made / "accuracy.json"),
        ),
        "finished": Case(
            path=made / "finished.json",
            mutate="json",
            read=lambda: summary([0], [read_finished(made / "finished.json")]),
        ),
        "measured": Case(
            path=made / "measured.json",
            mutate="json",
            read=lambda: read_measured(made / "measured.json", here),
        ),
        "outcomes": outcomes_case(made, graph, mask),
        "latency": latency_case(made, graph),
        "finetune_checkpoint": finetune_case(made),
        "tar": Case(path=tar, mutate="tar", read=partial(load_tar, tar)),
    }
    for kind in ("png", "jpeg", "bmp", "tiff", "webp", "ppm"):
        path = made / f"image.{kind}"
        Image.open(images / "train" / "cat" / "0.png").resize((20, 20)).save(path, format=kind)
        found[kind] = Case(path=path, mutate="bytes", read=partial(decode_image, path))
    return found


NAMES = (
    *("weights", "weights_json", "weights_pth", "recipe", "pruned", "policy_json", "policy"),
    *("report", "history", "options", "candidates", "masks"),
    *("outcomes", "latency", "measured", "decision", "accuracy", "finished"),
    *("finetune_checkpoint", "tar"),
    *("png", "jpeg", "bmp", "tiff", "webp", "ppm"),
)


def restore(case: Case, valid: bytes) -> None:
    case.path.write_bytes(valid)
    case.sign()


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_is_read_or_refused(
    name: str, cases: dict[str, Case], mutators: dict[str, Mutate]
) -> None:
    case = cases[name]
    valid, mutate = case.path.read_bytes(), mutators[case.mutate]
    case.read()  # the valid one
    outcomes: list[bool] = []

    @settings(PROFILE, suppress_health_check=list(HealthCheck), deadline=None)
    @given(random=st.randoms(use_true_random=False))
    def check(random: Random) -> None:
        case.path.write_bytes(mutate(valid, random))
        case.sign()
        started = time.process_time()
        try:
            case.read()
        except PruneGraphError as error:
            outcomes.append(False)
            assert str(error)
        else:
            outcomes.append(True)
        assert time.process_time() - started < MAX_SECONDS

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        check()
    finally:
        restore(case, valid)
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < MAX_BYTES
    assert not all(outcomes)
    case.read()
