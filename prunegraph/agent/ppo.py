"""PPO on a thousand bits that share one reward."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from prunegraph.agent.config import PPOConfig
from prunegraph.agent.distribution import MaskedBernoulli
from prunegraph.agent.policy import ChannelPruningPolicy
from prunegraph.agent.surrogate import Surrogate
from prunegraph.agent.vec_env import SelfCompetitionVecEnv
from prunegraph.core.budget import Budget
from prunegraph.core.errors import ConfigError
from prunegraph.core.masks import BoolArray, FloatArray
from prunegraph.core.seeding import seeded

ROLLOUT_BITS = 200_000
"""Bits of all surrogate rollouts of a step together: fewer episodes for larger networks."""

LEAST_ROLLOUTS, MOST_ROLLOUTS = 32, 384
"""Surrogate episodes a step for each network and budget."""

MOST_RATIO = 10.0
"""New over old probability of a bit, beyond which it is pushed down no more. Without a bound, as in
dual-clip PPO (Ye et al. 2020, arXiv 1912.09729), bits that were unlikely explode the offsets."""

CLIP_RANGE = 0.2
"""How far a bit's probability ratio may move before its gradient stops. The ratio of a whole action
would fill it at once: with 1,120 bits at a logit change of 0.013."""

MANY_BITS = 4500
"""Of more, the temperature is lower: noise of single bits costs a wide network more, and as few
masks teach less of each. Of a language model of 47,000 units a third is taken."""

MAX_GRAD_NORM = 0.5
"""Length to which a longer gradient is cut."""

SURROGATE_LEARNING_RATE = 3e-4
"""Adam's step size in a step on surrogate rollouts."""

CAUTION, SWAP_CAUTION = 0.5, 1.0
"""Deviations of its own error by which a prediction is lowered: of rollouts, of swapped masks."""

EQUAL = 1e-5
"""Advantages that differ by less, relative to the largest, are equal: rewards lose digits."""

MOST_UPDATES = 3
"""Updates at the most, in those that the networks would pay for if no mask came twice: of a small
network all masks may have been run, and those that come again are not counted."""


