"""Which rows a step trains on: a function of (seed, step), so that a run resumes from a number.

Without a mix, an epoch is a permutation of all rows. With one (`--mix`), each step takes its share
of the user's own rows and of the usual ones, and each kind goes round by itself: own rows come
back every epoch, while the usual ones go on to rows not seen yet.
"""

import torch

from dataset.rows import PackedRows


class RowOrder:
    """The rows of each step, permuted anew in each epoch.

    Args:
        num_rows: rows to choose from.
        batch_size: rows a step wants; a step gets fewer where there are not as many.
        seed: the order's.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self.batch_size, self.steps_per_epoch = batch_of(num_rows, 0, batch_size)
        self._epoch, self._order = -1, None

    def permuted(self, epoch: int) -> torch.Tensor:
        """All rows in the order of an epoch; the last one is kept, for the next step wants it."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.num_rows, generator=generator)
        return self._order

    def indices(self, step: int) -> list[int]:
        """The rows of the whole batch of a step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self.permuted(epoch)[start : start + self.batch_size].tolist()


class MixedOrder:
    """The rows of each step where `share` of them are usual ones and the others one's own.

    A step has no own row twice if it can help it: few own rows make a small batch.

    Args:
        own, usual: the places of both kinds among all rows.
        share: of the usual ones, above 0 and below 1.
        batch_size: rows a step may have.
        seed: the order's.
    """

    def __init__(
        self, own: torch.Tensor, usual: torch.Tensor, share: float, batch_size: int, seed: int
    ):
        self.own, self.usual, self.share = own, usual, share
        self.batch_size, self.steps_per_epoch = batch_of(len(own), share, batch_size)
        self._own = RowOrder(len(own), 1, seed)
        self._usual = RowOrder(len(usual), 1, seed)

    def indices(self, step: int) -> list[int]:
        """The rows of the whole batch of a step, own ones first."""
        # Rounded over the run, not in each step: 4 rows with a share of 0.9 are right in the end.
        before, after = (
            round(n * self.batch_size * (1 - self.share)) for n in (step, step + 1)
        )
        done = step * self.batch_size - before
        num_usual = self.batch_size - (after - before)
        own = [self._own.indices(i)[0] for i in range(before, after)]
        usual = [self._usual.indices(i)[0] for i in range(done, done + num_usual)]
        return [*self.own[own].tolist(), *self.usual[usual].tolist()]


def batch_of(num_own: int, share: float, batch_size: int) -> tuple[int, int]:
    """(rows a step, steps a pass over the own rows) of `num_own` rows and a `share` of usual ones.

    A step has at most `batch_size` rows, and no more than hold each own row once; with usual ones
    it has 4 at least.
    """
    if not share:
        batch_size = min(batch_size, num_own)
        return batch_size, num_own // batch_size
    batch_size = min(batch_size, max(4, round(num_own / (1 - share))))
    return batch_size, max(1, round(num_own / (batch_size * (1 - share))))


def order_of(rows: PackedRows, share: float, batch_size: int, seed: int) -> RowOrder | MixedOrder:
    """The order of a run; with a `share`, `rows` are own rows joined by `dataset.rows.join_rows`
    with the usual ones."""
    if not share:
        return RowOrder(len(rows.train), batch_size, seed)
    owner = torch.from_numpy(rows.train.records.owner)
    own, usual = ((owner == number).nonzero().flatten() for number in (0, 1))
    return MixedOrder(own, usual, share, batch_size, seed)
