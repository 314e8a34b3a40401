r"""Parameters as few flat buckets: what a sync reads, sends and writes.

A model has hundreds of small tensors and a network likes few large messages. A :class:`Layout` orders the parameters
of one optimizer in flat *runs* (one per parameter group, device and dtype) and cuts the runs into :class:`Bucket`\ s.
*Fragments*, parts that are communicated by themselves, have runs of their own. A large parameter is its own bucket and
is communicated *in place*, without a copy, and so are small ones that lie one behind the other; others are packed into
a scratch buffer. Slow state (anchors, momenta, residuals) is laid out as the runs are, one flat tensor per run.

The parameters themselves are never rebound to other storage: that would undo ``channels_last``, make the checkpoint of
a submodule as large as the model, and break ``load_state_dict(assign=True)``.

The parameter object says which parameter something is; :mod:`~lightning_slowmo.storage` says where its values lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.bucket_sizes import DEFAULT_SIZES, BucketSizes
from lightning_slowmo.private import foreach_copy_
from lightning_slowmo.storage import Storage, accumulation_dtype, adjoin, flat_view, is_dense, local


@dataclass(frozen=True)
class Span:
    """Elements ``[start, stop)`` of a run that belong to one parameter."""

    parameter: Tensor
    start: int
    stop: int


@dataclass(frozen=True)
class Run:
    """The parameters of one group that share device, dtype and fragment, one after the other.

    Attributes:
        group: index of the parameter group.
        dtype: of the parameters; a complex parameter counts as real.
        device: of the parameters.
        fragment: index of the fragment.
        spans: the parameters and their places.
    """

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
        in_place: whether the bucket *is* parameters' own memory: of one, or of several that lie one behind the other.
        dtype: dtype of arithmetic and messages; float32 for half-precision parameters.
        parameter_dtype: dtype of the parameters.
        device: of the parameters.
        block_numel: elements in a block, on a CPU.
        storage: where the values of a parameter lie.
        notes: what others keep about this bucket from one sync to the next, by name.
    """

    run: int
    group: int
    start: int
    stop: int
    spans: tuple[tuple[Tensor, int, int], ...]
    in_place: bool
    dtype: torch.dtype
    parameter_dtype: torch.dtype
    device: torch.device
    block_numel: int = DEFAULT_SIZES.block_numel
    storage: Storage = local
    notes: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

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
        return flat.to(self.parameter_dtype).to(flat.dtype)

    def lies_still(self) -> bool:
        """Whether parameters that were laid out in place still lie one behind the other."""
        return not self.in_place or len(self.spans) == 1 or adjoin([parameter for parameter, _, _ in self.spans])

    def blocks(self, flat: Tensor) -> Iterator[tuple[Block, Tensor]]:
        """Cut a flat tensor of this bucket's values into blocks that fit the cache; on a GPU, one block.

        Args:
            flat: what :meth:`pack` returned, or as long.

        Yields:
            Each block and its piece of ``flat``.
        """
        step = self.block_numel if self.device.type == "cpu" else self.numel
        for offset in range(0, self.numel, step):
            end = min(offset + step, self.numel)
            block = Block(self.run, self.group, self.start + offset, self.start + end, self.parameter_dtype)
            yield block, flat[offset:end]

    def pack(self, scratch: Tensor | None = None) -> Tensor:
        """The parameters' values as one flat tensor: their own memory if ``in_place``, else a copy.

        Args:
            scratch: where to copy to, at least ``numel`` elements of the bucket's dtype; allocated if not given.
        """
        if self.in_place:
            parameter, start, _ = self.spans[0]
            values = self.storage(parameter)
            return values.as_strided((self.numel,), (1,), values.storage_offset() + start)
        flat = torch.empty(self.numel, dtype=self.dtype, device=self.device) if scratch is None else scratch
        flat = flat[: self.numel]
        sources, targets = self._paired(flat)
        foreach_copy_(targets, sources)
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
        foreach_copy_(targets, sources)

    def _paired(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the parameters, and of the pieces of ``flat`` that belong to them."""
        own, pieces = [], []
        for (parameter, start, stop), piece in zip(self.spans, flat.split(self.segments), strict=True):
            values = self.storage(parameter)
            if is_dense(values):
                whole = flat_view(values)
                own.append(whole if stop - start == whole.numel() else whole[start:stop])
                pieces.append(piece)
            else:  # a strided view: never cut, so the bucket holds all of it
                own.append(values)
                pieces.append(piece.view(values.shape))
        return own, pieces


class Layout:
    """How the parameters of one optimizer lie in runs and buckets.

    Args:
        groups: the parameters of each parameter group, each once (tied weights). Empty ones are left out, but not a
            ``DTensor`` of which this process holds nothing: lists by parameter are alike on all processes.
        sizes: of buckets and blocks.
        fragments: number of parts of about equal size that can be communicated by themselves. Parameters stay whole.
        storage: where the values of a parameter lie: its own memory, or its gradient's.
    """

    def __init__(
        self,
        groups: Iterable[Iterable[Tensor]],
        sizes: BucketSizes = DEFAULT_SIZES,
        *,
        fragments: int = 1,
        storage: Storage = local,
    ) -> None:
        laid_out = list(_members(groups))
        self.parameters: list[Tensor] = [parameter for _, parameter in laid_out]
        self.sizes = sizes
        self.fragments = fragments
        fragment_of = _deal(self.parameters, fragments)
        members: dict[tuple[int, torch.dtype, torch.device, int], list[Tensor]] = {}
        for index, parameter in laid_out:
            key = (index, local(parameter).dtype, parameter.device, fragment_of[id(parameter)])
            members.setdefault(key, []).append(parameter)
        self.runs: list[Run] = [_run(key, tensors) for key, tensors in members.items()]
        cut = sizes.grown(sum(run.numel * accumulation_dtype(run.dtype).itemsize for run in self.runs))
        self.buckets: list[Bucket] = [
            bucket for index, run in enumerate(self.runs) for bucket in _cut(index, run, cut, storage)
        ]

    @property
    def numel(self) -> int:
        """Number of all elements."""
        return sum(run.numel for run in self.runs)

    def fragment(self, index: int) -> list[Bucket]:
        """The buckets of one fragment."""
        return [bucket for bucket in self.buckets if self.runs[bucket.run].fragment == index]

    def outside(self, index: int) -> set[int]:
        """The ids of the parameters that lie in other fragments."""
        return {id(span.parameter) for run in self.runs if run.fragment != index for span in run.spans}

    def covers(self, groups: Iterable[Iterable[Tensor]]) -> bool:
        """Whether these are still exactly the parameters that are laid out (some may have joined or been frozen)."""
        same = [id(parameter) for _, parameter in _members(groups)] == list(map(id, self.parameters))
        return same and all(bucket.lies_still() for bucket in self.buckets)

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
                values, piece = local(span.parameter), buffer[span.start : span.stop]
                dense = is_dense(values)
                shaped = piece.as_strided(values.shape, values.stride()) if dense else piece.view(values.shape)
                views[id(span.parameter)] = shaped
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
        stop = start + local(tensor).numel()
        spans.append(Span(tensor, start, stop))
        start = stop
    return Run(*key, tuple(spans))


def _cut(index: int, run: Run, sizes: BucketSizes, storage: Storage) -> Iterator[Bucket]:
    """Cut a run into buckets: large parameters alone and in place, small ones packed together."""
    dtype = accumulation_dtype(run.dtype)
    full = max(1, sizes.bucket_bytes // dtype.itemsize)
    packed: list[tuple[Tensor, int, int]] = []
    position = start = 0

    def bucket(spans: list[tuple[Tensor, int, int]], start: int, in_place: bool) -> Bucket:
        stop = start + sum(end - begin for _, begin, end in spans)
        if len(spans) > 1 and run.dtype == dtype and storage is local:
            in_place = adjoin([parameter for parameter, _, _ in spans])
        kind = (dtype, run.dtype, run.device, sizes.block_numel, storage)
        return Bucket(index, run.group, start, stop, tuple(spans), in_place, *kind)

    for span in filter(lambda span: span.start < span.stop, run.spans):
        parameter, length = span.parameter, span.stop - span.start
        dense = is_dense(local(parameter))
        alone = dense and run.dtype == dtype and length * dtype.itemsize >= sizes.in_place_bytes
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
