"""FedMap, and FedAvg as its control: the loop over rounds, its checkpoint, what a report tells."""

import hashlib
import json
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, BudgetError, ConfigError
from prunegraph.core.files import write_bytes
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.reading import checked, parse_json, read_safetensors
from prunegraph.core.seeding import seeded
from prunegraph.core.splits import Split
from prunegraph.core.task import Task
from prunegraph.core.tensors import parameter_digest, to_safetensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network, unwrap
from prunegraph.layerwise.weights import prunable_weights
from prunegraph.methods.fedmap.clients import ClientData, client_data
from prunegraph.methods.fedmap.rounds import (
    Client,
    LocalTraining,
    Server,
    average,
    first_server,
    load_tensors,
    prune,
    send,
    train_client,
)
from prunegraph.methods.method import Kind, Problem, Result, Role
from prunegraph.methods.obs.choose import check_weights
from prunegraph.training.schedules import Geometric, Schedule, learning_rate_at


@dataclass
class Progress:
    """What a federation has done.

    Attributes:
        versions: which mask each client knows.
        bytes_up: bytes of all replies.
        bytes_down: bytes of all messages to clients.
        losses: mean training loss of each round.
    """

    versions: list[int]
    bytes_up: int = 0
    bytes_down: int = 0
    losses: list[float] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Federation(ABC):
    """A network that clients train by turns, each on its own samples.

    Attributes:
        clients: how many there are.
        dirichlet: concentration of the shares of each class; small = few classes a client; None:
            samples at random.
        participants: clients that train in each round, drawn by the seed; None: all.
        rounds: how often the server averages.
        epochs: passes of a client over its samples in a round.
        batch_size: samples a step.
        lr: learning rate of the first round; a cosine over the rounds takes it towards zero.
        start: ``"fresh"`` weights, drawn by the seed, or those that are ``"given"``.
    """

    name: ClassVar[str]
    role: ClassVar[Role] = "baseline"
    kind: ClassVar[Kind] = "weights"
    searches: ClassVar[bool] = False
    per_seed: ClassVar[bool] = True

    clients: int = 10
    dirichlet: float | None = None
    participants: int | None = None
    rounds: int = 40
    epochs: int = 2
    batch_size: int = 16
    lr: float = 0.1
    start: Literal["fresh", "given"] = "fresh"

    def __post_init__(self) -> None:
        lowest = {"clients": 1, "rounds": 1, "epochs": 1, "batch_size": 2}
        for name, least in lowest.items():
            if not getattr(self, name) >= least:
                msg = f"{name}={getattr(self, name)} must be at least {least}"
                raise ConfigError(msg)
        for name in ("dirichlet", "lr"):
            if getattr(self, name) is not None and not 0.0 < getattr(self, name) < float("inf"):
                msg = f"{name}={getattr(self, name)} must be positive"
                raise ConfigError(msg)
        if not 1 <= (self.participants or self.clients) <= self.clients or self.participants == 0:
            msg = f"participants={self.participants} must lie between 1 and {self.clients} clients"
            raise ConfigError(msg)
        if self.start not in ("fresh", "given"):
            msg = f"start={self.start!r} is none of fresh, given"
            raise ConfigError(msg)

    @abstractmethod
    def schedule(self, sparsity: float) -> Schedule | None:
        """Return the sparsity after each round, counted from 1; None: nothing is pruned."""

    def check(self, problem: Problem) -> None:
        """Say before any work what it cannot serve.

        Raises:
            BudgetError: the budget is no sparsity, or has a pattern.
            ConfigError: the samples cannot be divided so, or fresh weights cannot be drawn.
        """
        model = unwrap(problem.task.model)
        pattern = check_weights(prunable_weights(model), problem.budget)
        if pattern.kind != "unstructured" or problem.budget.sparsity is None:
            msg = f"{self.name} prunes single weights of all layers: give a sparsity, no pattern"
            raise BudgetError(msg)
        if self.start == "fresh":
            check_fresh(model)
        client_data(problem.task, self.clients, self.dirichlet, problem.seed)

    def prune(self, problem: Problem) -> Result:
        """Train for all rounds; an interrupted federation goes on after its last round."""
        self.check(problem)
        task, seed = problem.task, problem.seed
        data = client_data(task, self.clients, self.dirichlet, seed)
        network = copy_network(unwrap(task.model))
        if self.start == "fresh":
            draw_weights(network, seed)
        task.place_model(network, next(network.parameters()).device)
        schedule = self.schedule(problem.budget.sparsity or 0.0)
        server = first_server(network)
        done = Progress(versions=[0] * self.clients)
        path = None if problem.folder is None else problem.folder / f"{self.name}.safetensors"
        identity = self._identity(problem, network)
        if path is not None and path.exists():
            server, done = read_checkpoint(path, identity, server, self.clients)
        masks = {0: first_server(network).mask, server.version: server.mask}
        masks[max(server.version - 1, 0)] = server.before
        clients = {  # what others knew is not asked for again
            number: Client(mask=masks.get(version, masks[0]), version=version)
            for number, version in enumerate(done.versions)
        }
        while server.round < self.rounds:
            server = self._round(task, network, data, server, clients, done, seed)
            if schedule is not None:
                server = prune(server, schedule(server.round))
            if path is not None:
                write_bytes(path, checkpoint_bytes(identity, server, done))
            if problem.progress is not None:
                told = f"round {server.round} of {self.rounds}, loss {done.losses[-1]:.3f}"
                problem.progress(100 * server.round // self.rounds, told)
        load_tensors(network, server.tensors)
        network.eval()
        details = {
            "bytes_up": done.bytes_up,
            "bytes_down": done.bytes_down,
            "clients": spread(task, network, data),
            "losses": done.losses,
        }
        return Result(mask=server.mask, model=network, details=details)

    def _round(
        self,
        task: Task,
        network: nn.Module,
        data: Sequence[ClientData],
        server: Server,
        clients: dict[int, Client],
        done: Progress,
        seed: int,
    ) -> Server:
        """Let the clients of a round train, and average; notes what each knows and was sent."""
        number = server.round
        rng = np.random.default_rng(derived(seed, number, self.clients))
        chosen = rng.permutation(self.clients)[: self.participants or self.clients]
        replies = []
        for client in sorted(chosen.tolist()):
            message = send(server, done.versions[client])
            training = LocalTraining(
                epochs=self.epochs,
                batch_size=self.batch_size,
                lr=learning_rate_at(number, steps=self.rounds, warmup_steps=0, peak=self.lr),
                seed=derived(seed, number, client),
                recalibrate=number == self.rounds - 1,
            )
            clients[client], reply = train_client(
                task, network, clients[client], data[client].train, message, training
            )
            done.versions[client] = clients[client].version
            done.bytes_down += len(message)
            done.bytes_up += len(reply)
            replies.append(reply)
        averaged, loss = average(server, replies)
        done.losses.append(loss)
        return averaged

    def _identity(self, problem: Problem, network: nn.Module) -> dict[str, Any]:
        """Return what tells a federation from others, as JSON values."""
        given = {
            "method": self.name,
            "options": asdict(self),
            "seed": problem.seed,
            "budget": problem.budget.as_dict(),
            "network": parameter_digest(network),
            "train": problem.task.train.fingerprint(),
        }
        return dict(json.loads(json.dumps(given)))


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
        if not (self.every >= 1 and 0.0 < self.until <= 1.0):
            msg = f"every={self.every} must be at least 1, until={self.until} lie in (0, 1]"
            raise ConfigError(msg)

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


def derived(seed: int, *numbers: int) -> int:
    """Return a seed of its own for numbers such as round and client."""
    digest = hashlib.sha256(f"federation:{seed}:{numbers}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


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


def checkpoint_bytes(identity: Mapping[str, Any], server: Server, done: Progress) -> bytes:
    """Return the state after a round as a safetensors file."""
    tensors: dict[str, Tensor] = {f"model.{n}": t for n, t in server.tensors.items()}
    for place, mask in (("mask", server.mask), ("before", server.before)):
        for name, keep in mask.keep.items():
            tensors[f"{place}.{name}"] = torch.from_numpy(to_bytes(keep.flatten().numpy()))
    state = {"version": server.version, "round": server.round, "done": asdict(done)}
    return to_safetensors(tensors, {"federation": json.dumps({"identity": identity, **state})})


def read_checkpoint(
    path: Path, identity: Mapping[str, Any], first: Server, clients: int
) -> tuple[Server, Progress]:
    """Return what ``checkpoint_bytes`` wrote.

    Raises:
        ArtefactError: the file is damaged, or of another federation.
    """
    tensors, metadata = read_safetensors(path)
    text = checked(metadata, {"federation": str}, str(path))["federation"]
    shape = {"identity": dict[str, Any], "version": int, "round": int, "done": Progress}
    record = checked(parse_json(text, path), shape, str(path))
    odd = [key for key, value in identity.items() if record["identity"].get(key) != value]
    if odd:
        msg = f"{path} is of another federation (different {', '.join(odd)}): delete it"
        raise ArtefactError(msg)
    done: Progress = record["done"]
    try:
        masks = [_read_mask(tensors, place, first.mask) for place in ("mask", "before")]
        weights = {
            n: tensors[f"model.{n}"].to(t).reshape(t.shape) for n, t in first.tensors.items()
        }
    except (KeyError, ValueError, RuntimeError) as error:
        msg = f"{path} is damaged: delete it to start over"
        raise ArtefactError(msg) from error
    if len(done.versions) != clients or len(done.losses) != record["round"]:
        msg = f"{path} is damaged: delete it to start over"
        raise ArtefactError(msg)
    server = Server(
        tensors=weights,
        mask=masks[0],
        before=masks[1],
        version=record["version"],
        round=record["round"],
    )
    return server, done


def _read_mask(tensors: Mapping[str, Tensor], place: str, like: WeightMask) -> WeightMask:
    keep = {}
    for name, bits in like.keep.items():
        own = from_bytes(tensors[f"{place}.{name}"].numpy(), bits.numel())
        keep[name] = torch.from_numpy(own).reshape(bits.shape)
    return WeightMask(keep)
