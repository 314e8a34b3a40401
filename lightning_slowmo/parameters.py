r"""Parameters as few flat buckets: what a sync reads, sends and writes.

A model has hundreds of small tensors and a network likes few large messages. A :class:`Layout` orders the parameters
of one optimizer in flat *runs* (one per parameter group, device and dtype) and cuts the runs into :class:`Bucket`\ s.
If parts of the parameters are to be communicated by themselves, each of these *fragments* has runs of its own.
A large parameter is its own bucket and is communicated *in place*, without a copy; small ones are packed together into
a scratch buffer. Slow state (anchors, momenta, residuals) is laid out as the runs are, one flat tensor per run, so that
arithmetic on a bucket is arithmetic on contiguous memory.

The parameters themselves are never rebound to other storage: that would undo ``channels_last``, make the checkpoint of
a submodule as large as the model, and break ``load_state_dict(assign=True)``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BUCKET_BYTES = 8 * 2**20
"""Size at which a bucket is full. Larger ones gain nothing (``benchmarks/sync_round.py``); smaller ones pay latency."""

IN_PLACE_BYTES = 4 * 2**20
"""Parameters from this size on are communicated in place: as messages they are large enough on their own."""

BLOCK_NUMEL = 2**17
"""Elements on which slow arithmetic is done at a time on a CPU, so that several passes find them in the cache."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which means and slow state of ``dtype`` parameters are computed: float32, or float64 for float64.

    Half-precision slow state would lose small outer steps: 1.0 - 0.001 is 1.0 in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements of a tensor fill one contiguous piece of memory, in whatever order of dimensions."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def flat_view(tensor: Tensor) -> Tensor:
    """A 1-D view of a dense tensor in the order of its memory (so ``channels_last`` needs no copy)."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


@dataclass(frozen=True)
class Span:
    """Elements ``[start, stop)`` of a run that belong to one parameter."""

    parameter: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """The parameters of one group that share device, dtype and fragment, one after the other."""

    group: int
    dtype: torch.dtype
    device: torch.device
    fragment: int
    spans: tuple[Span, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.spans[-1].stop


@dataclass(frozen=True)
class Block:
    """A contiguous piece of a run on which arithmetic is done at a time.

    Attributes:
        run: index of the run in :attr:`Layout.runs`.
        group: index of the parameter group, whose learning rate applies.
        start: first element in the run.
        stop: one past the last element in the run.
        parameter_dtype: dtype of the parameters.
    """

    run: int
    group: int
    start: int
    stop: int
    parameter_dtype: torch.dtype

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        """This block's piece of state buffers that :meth:`Layout.zeros` or :meth:`Layout.snapshot` made."""
        return buffers[self.run][self.start : self.stop]

    def rounded(self, flat: Tensor) -> Tensor:
        """``flat`` as the parameters can hold it: itself, or rounded to their half-precision dtype and back."""
        return flat.to(self.parameter_dtype).to(flat.dtype)


