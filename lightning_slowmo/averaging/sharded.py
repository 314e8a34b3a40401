"""The exact mean with shares: reduce-scatter, an outer step on one's own share, all-gather.

The traffic of an all-reduce; and no worker needs slow state of the others' shares.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_slowmo.averaging.averager import Averager, OnSum, require_fit
from lightning_slowmo.averaging.drift import Drift
from lightning_slowmo.averaging.mean import average
from lightning_slowmo.communication.meeting import Round
from lightning_slowmo.communication.pipeline import Transfer, complete
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.parameters import Block, Bucket, Layout
from lightning_slowmo.pieces import Pieces, map_leaves
from lightning_slowmo.storage import accumulation_dtype, is_dense, local


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

    def saved(self, kept: list[Tensor]) -> list[Tensor | Pieces]:
        """This worker's pieces of slow state, for each parameter: no worker holds the whole."""
        held: dict[int, list[tuple[int, Tensor]]] = {}
        for place in self._places():
            held.setdefault(id(place.parameter), []).append((place.start, place.of(kept)))
        return [self._pieces(parameter, held.get(id(parameter), [])) for parameter in self.layout.parameters]

    def load(self, kept: list[Tensor], saved: Sequence[Tensor | Pieces], what: str) -> None:
        """Copy into this worker's shares what belongs there."""
        parameters = self.layout.parameters
        wanted = [self._pieces(parameter, []) for parameter in parameters]
        require_fit([(pieces.shape, pieces.dtype) for pieces in wanted], saved, what)
        sources = dict(zip(map(id, parameters), zip(saved, wanted, strict=True), strict=True))
        flat, of = None, None
        for place in self._places():
            source, like = sources[id(place.parameter)]
            if isinstance(source, Pieces) and source.stride == like.stride:
                source.copy_to(place.of(kept), place.start)
                continue
            if of is not place.parameter:  # in the order of the parameter's memory, made once for each
                whole = source.whole() if isinstance(source, Pieces) else source
                flat = torch.empty_strided(like.shape, like.stride, dtype=like.dtype).copy_(whole)
                flat, of = flat.as_strided((like.numel,), (1,)), place.parameter
            assert flat is not None
            own = place.of(kept)
            own.copy_(flat[place.start : place.start + own.numel()])

    def _pieces(self, parameter: Tensor, pieces: list[tuple[int, Tensor]]) -> Pieces:
        values = local(parameter)
        like = values if is_dense(values) else torch.empty(values.shape, device="meta")
        return Pieces.of(like, accumulation_dtype(values.dtype), pieces)

    def _places(self) -> Iterator[Place]:
        """Where what this worker keeps belongs in its parameters."""
        for piece in self.shards.pieces:
            low = self.workers.rank * piece.length
            high = low + piece.block.stop - piece.block.start
            offset = 0  # of the span in the bucket
            for parameter, begin, end in piece.bucket.spans:
                first, last = max(low, offset), min(high, offset + end - begin)
                if first < last:
                    at = piece.block.start + first - low
                    yield Place(parameter, begin + first - offset, piece.bucket.run, at, at + last - first)
                offset += end - begin


class Place(NamedTuple):
    """Elements of a parameter that a worker keeps slow state of.

    Attributes:
        parameter: which one.
        start: the first element, in the order of its memory.
        run: index of the run that the shares of this worker are in.
        first: where they begin in the shares of that run.
        last: one past where they end.
    """

    parameter: Tensor
    start: int
    run: int
    first: int
    last: int

    def of(self, kept: Sequence[Tensor]) -> Tensor:
        """This place's part of what the worker keeps."""
        return kept[self.run][self.first : self.last]


def gathered(state: Any, workers: Workers, device: torch.device) -> Any:
    """A state with whole tensors in place of this worker's pieces; all workers must call this.

    Args:
        state: nested dictionaries and lists.
        workers: who holds the pieces.
        device: by which tensors travel; the pieces may be elsewhere, offloaded.
    """

    def gather(leaf: Any) -> Any:
        if not isinstance(leaf, Pieces):
            return leaf
        flat = torch.zeros(leaf.numel, dtype=leaf.dtype, device=device)
        for start, piece in leaf.pieces:
            flat[start : start + piece.numel()].copy_(piece)
        complete(workers.sum(flat))
        return flat.as_strided(leaf.shape, leaf.stride)

    return map_leaves(gather, state)
