"""Ledgers and multipliers of all (network, budget) pairs: from finished episodes to rewards.

Episodes come in *blocks*: those of one update, scored on one image subset. All episodes of a block
are compared with the ledger as it stood at the block's start and recorded when the next one begins.
So rewards do not depend on the order in which parallel workers finish, and a mask is never compared
with one that was measured on other images.
"""

from collections.abc import Sequence

from prunegraph.core.errors import ConfigError
from prunegraph.rewards.config import RewardConfig
from prunegraph.rewards.episode import Episode
from prunegraph.rewards.forms import Reward, score
from prunegraph.rewards.lagrangian import LagrangianMultiplier
from prunegraph.rewards.ledger import SelfCompetitionLedger


class SelfCompetition:
    """Turns finished episodes into rewards.

    A caller goes: ``begin_block(k)``; for each pair of the block ``mask_to_measure(pair)``, and if
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

    def ledger(self, pair: str) -> SelfCompetitionLedger:
        """Return the past of a (network, budget) pair, as of the block's start."""
        return self.ledgers.get(pair, SelfCompetitionLedger())

    def multiplier(self, pair: str) -> LagrangianMultiplier:
        """Return the multiplier of a (network, budget) pair."""
        return self.multipliers.get(pair, LagrangianMultiplier(value=0.0))

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
        for pair in sorted({episode.pair for episode in self.pending}):
            episodes = [episode for episode in self.pending if episode.pair == pair]
            self._record(pair, episodes)
        self.block = block
        self.pending = []
        self.measured = set()

    def _record(self, pair: str, episodes: Sequence[Episode]) -> None:
        ledger = self.ledger(pair)
        for episode in episodes:
            ledger = ledger.update(episode, self.config)
        self.ledgers[pair] = ledger
        mean = sum(episode.overshoot for episode in episodes) / len(episodes)
        self.multipliers[pair] = self.multiplier(pair).update(mean, self.config)

    def mask_to_measure(self, pair: str) -> str | None:
        """Return the packed mask that must be measured on this block's images before ``score``.

        The best mask so far for ``"best"``; None if there is none, if it was measured in this
        block, or for the other forms.
        """
        if self.config.self_competition != "best" or pair in self.measured:
            return None
        return self.ledger(pair).best_bits

    def set_bar(self, pair: str, measured: Episode) -> None:
        """Set what the pair's episodes are compared with in this block.

        Args:
            pair: the (network, budget) pair.
            measured: figures of the best mask on this block's images; the first one of a pair
                becomes its best.
        """
        self.measured.add(pair)
        if pair not in self.ledgers:
            self.ledgers[pair] = self.ledger(pair).update(measured, self.config)
        self.ledgers[pair] = self.ledgers[pair].set_bar(measured.metric(self.config.metric))

    def score(self, episodes: Sequence[Episode]) -> list[Reward]:
        """Return the rewards of episodes of the current block, and keep them for the ledger."""
        rewards = [
            score(
                self.config,
                self.ledger(episode.pair),
                episode,
                multiplier=self.multiplier(episode.pair).value,
            )
            for episode in episodes
        ]
        self.pending.extend(episodes)
        return rewards
