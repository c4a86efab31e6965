"""One round of a federation: server and client as functions from state to state.

McMahan et al. 2017, *Communication-efficient learning of deep networks from decentralized data*
(arXiv 1602.05629), algorithm 1; the mask of *FedMap: Iterative magnitude-based pruning for
communication-efficient federated learning* (Herzog et al. 2024, arXiv 2406.19050): one for all,
chosen by the server among the weights that it still keeps.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ConfigError, PruneGraphError
from prunegraph.core.precision import autocasting
from prunegraph.core.seeding import derived_seed, seeded
from prunegraph.core.splits import ReadyBatches, TrainSplit
from prunegraph.core.task import Task
from prunegraph.core.tensors import state_tensors
from prunegraph.core.weight_mask import WeightMask
from prunegraph.graph import copy_network
from prunegraph.layerwise.recalibrate import has_batch_norm, recalibrate_bn, whole_batches
from prunegraph.methods.fedmap.wire import (
    Header,
    mask_bits,
    open_message,
    pack,
    weights_of,
    with_bits,
)
from prunegraph.training.kernels import SoundConvolutions
from prunegraph.training.masked import MaskedWeights, dense_mask, least_mask
from prunegraph.training.optimizers import make_optimizer


@dataclass(frozen=True, eq=False, kw_only=True)
class Server:
    """What the server holds between rounds.

    Attributes:
        tensors: parameters and floating buffers of the network, zeros in place.
        mask: what stays.
        before: the mask before its last change.
        version: how often it has changed.
        round: rounds done.
    """

    tensors: Mapping[str, Tensor]
    mask: WeightMask
    before: WeightMask
    version: int = 0
    round: int = 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Client:
    """What a client holds between rounds: the mask that it knows."""

    mask: WeightMask
    version: int = 0


@dataclass(frozen=True, kw_only=True)
class LocalTraining:
    """How a client trains in one round: SGD with Nesterov momentum.

    Attributes:
        epochs: passes over its samples.
        batch_size: samples a step.
        lr: learning rate, the same in all steps of the round.
        seed: of order, augmentation and dropout (``of_client``).
        autocast: forwards run in bfloat16 where that is safe and the device computes it.
        round: number of the round, from 0.
        recalibrate: batch norm is measured anew after the training, not after a new mask alone.
    """

    epochs: int
    batch_size: int
    lr: float
    seed: int
    autocast: bool = False
    round: int = 0
    recalibrate: bool = False

    def of_client(self, number: int) -> "LocalTraining":
        """Return the training of one client in one round, with a seed of its own."""
        return replace(self, seed=derived(self.seed, self.round, number))


def derived(seed: int, *numbers: int) -> int:
    """Return a seed of its own for numbers such as round and client."""
    return derived_seed(f"federation:{seed}:{numbers}")


def first_server(model: nn.Module) -> Server:
    """Return the state before the first round: every weight of a network stays."""
    mask = dense_mask(model)
    tensors = {name: value.clone() for name, value in travelling(model).items()}
    return Server(tensors=tensors, mask=mask, before=mask)


def travelling(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that are sent: no counters, as ``num_batches_tracked``."""
    return {n: t.detach() for n, t in state_tensors(model).items() if t.is_floating_point()}


def send(server: Server, known: int) -> bytes:
    """Return the message to a client that knows the mask of version ``known``.

    A client that has missed a change gets the bits of all weights.
    """
    bits, base = None, known
    if known != server.version:
        base = known if known == server.version - 1 else 0
        whole = WeightMask({n: torch.ones_like(keep) for n, keep in server.mask.keep.items()})
        bits = mask_bits(server.mask, server.before if base else whole)
    header = Header(version=server.version, base=base, digest=server.mask.digest())
    return pack(header, server.tensors, server.mask, bits)


