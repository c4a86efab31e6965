"""FedMap, and FedAvg as its control: their options, the loop over rounds, what a report tells."""

import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from prunegraph.core.checks import (
    check_at_most,
    check_choice,
    check_fields,
    check_positive,
    check_range,
)
from prunegraph.core.errors import ConfigError
from prunegraph.core.seeding import seeded
from prunegraph.core.splits import Split
from prunegraph.core.task import Task
from prunegraph.graph import copy_network, unwrap
from prunegraph.methods.fedmap.clients import ClientData, client_data
from prunegraph.methods.fedmap.conductor import (
    Conductor,
    Progress,
    read_checkpoint,
    write_checkpoint,
)
from prunegraph.methods.fedmap.rounds import (
    LocalTraining,
    Server,
    derived,
    first_server,
    hold_zeros,
    load_tensors,
    train_client,
)
from prunegraph.methods.method import Problem, Result, Role
from prunegraph.methods.weights import TrainedWeights
from prunegraph.training.schedules import Geometric, Schedule


@dataclass(frozen=True, kw_only=True)
class Federation(TrainedWeights):
    """A network that clients train by turns, each on its own samples.

    Attributes:
        clients: that the samples are divided among.
        dirichlet: concentration of the shares of each class; small = few classes a client; default:
            samples at random.
        participants: clients that train in each round, drawn by the seed; default: all.
        rounds: how often the server averages.
        epochs: passes of a client over its samples in a round.
        batch_size: samples a step.
        lr: learning rate of the first round; a cosine over the rounds takes it towards zero.
        autocast: clients train in bfloat16 where that is safe and the device computes it; small
            networks are slower so.
        start: ``"fresh"`` weights, drawn by the seed, or those that are ``"given"``, whose zeros
            stay.
    """

    clients: int = 10
    dirichlet: float | None = None
    participants: int | None = None
    rounds: int = 40
    epochs: int = 2
    batch_size: int = 16
    lr: float = 0.1
    autocast: bool = False
    start: Literal["fresh", "given"] = "fresh"

    def __post_init__(self) -> None:
        check_fields(self, clients=1, rounds=1, epochs=1, batch_size=2)
        for name in ("dirichlet", "lr"):
            check_positive(name, getattr(self, name))
        if self.participants is not None:
            check_range("participants", self.participants, 1, self.clients)
        check_choice("start", self.start, ("fresh", "given"))

    @abstractmethod
    def schedule(self, sparsity: float) -> Schedule | None:
        """Return the sparsity after each round, counted from 1; None: nothing is pruned."""

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is no sparsity, has a pattern, or is met already.
            ConfigError: the samples cannot be divided so, or fresh weights cannot be drawn.
        """
        self.check_network(problem)
        self.data(problem)

    def check_network(self, problem: Problem) -> None:
        """Say what it cannot serve, whoever has the samples; see ``check``."""
        self.check_sparsity(problem)
        if self.start == "fresh":
            check_fresh(unwrap(problem.task.model))
        elif self.schedule(0.0) is not None:
            super().check(problem)

    def data(self, problem: Problem) -> Sequence[ClientData]:
        """Return what each client has of the task's samples."""
        return client_data(problem.task, self.clients, self.dirichlet, problem.seed)

    def prune(self, problem: Problem) -> Result:
        """Train for all rounds; an interrupted federation goes on after its last round."""
        self.check(problem)
        task, network, data = problem.task, self.network(problem), self.data(problem)
        conductor = self.conductor(problem, network)
        clients = conductor.known_clients()
        while not conductor.finished:
            replies = {}
            for number, message in conductor.messages().items():
                clients[number], replies[number] = train_client(
                    task,
                    network,
                    clients[number],
                    data[number].train,
                    message,
                    conductor.training().of_client(number),
                )
            conductor.take(replies)
        found = self.result(network, conductor)
        return replace(found, details={**found.details, "clients": spread(task, network, data)})

    def network(self, problem: Problem) -> nn.Module:
        """Return the network that the federation begins with, where the task places it."""
        network = copy_network(unwrap(problem.task.model))
        if self.start == "fresh":
            draw_weights(network, problem.seed)
        problem.task.place_model(network, next(network.parameters()).device)
        return network

    def conductor(self, problem: Problem, network: nn.Module) -> Conductor:
        """Return the server over all rounds, after the last one that a folder knows."""
        server, done = hold_zeros(first_server(network)), Progress(versions=[0] * self.clients)
        identity = problem.identity(self, train=problem.task.train.fingerprint())
        path = problem.file(self.name)
        if path is not None and path.exists():
            server, done = read_checkpoint(path, identity, server, self.clients)

        def keep(server: Server, done: Progress) -> None:
            if path is not None:
                write_checkpoint(path, identity, server, done)
            told = f"round {server.round} of {self.rounds}, loss {done.losses[-1]:.3f}"
            problem.tell(100 * server.round // self.rounds, told)

        return Conductor(
            server=server,
            done=done,
            rounds=self.rounds,
            participants=self.participants or self.clients,
            local=LocalTraining(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=self.lr,
                seed=problem.seed,
                autocast=self.autocast,
            ),
            schedule=self.schedule(problem.budget.sparsity or 0.0),
            keep=keep,
        )

    def result(self, network: nn.Module, conductor: Conductor) -> Result:
        """Return what a federation that has finished has come to; writes into ``network``."""
        load_tensors(network, conductor.server.tensors)
        network.eval()
        done = asdict(conductor.done)
        details = {name: done[name] for name in ("bytes_up", "bytes_down", "losses")}
        return Result(mask=conductor.server.mask, model=network, details=details)


@dataclass(frozen=True, kw_only=True)
class FedMap(Federation):
    """Prunes while it trains: after some rounds the smallest weights of all layers go.

    Each stage keeps the same share of what is left. All clients have one mask, which only shrinks.

    Attributes:
        every: rounds of a stage.
        until: share of the rounds after which nothing more goes, in (0, 1].
    """

    name: ClassVar[str] = "fedmap"
    beside: ClassVar[tuple[str, ...]] = ("fedavg",)
    """Rows that a run of it has too."""

    every: int = 3
    until: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self, every=1)
        check_positive("until", self.until)
        check_at_most("until", self.until, 1.0)

    def schedule(self, sparsity: float) -> Schedule:
        """Return the geometric schedule of its stages."""
        return Geometric(sparsity, end=max(1, round(self.until * self.rounds)), every=self.every)


