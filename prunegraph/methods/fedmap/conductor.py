"""The server of a federation over all its rounds, whatever carries its messages; its checkpoint."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunegraph.core.errors import ArtefactError
from prunegraph.core.masks import from_bytes, to_bytes
from prunegraph.core.reading import checked, parse_json
from prunegraph.core.tensors import read_safetensors, to_safetensors
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
