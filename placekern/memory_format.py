"""Which of torch's two orders of an image or filter a tensor has in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a tensor [batch, C, height, width] is in channels_last, and not contiguous too."""
    last = tensor.dim() == 4 and not tensor.is_contiguous()
    return last and tensor.is_contiguous(memory_format=torch.channels_last)


def memory_format_of(tensor: Tensor) -> torch.memory_format:
    """channels_last where `is_channels_last`, else contiguous_format."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format
