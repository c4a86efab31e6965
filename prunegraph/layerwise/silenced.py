"""Least-squares reconstruction of a network that is silenced, not cut."""

from collections.abc import Mapping

import torch
from torch import Tensor

from prunegraph.core.masks import ChannelMask
from prunegraph.layerwise.reconstruct import Reconstruction, bias_name


class SilencedReconstruction(Reconstruction):
    """Fits all layers at once in a network of the dense shapes whose removed units are zero."""

    @torch.no_grad()
    def fit_silenced(self, parameters: Mapping[str, Tensor], mask: ChannelMask) -> None:
        """Change the kept weights and biases as ``fit`` does those of a cut network.

        Args:
            parameters: of the network that the mask has silenced, by name; changed.
            mask: what it keeps.
        """
        for name, dense in self._weights.items():
            found = self._fitted_at_once(name, mask)
            if found is None:
                continue
            (new, shift), (out, kept) = found, self._stays(name, mask)
            whole = torch.zeros_like(dense).flatten(1)
            whole[out.nonzero(), kept.nonzero().squeeze(1)] = new.to(whole)
            parameters[name].copy_(self._laid(name, whole.view_as(dense)))
            if name in self._biases:
                bias = parameters[bias_name(name)]
                bias[out] = (self._biases[name][out].float() + shift).to(bias)