@dataclass(frozen=True, kw_only=True)
class FedAvg(Federation):
    """Trains alike and prunes nothing, whatever the budget says: what FedMap is measured against.

    McMahan et al. 2017 (arXiv 1602.05629).
    """

    name: ClassVar[str] = "fedavg"
    role: ClassVar[Role] = "control"

    def schedule(self, sparsity: float) -> None:
        """Return None: nothing is pruned."""


def spread(task: Task, model: nn.Module, data: Sequence[ClientData]) -> dict[str, Any]:
    """Return how good a network is for each client, on search samples of the client's classes."""
    found: dict[str, Any] = {"samples": [len(client.train) for client in data]}
    parts: list[Split] = [each.search for each in data if each.search is not None]
    scores = [task.score(model, part).value for part in parts if len(part)]
    if scores:
        ends = {"min": min(scores), "max": max(scores), "mean": statistics.mean(scores)}
        found |= {"scores": scores, **ends, "deviation": statistics.pstdev(scores)}
    return found


def check_fresh(model: nn.Module) -> None:
    """Raise ConfigError if a module with weights cannot draw them anew."""
    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and _reset(module) is None:
            msg = (
                f"{name or type(model).__name__} ({type(module).__name__}) has no "
                "reset_parameters, so no fresh weights can be drawn: give start=given"
            )
            raise ConfigError(msg)


def draw_weights(model: nn.Module, seed: int) -> None:
    """Draw all weights of a network anew."""
    with seeded(derived(seed)), torch.no_grad():
        for module in model.modules():
            reset = _reset(module)
            if reset is not None:
                reset()


def _reset(module: nn.Module) -> Any:
    return getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
