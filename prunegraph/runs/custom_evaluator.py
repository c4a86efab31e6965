"""Scores of masks by what the owner of a network says of it."""

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunegraph.core.errors import ArtefactError, MaskError, ModelError, one_line
from prunegraph.core.files import write_json
from prunegraph.core.masks import ChannelMask
from prunegraph.core.outcome import Outcome
from prunegraph.core.reading import checked, read_json
from prunegraph.graph import StructureGraph
from prunegraph.graph.apply import apply_mask
from prunegraph.layerwise.reconstruct import Reconstruction
from prunegraph.rewards import pack_bits, unpack_bits

SCORES = {"reconstruct": bool, "scores": dict[str, float], "search": dict[str, Any]}
"""What a checkpoint keeps beside the agent."""


class CustomEvaluator:
    """Scores masks by a function of the pruned, recalibrated network.

    Args:
        model: the dense network; never changed.
        graph: its structure.
        score: of a network, higher = better.
        recalibrate: sends a network forward in training mode of its batch norms.
        reconstruction: changes the weights that stay; None = they stay as they are.
        identity: JSON values that name the search whose scores ``save`` and ``load`` keep.

    Attributes:
        num_networks: pruned networks that were asked for; those of an earlier start count again.
        found: their outcomes.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: StructureGraph,
        score: Callable[[nn.Module], float],
        recalibrate: Callable[[nn.Module], None],
        reconstruction: Reconstruction | None = None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self._model, self._graph = model, graph
        self._identity = dict(identity or {})
        self._score, self._recalibrate = score, recalibrate
        self._reconstruction = reconstruction
        self._path: Path | None = None
        self.num_networks = 0
        self.found: dict[ChannelMask, Outcome] = {}
        self._scored: dict[ChannelMask, Outcome] = {}

    def evaluate(self, mask: ChannelMask, subset: Tensor | None = None) -> Outcome:
        """Return the outcome of a mask; an equal call, or earlier start, ran its network."""
        del subset  # the score is of all that its owner looks at
        if mask not in self.found:
            if mask not in self._scored:
                self._scored[mask] = self._measure(mask)
                if self._path is not None:
                    self.save(self._path)
            self.found[mask] = self._scored[mask]
            self.num_networks += 1
        return self.found[mask]

    def state(self) -> list[str]:
        """Return which masks were asked for, for the agent's checkpoint (``Memory``)."""
        return [pack_bits(mask.keep) for mask in self.found]

    def restore(self, state: Any) -> None:
        """Know again which masks were asked for before the agent's checkpoint."""
        for bits in checked(state, list[str], "its memory"):
            mask = self._graph.mask(unpack_bits(bits, self._graph.num_units))
            if mask not in self._scored:
                msg = "the scores beside the checkpoint lack some of its masks: give another one"
                raise ArtefactError(msg)
            self.found[mask] = self._scored[mask]

    def divergence(self, mask: ChannelMask) -> float:
        """Return a mask's score with the sign changed."""
        return -self.evaluate(mask).accuracy

    def draw_subset(self, size: int, seed: int) -> Tensor:
        """Return no positions: there is nothing to draw from."""
        del size, seed
        return torch.empty(0, dtype=torch.int64)

    def prune(self, mask: ChannelMask, reconstruction: Reconstruction | None = None) -> nn.Module:
        """Return the pruned, recalibrated network; another reconstruction may be asked for."""
        pruned = apply_mask(self._model, self._graph, mask).eval()
        reconstruction = reconstruction or self._reconstruction
        if reconstruction is not None:
            reconstruction.apply(pruned, mask)
        self._recalibrate(pruned)
        return pruned

    def better(
        self, mask: ChannelMask, ways: Sequence[Callable[[], Reconstruction]]
    ) -> tuple[nn.Module, float]:
        """Return a known mask's network and score, or those with another reconstruction if better.

        The first of the others that can be had is tried. None need succeed.
        """
        found, problem = (self.prune(mask), self.found[mask].accuracy), None
        for way in ways:
            try:
                network = self.prune(mask, way())
                other = network, self.score(network)
            except Exception as error:  # memory, a batch of another size, a score of nan
                problem = one_line(error)
            else:
                return max(found, other, key=lambda pair: pair[1])
        if problem is not None:
            warnings.warn(f"the network is not fitted layer by layer: {problem}", stacklevel=3)
        return found

    def save(self, path: Path) -> None:
        """Write what was found, so that an interrupted search runs no network again."""
        scores = {pack_bits(mask.keep): found.accuracy for mask, found in self._scored.items()}
        reconstruct = self._reconstruction is not None
        content = {"reconstruct": reconstruct, "scores": scores, "search": self._identity}
        write_json(path, content)

    def resume(self, checkpoint: Path) -> None:
        """Go on with what is known beside the agent's checkpoint; keep every score there.

        Raises:
            ArtefactError: the checkpoint is damaged, or of another network or search.
        """
        path = checkpoint.with_suffix(".json")
        if path.is_file():
            self.load(path)
        elif checkpoint.is_file():
            msg = f"{checkpoint} has lost {path.name}, which names its search: give another one"
            raise ArtefactError(msg)
        self.save(path)  # before the agent's, which does not name the search
        self._path = path

    def load(self, path: Path) -> None:
        """Go on with what ``save`` wrote.

        Raises:
            ArtefactError: the file is damaged, or of another network or search.
        """
        content = checked(read_json(path), SCORES, str(path))
        if content["reconstruct"] != (self._reconstruction is not None):
            msg = (
                f"{path} holds scores of a search with reconstruct={content['reconstruct']}: give "
                "that again, or another checkpoint"
            )
            raise ArtefactError(msg)
        for name, value in self._identity.items():
            theirs = content["search"].get(name)
            if theirs != value:
                msg = f"{path} is of a search with {name} {theirs}, not {value}: give another one"
                raise ArtefactError(msg)
        for bits, score in content["scores"].items():
            try:
                mask = self._graph.mask(unpack_bits(bits, self._graph.num_units))
            except (ValueError, MaskError) as error:
                msg = f"{path} holds no masks of this network ({error}): delete it to start over"
                raise ArtefactError(msg) from error
            self._scored[mask] = self._outcome(mask, score, 0.0)

    def score(self, network: nn.Module) -> float:
        """Return what the owner says of a network.

        Raises:
            ModelError: no number.
        """
        answer = self._score(network)
        try:
            score = float(answer)
        except (TypeError, ValueError, RuntimeError):  # no number at all
            score = math.nan
        if not math.isfinite(score):
            msg = f"evaluate returned {answer}: return a number, 0 at worst"
            raise ModelError(msg)
        return score

    def _measure(self, mask: ChannelMask) -> Outcome:
        started = time.perf_counter()
        score = self.score(self.prune(mask))
        return self._outcome(mask, score, time.perf_counter() - started)

    def _outcome(self, mask: ChannelMask, score: float, seconds: float) -> Outcome:
        return Outcome(
            accuracy=score,
            loss=-score,
            kl=None,
            num_images=1,
            cost=self._graph.cost(mask),
            digest=mask.digest(),
            seconds=seconds,
        )
