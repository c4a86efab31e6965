"""What a search learns of one network alone, beside what its policy network learns of all."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from prunegraph.graph.graph import StructureGraph


class InstanceOffsets(nn.Module):
    """Free offsets on the scores of each channel and of each group of the networks at hand.

    Efficient active search (Hottung et al. 2022, arXiv 2106.05126): while the policy network is
    trained, a small set of parameters of the instance at hand is trained with it. They start at
    zero, belong to the search and not to the saved policy, which must work on other networks.

    Plain gradient ascent moves them, in units that do not depend on the number of bits: a channel
    by ``rate * mean(A (b - p))``, a group by ``group_rate`` times the sum of the same over its
    channels over the standard deviation of their number; and by ``rate`` and ``group_rate`` at the
    most, since masks that were planned lie many deviations from the policy's own. A noisy gradient
    then makes a small step, where an adaptive optimiser would make a full one in a random
    direction.

    Args:
        graphs: graph id -> structure.
    """

    def __init__(self, graphs: Mapping[int, StructureGraph]) -> None:
        super().__init__()
        self.channels = nn.ParameterDict(
            {str(index): torch.zeros(graph.num_units) for index, graph in graphs.items()}
        )
        self.groups = nn.ParameterDict(
            {str(index): torch.zeros(len(graph.groups)) for index, graph in graphs.items()}
        )
        self._group_of = {
            index: torch.from_numpy(graph.group_of) for index, graph in graphs.items()
        }
        self._first = {
            index: torch.tensor([int(group.units[0]) for group in graph.groups])
            for index, graph in graphs.items()
        }

    def forward(self, graph_id: int) -> Tensor:
        """Return the offsets ``[N]`` of one network's scores."""
        groups, channels = self.groups[str(graph_id)], self.channels[str(graph_id)]
        total: Tensor = channels + groups[self._group_of[graph_id].to(channels.device)]
        return total

    @torch.no_grad()
    def ascend(
        self,
        graph_id: int,
        probabilities: Tensor,
        *,
        rate: float,
        group_rate: float,
        scale: Tensor,
    ) -> None:
        """Move the offsets along their gradients, and clear these.

        Args:
            graph_id: the network.
            probabilities: ``[N]`` mean keep probabilities; 0 or 1 where nothing is decided.
            rate: step of a channel.
            group_rate: step of a group.
            scale: ``[N]`` turns a gradient of the loss into ``-mean(A (b - p))`` over the episodes
                that decide on the channel, alike within a group.
        """
        channels, groups = self.channels[str(graph_id)], self.groups[str(graph_id)]
        group_of = self._group_of[graph_id].to(channels.device)
        first = self._first[graph_id].to(channels.device)
        variance = torch.zeros_like(groups).index_add(
            0, group_of, probabilities * (1.0 - probabilities)
        )
        if channels.grad is not None and groups.grad is not None:
            channels -= rate * (scale * channels.grad).clamp(-1.0, 1.0)
            step = scale[first] * groups.grad / (variance + 1e-6).sqrt()
            groups -= group_rate * step.clamp(-1.0, 1.0)
        channels.grad = groups.grad = None

    @torch.no_grad()
    def follow(self, graph_id: int, gains: Tensor, mask: Tensor, rate: float) -> None:
        """Move the groups' offsets by ``rate`` times their mean gain.

        Args:
            graph_id: the network.
            gains: ``[B, G]`` advantage times noise of each episode and group.
            mask: ``[B, N]`` which channels each decides on: the others' groups gain nothing.
            rate: step of a group.
        """
        groups = self.groups[str(graph_id)]
        decides = mask[:, self._first[graph_id].to(groups.device)]
        groups += rate * ((gains * decides).sum(dim=0) / decides.sum(dim=0).clamp(min=1))
