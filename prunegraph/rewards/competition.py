"""Ledgers and multipliers of all (network, budget) pairs: from finished episodes to rewards.

Episodes come in *blocks*: those of one update, scored on one image subset. All episodes of a block
are compared with the ledger as it stood at the block's start and recorded when the next one begins.
So rewards do not depend on the order in which parallel workers finish, and a mask is never compared
with one that was measured on other images.
"""

from collections.abc import Sequence
from typing import Any

from prunegraph.core.errors import ConfigError
from prunegraph.rewards.config import RewardConfig
from prunegraph.rewards.episode import Episode
from prunegraph.rewards.forms import Reward, score
from prunegraph.rewards.lagrangian import LagrangianMultiplier
from prunegraph.rewards.ledger import SelfCompetitionLedger


class SelfCompetition:
    """Turns finished episodes into rewards.

    A caller goes: ``begin_block(k)``; for each cell of the block ``mask_to_measure(cell)``, and if
    it is one, measure it on the block's images and ``set_bar``; then ``score`` episodes.

    Args:
        config: the form and its options.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.block = 0
        self.ledgers: dict[str, SelfCompetitionLedger] = {}
        self.multipliers: dict[str, LagrangianMultiplier] = {}
        self.measured: set[str] = set()
        self.pending: list[Episode] = []

    def ledger(self, cell: str) -> SelfCompetitionLedger:
        """Return the past of a (network, budget) pair, as of the block's start."""
        return self.ledgers.get(cell, SelfCompetitionLedger())

    def multiplier(self, cell: str) -> LagrangianMultiplier:
        """Return the multiplier of a (network, budget) pair."""
        start = LagrangianMultiplier(value=self.config.multiplier_start)
        return self.multipliers.get(cell, start)

    def begin_block(self, block: int) -> None:
        """Record the last block's episodes and forget what was measured on its images.

        Does nothing if the block has begun already.

        Raises:
            ConfigError: an earlier block.
        """
        if block < self.block:
            msg = f"block {block} is over, block {self.block} has begun: blocks come in order"
            raise ConfigError(msg)
        if block == self.block:
            return
        for cell in sorted({episode.cell for episode in self.pending}):
            episodes = [episode for episode in self.pending if episode.cell == cell]
            self._record(cell, episodes)
        self.block = block
        self.pending = []
        self.measured = set()

    def _record(self, cell: str, episodes: Sequence[Episode]) -> None:
        ledger = self.ledger(cell)
        for episode in episodes:
            ledger = ledger.update(episode, self.config)
        self.ledgers[cell] = ledger
        mean = sum(episode.overshoot for episode in episodes) / len(episodes)
        self.multipliers[cell] = self.multiplier(cell).update(mean, self.config)

    def mask_to_measure(self, cell: str) -> str | None:
        """Return the packed mask that must be measured on this block's images before ``score``.

        The best mask so far for ``"best"``; None if there is none, if it was measured in this
        block, or for the other forms.
        """
        if self.config.self_competition != "best" or cell in self.measured:
            return None
        return self.ledger(cell).best_bits

    def set_bar(self, cell: str, measured: Episode) -> None:
        """Set what the cell's episodes are compared with in this block.

        Args:
            cell: the (network, budget) pair.
            measured: figures of the best mask on this block's images; the first one of a cell
                becomes its best.
        """
        self.measured.add(cell)
        if cell not in self.ledgers:
            self.ledgers[cell] = self.ledger(cell).update(measured, self.config)
        self.ledgers[cell] = self.ledgers[cell].set_bar(measured.metric(self.config.metric))

    def score(self, episodes: Sequence[Episode]) -> list[Reward]:
        """Return the rewards of episodes of the current block, and keep them for the ledger."""
        rewards = [
            score(
                self.config,
                self.ledger(episode.cell),
                episode,
                multiplier=self.multiplier(episode.cell).value,
            )
            for episode in episodes
        ]
        self.pending.extend(episodes)
        return rewards

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "block": self.block,
            "ledgers": {cell: ledger.to_dict() for cell, ledger in self.ledgers.items()},
            "multipliers": {cell: item.to_dict() for cell, item in self.multipliers.items()},
            "measured": sorted(self.measured),
            "pending": [episode.to_dict() for episode in self.pending],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what ``state_dict`` returned."""
        self.block = state["block"]
        self.ledgers = {
            cell: SelfCompetitionLedger.from_dict(values)
            for cell, values in state["ledgers"].items()
        }
        self.multipliers = {
            cell: LagrangianMultiplier.from_dict(values)
            for cell, values in state["multipliers"].items()
        }
        self.measured = set(state["measured"])
        self.pending = [Episode.from_dict(values) for values in state["pending"]]
