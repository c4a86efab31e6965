"""``prunegraph train --catalogue``: one policy, trained on a folder of networks."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunegraph.agent.catalogue import (
    PAIRS,
    SHARES,
    catalogue_config,
    quick_problem,
    train_on_catalogue,
)
from prunegraph.agent.policies import TrainedPolicy, find_policy, load_policy, save_policy
from prunegraph.agent.settings import trained_budgets
from prunegraph.agent.subject import Subject
from prunegraph.agent.train import AgentConfig
from prunegraph.core.console import Console
from prunegraph.core.errors import BudgetError, ConfigError
from prunegraph.core.splits import Dataset
from prunegraph.core.tensors import parameter_digest
from prunegraph.data import EMBEDDED
from prunegraph.methods.context import Context
from prunegraph.models import WeightsInfo, weights_info
from prunegraph.runs.context import RunContext
from prunegraph.runs.folder import RunFolder, open_run
from prunegraph.runs.options.config import NetworkConfig, TrainConfig
from prunegraph.runs.prepare import load_images
from prunegraph.runs.target import Target
from prunegraph.runs.tasks import image_classification

CHECKPOINT = "catalogue.safetensors"


class Catalogue:
    """The networks of a folder, loaded when they are asked for, images of one kind once.

    Args:
        config: the folder, and how images are found.
    """

    def __init__(self, config: TrainConfig) -> None:
        assert config.catalogue is not None
        self._config = config
        self._datasets: dict[tuple[Any, ...], Dataset] = {}
        self.infos: dict[Path, WeightsInfo] = {
            path: info
            for path in sorted(config.catalogue.glob("*.safetensors"))
            if (info := weights_info(path)) is not None
        }

    def part(self, name: str) -> list[Path]:
        """Return the weights files of a part.

        Raises:
            ConfigError: there are none.
        """
        found = [
            path for path, info in self.infos.items() if info.extra.get("part", "train") == name
        ]
        if not found:
            msg = (
                f"{self._config.catalogue} holds no weights to {name} on: give a folder of "
                ".safetensors files, each with the JSON that `prunegraph pretrain` writes"
            )
            raise ConfigError(msg)
        return found

    def load(self, path: Path) -> Target:
        """Return a network."""
        info, (shared,) = self.infos[path], self._config.network_configs()
        embedded = (shared.dataset or info.dataset) in EMBEDDED
        config: NetworkConfig = dataclasses.replace(
            shared, weights=path, data_dir=None if embedded else shared.data_dir
        )
        key = (info.dataset, info.mean, info.std, info.extra.get("image_size"))
        if key not in self._datasets:
            self._datasets[key] = load_images(config, info)
        return image_classification.load(config, dataset=self._datasets[key])

    def context(self, path: Path, seed: int) -> Context:
        """Return what measures a network."""
        return RunContext(target=self.load(path), options=self._config, seed=seed).measures


def load_subjects(
    catalogue: Catalogue, paths: Sequence[Path], config: TrainConfig, console: Console
) -> dict[Path, Subject]:
    """Return networks as a policy sees them; those that a budget is out of reach of are left out.

    Args:
        catalogue: that holds them.
        paths: of their weights.
        config: budgets and seed.
        console: where progress goes.
    """
    found: dict[Path, Subject] = {}
    budgets = catalogue_budgets(config)
    with console.progress("load networks", len(paths)) as report:
        for number, path in enumerate(paths, start=1):
            subject = Subject(quick_problem(catalogue.context(path, config.seed), budgets[0]))
            try:
                for budget in budgets:
                    subject.prior(budget)
            except BudgetError as error:
                console.say(f"{path.stem} is left out: {error}")
            else:
                found[path] = subject
            report(number, path.stem)
    if not found:
        msg = "no network of the catalogue can meet all budgets: give larger --budgets"
        raise ConfigError(msg)
    return found


def catalogue_budgets(config: TrainConfig) -> tuple[Any, ...]:
    """Return what a policy is trained for, the least first."""
    return trained_budgets(sorted(config.budgets or SHARES), config.budget())


def run_catalogue(
    config: TrainConfig,
    console: Console,
    *,
    change: Callable[[AgentConfig], AgentConfig] = lambda config: config,
    choose: Callable[[Catalogue], list[Path]] = lambda catalogue: catalogue.part("train"),
) -> dict[str, Any]:
    """Train a policy on the networks of a folder, write it, and return what it comes from.

    Args:
        config: the options.
        console: where progress goes.
        change: what a study changes of the agent.
        choose: which of the networks it takes.

    Raises:
        PruneGraphError: no networks, too few of their pruned ones for an update, or the run folder
            is of another training.
    """
    catalogue = Catalogue(config)
    paths = choose(catalogue)
    update = PAIRS * (config.agent.update_size + 1)  # and what each pair competes with
    if config.networks * len(paths) < update:
        msg = (
            f"networks={config.networks} for each of {len(paths)} in the catalogue allows no "
            f"update of the policy: give at least {-(-update // len(paths))}"
        )
        raise ConfigError(msg)
    initial = None if config.policy is None else find_policy(config.policy)
    folder = open_run(config, config.out, "catalogue")
    with folder.started(config):
        if folder.file(folder.POLICY).with_suffix(".json").is_file():  # written last
            policy = load_policy(folder.path)
        else:
            subjects = load_subjects(catalogue, paths, config, console)
            policy = _train(config, subjects, catalogue, initial, change, folder, console)
            save_policy(folder.path, policy)
        folder.finish()
    console.say(f"the policy is in {folder.path}")
    return {"command": config.command, "policy": str(folder.path), **policy.record}


def _train(
    config: TrainConfig,
    subjects: Mapping[Path, Subject],
    catalogue: Catalogue,
    initial: TrainedPolicy | None,
    change: Callable[[AgentConfig], AgentConfig],
    folder: RunFolder,
    console: Console,
) -> TrainedPolicy:
    networks = config.networks * len(subjects)
    budgets = catalogue_budgets(config)
    started = time.monotonic()
    with console.progress("train", networks) as report:

        def show(record: Mapping[str, Any]) -> None:
            words = f"metric {record['metric']:.3f} beside the bar's {record['bar']:.3f}"
            report(record["networks"], words)

        result = train_on_catalogue(
            list(subjects.values()),
            change(catalogue_config(config.agent, config.seed, initial)),
            budgets,
            networks=networks,
            initial=initial,
            checkpoint=folder.checkpoint(CHECKPOINT),
            events=folder.file(folder.EVENTS),
            progress=show,
        )
    record = {
        **result.policy.record,
        "catalogue": {path.stem: dict(catalogue.infos[path].extra) for path in subjects},
        "weights": {
            path.stem: parameter_digest(subject.problem.task.model)
            for path, subject in subjects.items()
        },
        "budgets": [budget.as_dict() for budget in budgets],
        "seed": config.seed,
        "seconds": round(time.monotonic() - started, 1),
        "initial": None if initial is None else dict(initial.record),
    }
    return TrainedPolicy(result.policy.network, record)