class ChannelPPO(PPO):
    """Proximal policy optimisation whose unit is the keep bit.

    stable-baselines3 clips the ratio of joint probabilities. Here each bit's ratio is clipped alone
    and every free bit of an episode shares the episode's advantage. Rollout, buffer, logging and
    callbacks are those of stable-baselines3. Sampling noise and the environments' randomness begin
    anew from (seed, number of the update) at each update.

    Args:
        env: environments, vectorised; their seeds are their own.
        policy_kwargs: arguments of ``ChannelPruningPolicy``.
        num_steps: steps of each environment in an update.
        config: options of the update.
        seed: seed of initial weights and sampling noise.

    Attributes:
        num_rollouts: updates begun, this one included.
        max_networks: no update begins that could run more pruned networks than this.
        history: one record an update.
        surrogate: predicts what masks reach, if episodes are predicted.
        progress: called with the record of each update: between two updates, which is where
            stable-baselines3 has no callback.
    """

    policy: ChannelPruningPolicy

    def __init__(
        self,
        env: SelfCompetitionVecEnv,
        *,
        policy_kwargs: dict[str, Any],
        num_steps: int,
        config: PPOConfig,
        seed: int = 0,
    ) -> None:
        self.config = config
        self.run_seed = seed
        self.num_rollouts = 0
        self.max_networks: int | None = None
        self.history: list[dict[str, Any]] = []
        self.progress: Callable[[dict[str, Any]], None] | None = None
        with seeded(seed):
            super().__init__(
                ChannelPruningPolicy,
                env,
                learning_rate=config.learning_rate,
                n_steps=num_steps,
                batch_size=num_steps * env.num_envs,
                n_epochs=config.epochs,
                gamma=1.0,
                gae_lambda=1.0,
                clip_range=CLIP_RANGE,
                max_grad_norm=MAX_GRAD_NORM,
                policy_kwargs=policy_kwargs,
                device="cpu",  # the network is small
            )
        most = max(threshold.num_channels for threshold in self.policy.thresholds.values())
        self._calm = min(1.0, math.sqrt(MANY_BITS / most))
        self.policy.initial_temperature = self._calm * config.temperature_start
        self.surrogate = Surrogate(self.policy.thresholds, self.policy.network.prior)
        if config.surrogate_steps and config.swaps:
            self.policy.plan = partial(self.surrogate.plan, most=config.swaps, caution=SWAP_CAUTION)
        env.greedy = self.greedy_mask

    @property
    def competitors(self) -> SelfCompetitionVecEnv:
        """The environments."""
        return cast(SelfCompetitionVecEnv, self.env)

    @property
    def num_networks(self) -> int:
        """Pruned networks run so far."""
        return self.competitors.num_networks

    def collect_rollouts(
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: RolloutBuffer,
        n_rollout_steps: int,
    ) -> bool:
        """Collect one update's episodes; False = the networks are used up, or there are no more."""
        progress = 0.0
        if self.max_networks is not None:
            if self.num_networks + self.networks_per_update > self.max_networks:
                return False
            num_updates = self.max_networks // self.networks_per_update
            if self.num_rollouts >= MOST_UPDATES * num_updates:
                return False
            progress = self.num_rollouts / max(num_updates - 1, 1)
        self.policy.temperature = self._calm * self.config.temperature(progress)
        # Only a threshold that is solved anew keeps noisy scores within the budget.
        solved = self.policy.constraint == "bias"
        self.policy.group_noise = self.config.group_noise(progress) if solved else 0.0
        self.policy.noises = []
        self.policy.embeddings = {}
        self.policy.num_acted = 0
        seed = update_seed(self.run_seed, self.num_rollouts)
        self.policy.generator = torch.Generator().manual_seed(seed)
        self.policy.noise_generator = torch.Generator().manual_seed(seed ^ 1)  # a stream apart
        self._last_obs = self.competitors.start_block(self.num_rollouts)
        self._last_episode_starts = np.ones(env.num_envs, dtype=bool)
        self.num_rollouts += 1
        collected = super().collect_rollouts(env, callback, rollout_buffer, n_rollout_steps)
        self.policy.embeddings = None  # the encoder learns
        return collected

    @property
    def networks_per_update(self) -> int:
        """Pruned networks that an update runs, its episodes and what they compete with."""
        env = self.competitors
        competes = env.competition.config.self_competition == "best"
        return env.episodes_per_update + competes * env.cells_per_update

    def greedy_mask(self, row: Mapping[str, FloatArray], budget: Budget) -> BoolArray:
        """Return the mask that the policy would choose on one observation, offsets included."""
        graph_id = int(row["graph_id"][0])
        budget_threshold = self.policy.thresholds[graph_id]
        num_features = len(self.policy.network_config.feature_names)
        features = row["node_features"].reshape(-1, num_features)[: budget_threshold.num_channels]
        scores = self.policy.network.logits(budget_threshold.data, features, row["context"])
        scores = scores + self.policy.offsets(graph_id).detach().cpu().numpy()
        return budget_threshold.graph.project(scores, budget).keep

    def train(self) -> None:
        """Update the policy on the whole rollout, ``epochs`` times."""
        self.policy.set_training_mode(True)
        observations, actions, returns = self._rollout()
        advantages = standardise(returns, self._pairs(observations, "step_share"))
        ids = observations["graph_id"].reshape(-1).long()
        noise = torch.cat(self.policy.noises) if self.policy.noises else None  # [B, G_max]
        old_bits: Tensor | None = None
        for _ in range(self.config.epochs):
            distribution = self.policy.decide(observations, noise)
            bits = distribution.log_prob_bits(actions)  # [B, N]
            old_bits = bits.detach() if old_bits is None else old_bits
            loss, logs = self._loss(distribution, bits - old_bits, advantages)
            if noise is not None and self.config.group_noise_weight:
                gain = self._noise_gain(ids, distribution, advantages, noise)
                loss = loss - self.config.group_noise_weight * gain
            self._descend(loss, self.config.learning_rate)
            if self.config.learning_rate:  # a policy that does not learn only samples
                rates = (self.config.offset_rate, self.config.group_offset_rate)
                self._move_offsets(
                    ids, distribution, *(rate / self.config.epochs for rate in rates)
                )
            self._n_updates += 1
        if self.config.learning_rate and noise is not None:
            self._follow_noise(ids, distribution, advantages, noise, self.config.group_noise_rate)
        if self.config.surrogate_steps:
            self._remember(observations, ids)
            if self.config.learning_rate:
                self._learn_from_surrogate(observations)
        self._log(logs, distribution, actions)
        if self.progress is not None:
            self.progress(self.history[-1])

    def _descend(self, loss: Tensor, learning_rate: float) -> None:
        """Step the policy network; the offsets keep their gradients."""
        for group in self.policy.optimizer.param_groups:
            group["lr"] = learning_rate
        self.policy.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy.network.parameters(), MAX_GRAD_NORM)
        self.policy.optimizer.step()

    @torch.no_grad()
    def _move_offsets(
        self, ids: Tensor, distribution: MaskedBernoulli, rate: float, group_rate: float
    ) -> None:
        """Step the instance offsets of the networks ``ids`` ``[B]`` along their gradients."""
        probabilities = distribution.probabilities()
        per_bit = distribution.num_free().double()  # the loss is a mean over them
        for graph_id in ids.unique().tolist():
            rows = ids == graph_id
            size = self.policy.thresholds[graph_id].num_channels
            mask = distribution.mask[rows, :size]
            decided, num_rows = mask.any(dim=0), mask.sum(dim=0).clamp(min=1)
            kept = torch.where(mask, probabilities[rows, :size], 0.0).sum(dim=0) / num_rows
            weight = (mask * per_bit[rows, None]).sum(dim=0) / num_rows
            self.policy.offsets.ascend(
                graph_id,
                torch.where(decided, kept, 1.0),
                rate=rate,
                group_rate=group_rate,
                scale=(weight * self.policy.temperature * len(ids) / num_rows).float(),
            )

    @torch.no_grad()
    def _follow_noise(
        self,
        ids: Tensor,
        distribution: MaskedBernoulli,
        advantages: Tensor,
        noise: Tensor,
        rate: float,
    ) -> None:
        """Move the groups' offsets along the noise that paid (evolution strategies)."""
        for graph_id in ids.unique().tolist():
            rows = ids == graph_id
            graph = self.policy.thresholds[graph_id].graph
            gains = advantages[rows, None] * noise[rows, : len(graph.groups)]
            mask = distribution.mask[rows, : graph.num_units]
            self.policy.offsets.follow(graph_id, gains, mask, rate)

    def _noise_gain(
        self, ids: Tensor, distribution: MaskedBernoulli, advantages: Tensor, noise: Tensor
    ) -> Tensor:
        """Return what moves the groups' mean scores along the noise that paid.

        Its gradient is that of a Gaussian policy of the groups' scores, ``A noise / deviation^2``,
        in the units of the bits' loss.
        """
        scores = distribution.logits * self.policy.temperature
        free, gain = distribution.num_free(), noise.new_zeros(())
        for graph_id in ids.unique().tolist():
            rows = ids == graph_id
            group_of = self.policy.thresholds[graph_id].data.group_of.to(noise.device)
            count = int(group_of.max()) + 1
            decides = distribution.mask[rows, : len(group_of)].float()
            index = group_of.expand(len(decides), -1)
            zeros = noise.new_zeros(len(decides), count)
            sizes = zeros.scatter_add(1, index, decides)
            sums = zeros.scatter_add(1, index, decides * scores[rows, : len(group_of)])
            paid = advantages[rows, None] * noise[rows, :count] * (sizes > 0)
            gain = gain + (paid * sums / sizes.clamp(min=1.0) / free[rows, None]).sum()
        return gain / self.policy.group_noise**2 / len(ids)

    def _remember(self, observations: dict[str, Tensor], ids: Tensor) -> None:
        """Show the surrogate this update's episodes."""
        competition = self.competitors.competition
        if len(competition.pending) != len(ids):
            msg = (
                f"surrogate_steps={self.config.surrogate_steps} needs episodes of one step: "
                "set it to 0 for episodes that go group by group"
            )
            raise ConfigError(msg)
        num_features = len(self.policy.network_config.feature_names)
        self.surrogate.remember(
            competition.pending,
            ids.tolist(),
            observations["node_features"].reshape(len(ids), -1, num_features),
            metric=competition.config.metric,
            update=self.num_rollouts,
        )

    def _learn_from_surrogate(self, observations: dict[str, Tensor]) -> None:
        """Train on episodes that the surrogate predicts, on fresh ones at each step.

        The heads and the offsets learn; the encoder, most of the work, learns from run episodes.
        """
        pairs = self._pairs(observations)
        first = [int(torch.nonzero(pairs == pair)[0]) for pair in pairs.unique()]
        rows = {name: value[first] for name, value in observations.items()}
        copies = min(
            max(ROLLOUT_BITS // rows["action_mask"].numel(), LEAST_ROLLOUTS), MOST_ROLLOUTS
        )
        ids = rows["graph_id"].reshape(-1).long().repeat_interleave(copies)
        pairs = pairs[first].repeat_interleave(copies)
        context = rows["context"].repeat_interleave(copies, dim=0)
        limits = self.policy.limits(ids.tolist(), context)
        generator = torch.Generator().manual_seed(update_seed(self.run_seed, self.num_rollouts) ^ 2)
        with torch.no_grad():
            embeddings = self.policy.embed(rows)
        for _ in range(self.config.surrogate_steps):
            noise = self.policy.antithetic_noise(len(ids), generator)
            distribution = self.policy.decide(rows, noise, embeddings)
            bits = distribution.sample(generator)
            rewards = self.surrogate.rewards(ids, bits, limits, pairs, caution=CAUTION)
            advantages = standardise(rewards, pairs)
            log_prob = distribution.log_prob_bits(bits)
            weights = advantages[:, None] / distribution.num_free()[:, None] / len(ids)
            self._descend(-(weights * log_prob).sum(), SURROGATE_LEARNING_RATE)
            self._move_offsets(ids, distribution, self.config.surrogate_rate, 0.0)
            self._follow_noise(ids, distribution, advantages, noise, self.config.surrogate_rate)

    def _rollout(self) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return observations, actions and returns of the rollout, step by step.

        The order is by step and then by environment, whatever the number of environments: sums in
        another order would differ in the last digits.
        """
        buffer = self.rollout_buffer

        def flat(array: np.ndarray[Any, Any]) -> Tensor:
            return torch.as_tensor(array.reshape(-1, *array.shape[2:]), device=self.device).float()

        observations = {name: flat(array) for name, array in buffer.observations.items()}  # type: ignore[attr-defined]
        return observations, flat(buffer.actions), flat(buffer.returns)

    def _pairs(self, observations: dict[str, Tensor], *others: str) -> Tensor:
        """Return which (network, budget) each row belongs to ``[B]``, told apart by ``others`` too.

        Args:
            observations: of B rows.
            others: further columns of the context.
        """
        names = self.policy.network_config.context_names
        kept = ("keep_macs", "keep_params", *others)
        columns = [i for i, name in enumerate(names) if name in kept]
        keys = torch.cat([observations["graph_id"], observations["context"][:, columns]], dim=1)
        pairs: Tensor = torch.unique(keys, dim=0, return_inverse=True)[1]
        return pairs

    def _loss(
        self, distribution: MaskedBernoulli, log_ratio: Tensor, advantages: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the loss and what to log of it.

        Args:
            distribution: of the policy as it is.
            log_ratio: ``[B, N]`` new minus old log-probability of each bit.
            advantages: ``[B]``.
        """
        weights = distribution.mask / distribution.num_free()[:, None] / len(log_ratio)
        log_ratio = log_ratio.clamp(max=math.log(MOST_RATIO))
        ratio = log_ratio.exp()
        low, high = 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE
        gain = torch.minimum(
            advantages[:, None] * ratio, advantages[:, None] * ratio.clamp(low, high)
        )
        loss = -(weights * gain).sum()
        clipped = ((ratio - 1.0).abs() > CLIP_RANGE).float()
        return loss, {
            "policy_loss": loss.item(),
            "approx_kl": (weights * (ratio - 1.0 - log_ratio)).sum().item(),
            "clip_fraction": (weights * clipped).sum().item(),
            "entropy_per_bit": distribution.mean_entropy().mean().item(),
        }

    @torch.no_grad()
    def _log(self, logs: dict[str, float], distribution: MaskedBernoulli, actions: Tensor) -> None:
        distance = 2.0 * (distribution.probabilities() - 0.5).abs()
        logs["distance_to_uniform"] = distance[distribution.mask].mean().item()
        logs["equal_actions"] = equal_share(torch.where(distribution.mask, actions, 1.0))
        logs["temperature"] = self.policy.temperature
        record: dict[str, Any] = {"update": self.num_rollouts, "networks": self.num_networks}
        record |= summary(self.competitors.records)
        record["greedy_masks"] = dict(self.competitors.greedy_masks)
        self.history.append({**record, **logs})
        for name, value in self.history[-1].items():
            if isinstance(value, float):
                self.logger.record(f"train/{name}", value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")


def summary(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure over an update's episodes, and the best accuracy."""
    if not records:
        return {}
    means = {name: float(np.mean([row[name] for row in records])) for name in records[0]}
    return {**means, "best_accuracy": max(row["accuracy"] for row in records)}


def update_seed(seed: int, update: int) -> int:
    """Return a seed that (seed, number of the update) fix."""
    return int(np.random.SeedSequence([seed, update]).generate_state(1, np.uint64)[0] >> 1)


def standardise(advantages: Tensor, pairs: Tensor) -> Tensor:
    """Return advantages with mean 0 in each pair and standard deviation 1 over all.

    Args:
        advantages: ``[B]``.
        pairs: ``[B]`` which (network, budget) each belongs to: a network that is easier to prune
            must not make its masks look good. The only one of a pair gets 0, and so does each
            where all of a pair are equal but for rounding.
    """
    centred = advantages.clone()
    for pair in pairs.unique():
        members = pairs == pair
        centred[members] -= centred[members].mean()
    if centred.abs().max() <= EQUAL * max(1.0, float(advantages.abs().max())):
        return torch.zeros_like(centred)
    return centred / (centred.std(correction=0) + 1e-8)


def equal_share(actions: Tensor) -> float:
    """Return the share of actions ``[B, N]`` that repeat another one of the batch."""
    if len(actions) < 2:
        return 0.0
    return 1.0 - (len(actions.unique(dim=0)) - 1) / (len(actions) - 1)
