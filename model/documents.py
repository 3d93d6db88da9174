"""Attention inside documents: what a sequence of several documents tells the attention sublayers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Documents:
    """For each token, where it stands in its document and which tokens it may attend to.

    positions: int64 `[batch, sequence]`, from 0 at the start of every document.
    mask: bool `[batch, 1, sequence, sequence]`, true where the row's token may attend to the column's.
    """

    positions: Tensor
    mask: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> "Documents":
        """From the number of each token's document, int `[batch, sequence]`, which does not fall along a sequence."""
        index = torch.arange(numbers.shape[1], device=numbers.device).expand(numbers.shape)
        starts = torch.ones_like(numbers, dtype=torch.bool)
        starts[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        start = torch.where(starts, index, 0).cummax(dim=1).values
        same = numbers[:, :, None] == numbers[:, None, :]
        return cls(index - start, same.tril().unsqueeze(1))