def train_client(
    task: Task,
    network: nn.Module,
    client: Client,
    split: TrainSplit,
    message: bytes,
    training: LocalTraining,
) -> tuple[Client, bytes]:
    """Train on a client's samples; return its new state and the reply.

    Args:
        task: gives the loss.
        network: of the federation's structure; it stays as it is.
        client: its state.
        split: its samples.
        message: of the server.
        training: how.

    Raises:
        PruneGraphError: the loss becomes NaN or infinite, there are no samples, or the message is
            damaged.
    """
    if len(split) == 0:
        msg = "a client has no samples: give it some, or leave it out of the federation"
        raise ConfigError(msg)
    header, content = open_message(message)
    whole = {name: torch.ones_like(keep) for name, keep in client.mask.keep.items()}
    base = client.mask if header.base else WeightMask(whole)
    mask = with_bits(base, content.get("mask"), header.digest)
    model = copy_network(network)
    load_tensors(model, weights_of(content, travelling(model), mask))
    loss = _train(task, model, mask, split, training)
    if has_batch_norm(model) and (training.recalibrate or header.version != client.version):
        order = torch.Generator().manual_seed(training.seed)  # the split's may be of the classes
        batches = whole_batches(split.batches(training.batch_size, shuffle=order))
        recalibrate_bn(model, batches, forward=task.forward)
    reply = replace(header, base=header.version, samples=len(split), loss=loss)
    packed = pack(reply, travelling(model), mask)
    return Client(mask=mask, version=header.version), packed


@torch.no_grad()
def load_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Write what has travelled into a network."""
    for name, value in travelling(model).items():
        value.copy_(tensors[name])


def average(server: Server, replies: Sequence[bytes]) -> tuple[Server, float]:
    """Return the server with the clients' weights averaged by their samples, and the mean loss.

    Args:
        server: its state.
        replies: in the order of the clients, so that sums are the same to the bit.
    """
    opened = [open_message(reply) for reply in replies]
    total = sum(header.samples for header, _ in opened)
    sums = {name: torch.zeros(t.shape, dtype=torch.float64) for name, t in server.tensors.items()}
    loss = 0.0
    for header, content in opened:
        share = header.samples / total
        loss += share * header.loss
        for name, value in weights_of(content, server.tensors, server.mask).items():
            sums[name] += share * value.double()
    tensors = {name: sums[name].to(t.dtype) for name, t in server.tensors.items()}
    return replace(server, tensors=tensors, round=server.round + 1), loss


def prune(server: Server, sparsity: float) -> Server:
    """Return the server with the smallest weights of all layers zero, of those that it keeps."""
    if sparsity <= server.mask.sparsity:
        return server
    scores = {name: server.tensors[name].abs() for name in server.mask.keep}
    return _with_mask(server, least_mask(scores, sparsity, server.mask))


def hold_zeros(server: Server) -> Server:
    """Return the server with a mask of the weights that are not zero."""
    mask = WeightMask({name: server.tensors[name] != 0 for name in server.mask.keep})
    return server if mask == server.mask else _with_mask(server, mask)


def _with_mask(server: Server, mask: WeightMask) -> Server:
    tensors = dict(server.tensors)
    for name, keep in mask.keep.items():
        tensors[name] = tensors[name].masked_fill(~keep.to(tensors[name].device), 0.0)
    return replace(
        server, tensors=tensors, mask=mask, before=server.mask, version=server.version + 1
    )


def _train(
    task: Task, model: nn.Module, mask: WeightMask, split: TrainSplit, training: LocalTraining
) -> float:
    """Train a network in place; return its mean loss."""
    size = 1 if isinstance(split.source, ReadyBatches) else training.batch_size
    full, rest = divmod(len(split), size)
    steps = full + (rest > 1 or not full)  # batch norm cannot train on one sample
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer("sgd", trained, training.lr)
    masked = MaskedWeights(model, optimizer, mask)
    device, losses = trained[0].device, list[float]()
    model.train()
    with seeded(training.seed):
        order = torch.Generator().manual_seed(training.seed)
        for _ in range(training.epochs):
            batches = split.batches(training.batch_size, shuffle=order, augment=order)
            for batch in islice(batches, steps):
                with SoundConvolutions():
                    with autocasting(device, wanted=training.autocast and task.autocast):
                        loss = task.loss(model, task.place(batch, model))
                    losses.append(float(loss.detach()))
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()
                optimizer.step()
    masked.finish()
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean):
        msg = (
            f"a client's training loss is {mean} in round {training.round + 1}: lower lr, now "
            f"{training.lr:g}"
        )
        raise PruneGraphError(msg)
    return mean
