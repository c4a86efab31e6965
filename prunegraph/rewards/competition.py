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
from prunegraph.rewards.forms import Reward, comparison_bar, score
from prunegraph.rewards.lagrangian import LagrangianMultiplier
from prunegraph.rewards.ledger import SelfCompetitionLedger

COMPETITION_CONTEXT_NAMES = ("bar", "feasible_found", "multiplier")
"""What the critic sees of the ledger; the last columns of the observation's context."""

CONTEXT_NAMES = (
    "keep_macs",
    "keep_params",
    "cost_so_far",
    "step_share",
    *COMPETITION_CONTEXT_NAMES,
)
"""Columns of the observation's context: the shares that may remain (1 = no limit); the share of the
dense cost that remains with the decisions made so far; the share of the episode's steps made; then
what the critic alone should see: the bar to beat, whether something feasible was found, the
multiplier."""


class SelfCompetition:
    """Turns finished episodes into rewards.

    A caller goes: ``begin_block(k)``; for each cell of the block ``mask_to_measure(cell)``, and if
    it is one, measure it on the block's images and ``set_reference``; then ``score`` episodes.

    Args:
        config: the form and its options.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.block = 0
        self.ledgers: dict[str, SelfCompetitionLedger] = {}
        self.multipliers: dict[str, LagrangianMultiplier] = {}
        self.references: dict[str, float] = {}
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
        self.references = {}

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
        block, or for the other forms (``"greedy"``: the caller knows the policy).
        """
        if self.config.self_competition != "best" or cell in self.references:
            return None
        return self.ledger(cell).best_bits

    def set_reference(self, cell: str, measured: Episode) -> None:
        """Set what the cell's episodes are compared with in this block.

        Args:
            cell: the (network, budget) pair.
            measured: figures of the best or greedy mask on this block's images.
        """
        metric = measured.metric(self.config.metric)
        self.references[cell] = metric
        if self.config.self_competition == "best" and cell in self.ledgers:
            self.ledgers[cell] = self.ledgers[cell].set_bar(metric)

    def score(self, episodes: Sequence[Episode]) -> list[Reward]:
        """Return the rewards of episodes of the current block, and keep them for the ledger."""
        rewards = [
            score(
                self.config,
                self.ledger(episode.cell),
                episode,
                multiplier=self.multiplier(episode.cell).value,
                reference=self.references.get(episode.cell),
            )
            for episode in episodes
        ]
        self.pending.extend(episodes)
        return rewards

    def context(self, cell: str) -> tuple[float, float, float]:
        """Return the values of ``COMPETITION_CONTEXT_NAMES``, not clipped."""
        ledger = self.ledger(cell)
        bar = comparison_bar(self.config, ledger, self.references.get(cell))
        price = self.multiplier(cell).value if self.config.uses_multiplier else 0.0
        return (0.0 if bar is None else bar), float(ledger.feasible_found), price

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "block": self.block,
            "ledgers": {cell: ledger.to_dict() for cell, ledger in self.ledgers.items()},
            "multipliers": {cell: item.to_dict() for cell, item in self.multipliers.items()},
            "references": dict(self.references),
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
        self.references = dict(state["references"])
        self.pending = [Episode.from_dict(values) for values in state["pending"]]