@dataclass(frozen=True)
class Bucket:
    """A contiguous piece of a run that travels as one message.

    Attributes:
        run: index of the run in :attr:`Layout.runs`.
        group: index of the parameter group, whose learning rate applies.
        start: first element in the run.
        stop: one past the last element in the run.
        spans: what the bucket holds, in order; a span may be a part of a large parameter.
        in_place: whether the bucket *is* (a part of) one parameter's own memory.
        dtype: dtype of arithmetic and messages; float32 for half-precision parameters.
    """

    run: int
    group: int
    start: int
    stop: int
    spans: tuple[tuple[Tensor, int, int], ...]
    in_place: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def numel(self) -> int:
        """Number of elements."""
        return self.stop - self.start

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of the parameters' pieces in the bucket, in order."""
        return tuple(stop - start for _, start, stop in self.spans)

    def of(self, buffers: Sequence[Tensor]) -> Tensor:
        """This bucket's piece of state buffers that :meth:`Layout.zeros` or :meth:`Layout.snapshot` made."""
        return buffers[self.run][self.start : self.stop]

    def rounded(self, flat: Tensor) -> Tensor:
        """``flat`` as the parameters can hold it: itself, or rounded to their half-precision dtype and back."""
        return flat.to(self.spans[0][0].dtype).to(flat.dtype)

    def blocks(self, flat: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Cut a flat tensor of this bucket's values into blocks that fit the cache; on a GPU, one block.

        Args:
            flat: what :meth:`pack` returned, or as long.

        Yields:
            Each block and its piece of ``flat``.
        """
        step = BLOCK_NUMEL if self.device.type == "cpu" else self.numel
        parameter_dtype = self.spans[0][0].dtype
        for offset in range(0, self.numel, step):
            end = min(offset + step, self.numel)
            block = Block(self.run, self.group, self.start + offset, self.start + end, parameter_dtype)
            yield block, flat[offset:end]

    def pack(self, scratch: Tensor | None = None) -> Tensor:
        """The parameters' values as one flat tensor: their own memory if ``in_place``, else a copy.

        Args:
            scratch: where to copy to, at least ``numel`` elements of the bucket's dtype; allocated if not given.
        """
        if self.in_place:
            parameter, start, stop = self.spans[0]
            return flat_view(parameter)[start:stop]
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device) if scratch is None else scratch
        flat = flat[: self.numel]
        sources, targets = self._paired(flat)
        torch._foreach_copy_(targets, sources)
        return flat

    def copy_to(self, flat: Tensor) -> Tensor:
        """Copy the parameters' values to a flat tensor of this bucket's length and dtype, also if ``in_place``."""
        packed = self.pack(flat)
        return flat.copy_(packed) if self.in_place else packed

    def unpack(self, flat: Tensor) -> None:
        """Write a flat tensor back into the parameters; nothing to do for what :meth:`pack` gave in place."""
        if self.in_place:
            own = self.pack()
            if own.data_ptr() != flat.data_ptr():
                own.copy_(flat)
            return
        targets, sources = self._paired(flat)
        torch._foreach_copy_(targets, sources)

    def _paired(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the parameters, and of the pieces of ``flat`` that belong to them."""
        own, pieces, offset = [], [], 0
        for parameter, start, stop in self.spans:
            length = stop - start
            piece = flat[offset : offset + length]
            if is_dense(parameter):
                own.append(flat_view(parameter)[start:stop])
                pieces.append(piece)
            else:  # a strided view: never cut, so the bucket holds all of it
                own.append(parameter.detach())
                pieces.append(piece.view(parameter.shape))
            offset += length
        return own, pieces


class Layout:
    """How the parameters of one optimizer lie in runs and buckets.

    Args:
        groups: the parameters of each parameter group. Empty ones are left out, and one that appears twice (tied
            weights) is taken once.
        bucket_bytes: size at which a bucket is full, in bytes.
        in_place_bytes: size from which a parameter is communicated in place, in bytes.
        fragments: number of parts of about equal size that can be communicated by themselves. Parameters stay whole.
    """

    def __init__(
        self,
        groups: Iterable[Iterable[Tensor]],
        bucket_bytes: int = BUCKET_BYTES,
        in_place_bytes: int = IN_PLACE_BYTES,
        *,
        fragments: int = 1,
    ) -> None:
        laid_out = list(_members(groups))
        self.parameters: list[Tensor] = [parameter for _, parameter in laid_out]
        self.fragments = fragments
        fragment_of = _deal(self.parameters, fragments)
        members: dict[tuple[int, torch.dtype, torch.device, int], list[Tensor]] = {}
        for index, parameter in laid_out:
            key = (index, parameter.dtype, parameter.device, fragment_of[id(parameter)])
            members.setdefault(key, []).append(parameter)
        self.runs: list[Run] = [_run(key, tensors) for key, tensors in members.items()]
        self.buckets: list[Bucket] = [
            bucket for index, run in enumerate(self.runs) for bucket in _cut(index, run, bucket_bytes, in_place_bytes)
        ]

    @property
    def numel(self) -> int:
        """Number of elements in all runs."""
        return sum(run.numel for run in self.runs)

    def fragment(self, index: int) -> list[Bucket]:
        """The buckets of one fragment."""
        return [bucket for bucket in self.buckets if self.runs[bucket.run].fragment == index]

    def outside(self, index: int) -> set[int]:
        """The ids of the parameters that lie in other fragments."""
        return {id(span.parameter) for run in self.runs if run.fragment != index for span in run.spans}

    def covers(self, groups: Iterable[Iterable[Tensor]]) -> bool:
        """Whether these are still exactly the parameters that are laid out (some may have joined or been frozen)."""
        current = [parameter for _, parameter in _members(groups)]
        return len(current) == len(self.parameters) and all(
            a is b for a, b in zip(current, self.parameters, strict=True)
        )

    def empty(self) -> list[Tensor]:
        """Uninitialised buffers, one flat tensor per run, in the dtype of slow state."""
        return [torch.empty(run.numel, dtype=accumulation_dtype(run.dtype), device=run.device) for run in self.runs]

    def zeros(self) -> list[Tensor]:
        """Zero buffers, one flat tensor per run, in the dtype of slow state."""
        return [buffer.zero_() for buffer in self.empty()]

    def snapshot(self) -> list[Tensor]:
        """The parameters' present values, one flat tensor per run."""
        buffers = self.empty()
        for bucket in self.buckets:
            bucket.copy_to(bucket.of(buffers))
        return buffers

    def restore(self, buffers: Sequence[Tensor]) -> None:
        """Write buffers that :meth:`snapshot` made back into the parameters."""
        for bucket in self.buckets:
            bucket.unpack(bucket.of(buffers))

    def per_parameter(self, buffers: Sequence[Tensor]) -> list[Tensor]:
        """Views of buffers, one per parameter in the order of :attr:`parameters` and in its shape: for checkpoints."""
        views: dict[int, Tensor] = {}
        for run, buffer in zip(self.runs, buffers, strict=True):
            for span in run.spans:
                parameter, piece = span.parameter, buffer[span.start : span.stop]
                dense = is_dense(parameter)
                shaped = piece.as_strided(parameter.shape, parameter.stride()) if dense else piece.view(parameter.shape)
                views[id(parameter)] = shaped
        return [views[id(parameter)] for parameter in self.parameters]

    def carry(self, other: Layout, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Copy the state of every parameter that this layout shares with ``other`` from ``source`` to ``target``.

        Args:
            other: the layout of ``source``.
            source: buffers in the layout of ``other``.
            target: buffers in this layout.
        """
        old = dict(zip(map(id, other.parameters), other.per_parameter(source), strict=True))
        for parameter, view in zip(self.parameters, self.per_parameter(target), strict=True):
            if id(parameter) in old:
                view.copy_(old[id(parameter)])


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
            block = Block(bucket.run, bucket.group, start, start + own, bucket.spans[0][0].dtype)
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


class Scratch:
    """Reusable buffers for the buckets in flight: at most ``count`` of them, so memory stays bounded.

    Args:
        count: how many buckets may be in flight.
    """

    def __init__(self, count: int = 3) -> None:
        self.count = count
        self._buffers: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        self._next = 0

    def take(self, bucket: Bucket) -> Tensor | None:
        """The next buffer in turn, long enough for the bucket; None for a bucket that needs none."""
        return None if bucket.in_place else self.allot(bucket, bucket.numel)

    def allot(self, bucket: Bucket, numel: int) -> Tensor:
        """The next buffer in turn, of at least ``numel`` elements of the bucket's dtype."""
        key = (self._next, bucket.dtype, bucket.device)
        self._next = (self._next + 1) % self.count
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers[key] = torch.empty(numel, dtype=bucket.dtype, device=bucket.device)
        return self._buffers[key]


def checksum(layouts: Iterable[Layout]) -> int:
    """A number below 2**64 that depends on every bit of the parameters and on its place.

    Integers add up to the same in any order, so equal parameters have equal checksums on all devices.
    """
    total = 0
    for bucket in (bucket for layout in layouts for bucket in layout.buckets):
        for _, flat in bucket.blocks(bucket.pack()):
            bits = flat.view(torch.int64 if flat.element_size() == 8 else torch.int32)
            places = torch.arange(1, 2 * flat.numel(), 2, device=flat.device)  # odd, so that no single change cancels
            total = total * 31 + int((bits * places).sum())
    return total % 2**64


def _members(groups: Iterable[Iterable[Tensor]]) -> Iterator[tuple[int, Tensor]]:
    """Group index and parameter of everything that has elements, each once."""
    seen: set[int] = set()
    for index, group in enumerate(groups):
        for parameter in group:
            if parameter.numel() and id(parameter) not in seen:
                seen.add(id(parameter))
                yield index, parameter


def _deal(parameters: Iterable[Tensor], fragments: int) -> dict[int, int]:
    """The fragment of each parameter, by id: the largest first, each to the fragment that has least so far.

    Layers that are alike are dealt out in turn, so a fragment has some from all depths of the model.
    """
    sizes = [0] * fragments
    dealt: dict[int, int] = {}
    for parameter in sorted(parameters, key=lambda tensor: -tensor.numel()):
        smallest = sizes.index(min(sizes))
        dealt[id(parameter)] = smallest
        sizes[smallest] += parameter.numel()
    return dealt


def _run(key: tuple[int, torch.dtype, torch.device, int], tensors: list[Tensor]) -> Run:
    spans, start = [], 0
    for tensor in tensors:
        spans.append(Span(tensor, start, start + tensor.numel()))
        start += tensor.numel()
    return Run(*key, tuple(spans))


def _cut(index: int, run: Run, bucket_bytes: int, in_place_bytes: int) -> Iterator[Bucket]:
    """Cut a run into buckets: large parameters alone and in place, small ones packed together."""
    dtype = accumulation_dtype(run.dtype)
    full = max(1, bucket_bytes // dtype.itemsize)
    packed: list[tuple[Tensor, int, int]] = []
    position = start = 0

    def bucket(spans: list[tuple[Tensor, int, int]], start: int, in_place: bool) -> Bucket:
        length = sum(stop - begin for _, begin, stop in spans)
        return Bucket(index, run.group, start, start + length, tuple(spans), in_place, dtype, run.device)

    for span in run.spans:
        parameter, length = span.parameter, span.stop - span.start
        dense = is_dense(parameter)
        alone = dense and run.dtype == dtype and length * dtype.itemsize >= in_place_bytes
        if packed and (alone or position - start + length > full):
            yield bucket(packed, start, False)
            packed, start = [], position
        pieces = [(parameter, i, min(i + full, length)) for i in range(0, length, full)] if dense else None
        if alone:
            for piece in pieces or ():
                yield bucket([piece], position + piece[1], True)
            start = position + length
        elif pieces and len(pieces) > 1:  # larger than a bucket, but not to be sent in place
            for piece in pieces:
                yield bucket([piece], position + piece[1], False)
            start = position + length
        else:
            packed.append((parameter, 0, length))
        position += length
    if packed:
        yield bucket(packed, start, False)
