"""The adding problem (Hochreiter and Schmidhuber, 1997): sum the two marked numbers of a sequence."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from ..arguments import check_choice, check_count

MARKERS = ("halves", "any")

_HELD_OUT_SIZE = 2000
_HELD_OUT_BATCH = 500
# Training seeds are below 2^31, so the held-out numbers are no training sequence of any of them.
_HELD_OUT_SEED = 2**31 + 1
_TRAIN_SEED = 2**31 + 2


class Adding:
    """Numbers from U[0, 1) with two of them marked; the target is the sum of those two.

    Args:
        seq_len: T, at least 2.
        markers: ``"halves"``, one marker in each half of the sequence (Arjovsky et al., 2016), or ``"any"``, two
            different positions anywhere.
        train_size: how many sequences there are to train on (Le et al., 2015: 100,000); 0 for fresh ones in every
            batch.

    Answering 1 always has a mean squared error of 1/6, the variance of the sum.
    """

    carries = False
    input_size = 2
    output_size = 1
    loss_name = error_name = "mean squared error"
    trivial_loss = trivial_error = 1 / 6
    trivial_answer = "always answering 1"
    held_out_size = _HELD_OUT_SIZE

    def __init__(self, seq_len: int, markers: str = "halves", train_size: int = 0) -> None:
        check_count("seq_len", seq_len, 2)  # steps to mark
        check_choice("markers", markers, MARKERS)
        check_count("train_size", train_size, 0)
        self.seq_len = seq_len
        self.markers = markers
        self.title = f"adding problem, T = {seq_len}" + (f", {train_size:,} sequences" if train_size else "")
        self.train = self._draw(train_size, Generator().manual_seed(_TRAIN_SEED)) if train_size else None

    def batch(self, batch_size: int, generator: Generator, step: int = 0) -> tuple[Tensor, Tensor]:
        """Sequences ``[T, B, 2]``, of (number, marker in {0, 1}), and sums ``[B]``, drawn from the generator.

        With ``train_size``, drawn with replacement from as many fixed ones.
        """
        if self.train is None:
            return self._draw(batch_size, generator)
        x, target = self.train
        chosen = torch.randint(len(target), (batch_size,), generator=generator, device="cpu")
        return x[:, chosen], target[chosen]

    def _draw(self, batch_size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.rand(self.seq_len, batch_size, generator=generator, device="cpu")
        marked = self._positions(batch_size, generator)
        markers = torch.zeros_like(numbers).scatter_(0, marked, 1.0)
        return torch.stack((numbers, markers), dim=2), numbers.gather(0, marked).sum(0)

    def _positions(self, batch_size: int, generator: Generator) -> Tensor:
        """Two different steps for every sequence, ``[2, B]``."""
        if self.markers == "halves":
            half = self.seq_len // 2
            first = torch.randint(half, (batch_size,), generator=generator, device="cpu")
            second = torch.randint(half, self.seq_len, (batch_size,), generator=generator, device="cpu")
        else:
            first = torch.randint(self.seq_len, (batch_size,), generator=generator, device="cpu")
            step = torch.randint(1, self.seq_len, (batch_size,), generator=generator, device="cpu")
            second = (first + step) % self.seq_len
        return torch.stack((first, second))

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = Generator().manual_seed(_HELD_OUT_SEED)
        for _ in range(_HELD_OUT_SIZE // _HELD_OUT_BATCH):
            yield self._draw(_HELD_OUT_BATCH, generator)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.mse_loss(output.squeeze(1), target)

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.squeeze(1) - target).square()

    def held_out_error(self, mean: float) -> float:
        return mean
