"""In which precision a model's convolutions and matrix products run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn


class MixedPrecision(nn.Module):
    """A module whose forward pass runs in ``compute_dtype`` where rounding does little harm.

    Weights stay float32. In bfloat16 autocast rounds the inputs of convolutions and matrix products;
    distances, weights of edges and losses opt out of it where they are computed.
    """

    compute_dtype: torch.dtype = torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """The context of the forward pass; in float32 an outer autocast stays in force."""
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device.type, self.compute_dtype)
