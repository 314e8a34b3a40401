"""The exact mean with shares: reduce-scatter, an outer step on one's own share, all-gather.

The traffic of an all-reduce; and no worker needs slow state of the others' shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_slowmo.averaging.averager import Averager, OnSum
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import Transfer, complete
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Block, Bucket, Layout


@dataclass(frozen=True)
class Piece:
    """What one worker keeps of the slow state of one bucket.

    Attributes:
        bucket: which one.
        length: elements of each worker's piece; the last ones reach beyond the bucket's end.
        block: the elements that are this worker's, placed in :meth:`Shards.cut`'s buffers; may be empty.
    """

    bucket: Bucket
    length: int
    block: Block


class Shards:
    """A layout cut into equal pieces, one of each bucket for each worker.

    Args:
        layout: what is cut.
        rank: this worker.
        size: number of workers.
    """

    def __init__(self, layout: Layout, rank: int, size: int) -> None:
        self.layout, self.rank, self.size = layout, rank, size
        self.pieces: list[Piece] = []
        ends = [0] * len(layout.runs)
        for bucket in layout.buckets:
            length = -(-bucket.numel // size)
            own = max(0, min(length, bucket.numel - rank * length))
            start = ends[bucket.run]
            ends[bucket.run] = start + own
            block = Block(bucket.run, bucket.group, start, start + own, bucket.parameter_dtype)
            self.pieces.append(Piece(bucket, length, block))
        self._numels = ends

    def cut(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """This worker's share of buffers in the whole layout, one flat tensor per run."""
        shares = [flat.new_empty(numel) for flat, numel in zip(buffers, self._numels, strict=True)]
        for piece in self.pieces:
            start = self.rank * piece.length
            whole = piece.bucket.of(buffers)
            piece.block.of(shares).copy_(whole[start : start + piece.block.stop - piece.block.start])
        return shares


class ShardedAverager(Averager):
    """Average all parameters at once, each worker its share of them.

    Args:
        layout: the parameters.
        workers: who takes part.

    Attributes:
        shards: which share is whose.
    """

    def __init__(self, layout: Layout, workers: Workers) -> None:
        super().__init__(layout, workers)
        self.shards = Shards(layout, workers.rank, workers.size)

    def average(self, round: Round, on_sum: OnSum | None = None) -> float:
        """Average. The drift is measured on this worker's share alone."""
        drift = Drift(max(1, self.layout.numel // self.workers.size))
        for piece in self.shards.pieces:
            complete(self._transfer(piece, round, on_sum, drift))
        return drift.value()

    def _transfer(self, piece: Piece, round: Round, on_sum: OnSum | None, drift: Drift) -> Transfer[None]:
        bucket, numel = piece.bucket, piece.block.stop - piece.block.start
        padded = self.scratch.allot(bucket, piece.length * self.workers.size)[: piece.length * self.workers.size]
        padded[bucket.numel :].zero_()
        padded[: bucket.numel].copy_(bucket.pack(self.scratch.take(bucket)))
        own = padded[self.workers.rank * piece.length :][: piece.length].clone()
        local = drift.sample(own[:numel])
        weight = self.workers.weigh(padded, round.weights)
        yield from self.workers.scatter_sum(padded, own)
        drift.compare(local, own[:numel], weight)
        if on_sum is None:
            own.mul_(1 / weight)
        elif numel:
            on_sum(piece.block, own[:numel], weight)
        yield from self.workers.gather_pieces(padded, own)
        bucket.unpack(padded[: bucket.numel])

    def consensus(self, round: Round) -> None:
        """Overwrite the parameters with their mean."""
        average(self.layout.buckets, self.workers, self.scratch, round.weights)

    def adopt_layout(self, layout: Layout) -> None:
        """Not possible: other parameters would have other owners."""
        raise ValueError(
            "Parameters joined the optimizer, or were frozen, after the start, which does not go with "
            "shard_slow_state=True. Leave it out, or train all parameters from the start."
        )

    def cut(self, buffers: list[Tensor]) -> list[Tensor]:
        """This worker's share of slow state in the whole layout, one flat tensor per run."""
        return self.shards.cut(buffers)

    def whole(self, kept: list[Tensor]) -> list[Tensor]:
        """The whole of slow state, one flat tensor per run, collected from the shares of all workers."""
        whole = [flat.to(kept[index].device) for index, flat in enumerate(self.layout.empty())]
        for piece in self.shards.pieces:
            own = torch.zeros(piece.length, dtype=piece.bucket.dtype, device=piece.bucket.device)
            own[: piece.block.stop - piece.block.start].copy_(piece.block.of(kept))
            padded = own.new_empty(piece.length * self.workers.size)
            complete(self.workers.gather_pieces(padded, own))
            piece.bucket.of(whole).copy_(padded[: piece.bucket.numel])
        return whole
