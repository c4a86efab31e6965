"""The server of a federation over all its rounds, whatever carries its messages; its checkpoint."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunegraph.core.states import part_of, read_state, told_as_damage, write_state
from prunegraph.core.weight_mask import WeightMask
from prunegraph.methods.fedmap.rounds import (
    Client,
    LocalTraining,
    Server,
    average,
    derived,
    prune,
    send,
)
from prunegraph.training.schedules import Schedule, learning_rate_at


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


@dataclass(kw_only=True)
class Conductor:
    """Says who trains in a round and what is sent, and takes what comes back.

    Attributes:
        server: its state.
        done: what has been done.
        rounds: how many there are.
        participants: clients of a round, drawn by the seed.
        local: training of a client in the first round; its seed is the federation's.
        schedule: sparsity after each round, counted from 1; None: nothing is pruned.
        keep: called after each round.
    """

    server: Server
    done: Progress
    rounds: int
    participants: int
    local: LocalTraining
    schedule: Schedule | None
    keep: Callable[[Server, Progress], None]

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self.server.round >= self.rounds

    def known_clients(self) -> dict[int, Client]:
        """Return the state of each client: the mask that it has been sent."""
        server = self.server
        dense = WeightMask({n: torch.ones_like(keep) for n, keep in server.mask.keep.items()})
        masks = {0: dense, server.version: server.mask}
        masks[max(server.version - 1, 0)] = server.before
        return {  # what others knew is not asked for again
            number: Client(mask=masks.get(version, dense), version=version)
            for number, version in enumerate(self.done.versions)
        }

    def training(self) -> LocalTraining:
        """Return how clients train in this round; the learning rate falls in a half cosine."""
        number, peak = self.server.round, self.local.lr
        return replace(
            self.local,
            round=number,
            lr=learning_rate_at(number, steps=self.rounds, warmup_steps=0, peak=peak),
            recalibrate=number == self.rounds - 1,
        )

    def messages(self) -> dict[int, bytes]:
        """Return the message to each client of this round, by its number, in order; counts them."""
        clients = len(self.done.versions)
        rng = np.random.default_rng(derived(self.local.seed, self.server.round, clients))
        chosen = rng.permutation(clients)[: self.participants]
        sent = {c: send(self.server, self.done.versions[c]) for c in sorted(chosen.tolist())}
        self.done.bytes_down += sum(map(len, sent.values()))
        return sent

    def forget(self, number: int) -> None:
        """Send a client the bits of all weights next time: nobody knows which mask it has."""
        self.done.versions[number] = 0

    def take(self, replies: Mapping[int, bytes]) -> None:
        """Average the replies by client, in the order given, and prune what the schedule says."""
        for number, reply in replies.items():
            self.done.versions[number] = self.server.version
            self.done.bytes_up += len(reply)
        self.server, loss = average(self.server, list(replies.values()))
        self.done.losses.append(loss)
        if self.schedule is not None:
            self.server = prune(self.server, self.schedule(self.server.round))
        self.keep(self.server, self.done)


def write_checkpoint(
    path: Path, identity: Mapping[str, Any], server: Server, done: Progress
) -> None:
    """Write the state after a round."""
    masks = {"mask": server.mask.packed(), "before": server.before.packed()}
    state = {"version": server.version, "progress": asdict(done)}
    write_state(path, "federation", identity, state, {"model": server.tensors, **masks})


def read_checkpoint(
    path: Path, identity: Mapping[str, Any], first: Server, clients: int
) -> tuple[Server, Progress]:
    """Return what ``write_checkpoint`` wrote.

    Raises:
        ArtefactError: the file is damaged, or of another federation.
    """
    shape = {"version": int, "progress": Progress}
    state, tensors = read_state(path, "federation", identity, shape)
    done: Progress = state["progress"]
    with told_as_damage(path):
        server = Server(
            tensors={
                n: tensors[f"model.{n}"].to(t).reshape(t.shape) for n, t in first.tensors.items()
            },
            mask=first.mask.unpacked(part_of(tensors, "mask")),
            before=first.mask.unpacked(part_of(tensors, "before")),
            version=state["version"],
            round=len(done.losses),
        )
        if len(done.versions) != clients:
            raise ValueError
    return server, done
