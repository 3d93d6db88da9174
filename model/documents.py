"""Several documents in one sequence: what their numbers tell the attention sublayers."""

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """Which document each token belongs to, and what follows from it, made when it is first asked for.

    numbers: int `[batch, sequence]`, the number of each token's document; does not fall along a sequence.
    """

    def __init__(self, numbers: Tensor) -> None:
        self.numbers = numbers

    @cached_property
    def starts(self) -> Tensor:
        """Bool `[batch, sequence]`: whether a document, or the rest of one, starts at the token."""
        starts = torch.ones_like(self.numbers, dtype=torch.bool)
        starts[:, 1:] = self.numbers[:, 1:] != self.numbers[:, :-1]
        return starts

    @cached_property
    def positions(self) -> Tensor:
        """Int64 `[batch, sequence]`: the place of each token in its document, from 0."""
        index = torch.arange(self.numbers.shape[1], device=self.numbers.device).expand(self.numbers.shape)
        return index - torch.where(self.starts, index, 0).cummax(dim=1).values

    @cached_property
    def mask(self) -> Tensor:
        """Bool `[batch, 1, sequence, sequence]`: whether the row's token may attend to the column's."""
        return (self.numbers[:, :, None] == self.numbers[:, None, :]).tril().unsqueeze(1)

    @cached_property
    def bounds(self) -> Tensor:
        """Int32 `[documents + 1]`: where each document starts when all sequences lie end to end, and their end.

        Waits for the device, which alone knows how many there are.
        """
        (starts,) = self.starts.flatten().nonzero(as_tuple=True)
        return torch.cat([starts, starts.new_tensor([self.numbers.numel()])]).int()
