"""The parameters of one bucket as the kernels see them, and the launches."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from lightning_slowmo.averaging.drift import SAMPLE_PIECE, Drift
from lightning_slowmo.averaging.kernels import passes
from lightning_slowmo.averaging.kernels.trace import Trace
from lightning_slowmo.parameters import Bucket
from lightning_slowmo.private import held
from lightning_slowmo.storage import is_dense, local

KINDS = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""Triton's name of each dtype that parameters may have."""

LARGEST = 2**31 - 2 * passes.TILE
"""Elements of a bucket that 32-bit positions can tell apart."""

_NO_RULE = Trace((), (), (0, 0))


class Table:
    """Where the parameters of a bucket lie: tables for the kernels, kept up to date when storage is replaced.

    Args:
        bucket: of dense parameters.
    """

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        lengths = torch.tensor(bucket.segments)
        begins = torch.tensor([start for _, start, _ in bucket.spans])
        places = lengths.cumsum(0) - lengths
        counts = (lengths + passes.TILE - 1).div(passes.TILE, rounding_mode="floor")
        span = torch.arange(len(lengths)).repeat_interleave(counts)
        tile = torch.arange(len(span)) - (counts.cumsum(0) - counts)[span]  # number of the tile in its span
        offset = tile * passes.TILE
        length = (lengths[span] - offset).clamp(max=passes.TILE)
        rows = torch.stack([span, begins[span] + offset, places[span] + offset, length], 1)
        self.programs = len(rows)
        self.tiles = rows.to(bucket.device)
        self.addresses = torch.empty(len(lengths), dtype=torch.int64, device=bucket.device)
        self._places_are_even = not bool((rows[:, 1:] % 4).any())
        self._known: list[int] = []
        self._parameters = [parameter for parameter, _, _ in bucket.spans]
        self._are_plain = all(held(parameter) is parameter for parameter in self._parameters)
        self._constants: dict[str, Any] = {"KIND": KINDS[bucket.parameter_dtype], "TILE": passes.TILE}

    def refresh(self) -> bool:
        """Look where the parameters lie now.

        Returns:
            Whether the kernels can work on them: they are dense, as they were.
        """
        bucket = self.bucket
        if bucket.storage is not local:
            now = [bucket.storage(parameter).data_ptr() for parameter in self._parameters]
        elif self._are_plain:  # hundreds of calls, or of views, would cost a small model's sync
            now = [parameter.data_ptr() for parameter in self._parameters]
        else:
            now = [held(parameter).data_ptr() for parameter in self._parameters]
        if now != self._known:
            if not all(is_dense(bucket.storage(parameter)) for parameter in self._parameters):
                return False
            self.addresses.copy_(torch.tensor(now), non_blocking=True)
            self._known = now
            even = self._places_are_even and not any(address % 16 for address in now)
            self._constants["VECTOR"] = 4 if even else 1
        return True

    def gather(self, flat: Tensor) -> Tensor:
        """Copy the parameters to a flat tensor, at least as long as the bucket; returns what is in use of it."""
        _launch(passes.gather, self.programs, self.tiles, self.addresses, flat, **self._constants)
        return flat[: self.bucket.numel]

    def find_nonfinite(self, flag: Tensor) -> None:
        """Set ``flag``, an int32 tensor of one element, if a parameter holds an infinity or NaN."""
        _launch(passes.find_nonfinite, self.programs, self.tiles, self.addresses, flag, **self._constants)

    def correct(self, sent: Tensor, new: Tensor) -> None:
        """Let the parameters x become new + (x - sent), of the bucket's length both."""
        _launch(passes.correct, self.programs, self.tiles, self.addresses, sent, new, **self._constants)

    def scatter(
        self,
        total: Tensor,
        weight: float,
        drift: Drift | None,
        trace: Trace | None = None,
        anchor: Tensor | None = None,
        momentum: Tensor | None = None,
    ) -> None:
        """Give the parameters their mean, or what a rule makes of it.

        Args:
            total: the sum over the workers, of the bucket's length.
            weight: by which to divide it.
            drift: takes note of how far the present parameters are from the mean.
            trace: of the rule; None: the mean.
            anchor: the rule's, of the bucket's length; overwritten.
            momentum: likewise.
        """
        tables = (self.tiles, self.addresses, total)
        _move(self.programs, tables, total, weight, drift, trace, anchor, momentum, TABLE=True, **self._constants)


def table_of(bucket: Bucket) -> Table | None:
    """The table of a bucket, kept with it; None if its parameters are not for the kernels."""
    if bucket.numel > LARGEST or bucket.parameter_dtype not in KINDS:
        return None
    if "table" not in bucket.notes:
        if not all(is_dense(bucket.storage(parameter)) for parameter, _, _ in bucket.spans):
            return None
        bucket.notes["table"] = Table(bucket)
    table: Table = bucket.notes["table"]
    return table if table.refresh() else None


def move_flat(
    total: Tensor,
    weight: float,
    dtype: torch.dtype,
    own: Tensor | None = None,
    drift: Drift | None = None,
    trace: Trace | None = None,
    anchor: Tensor | None = None,
    momentum: Tensor | None = None,
) -> None:
    """As :meth:`Table.scatter`, but overwrites ``total`` with the new values.

    Args:
        total: see there.
        weight: see there.
        dtype: of the parameters, in which an anchor may have been rounded.
        own: this worker's values before the sum, of the dtype of ``total``, for the drift.
        drift: see there; needs ``own``.
        trace: see there.
        anchor: see there.
        momentum: see there.
    """
    programs = -(-total.numel() // passes.TILE)
    tables = (total, total, total if own is None else own)  # no table is read
    constants = {"KIND": KINDS[dtype], "TILE": passes.TILE, "VECTOR": 1}
    _move(programs, tables, total, weight, drift, trace, anchor, momentum, TABLE=False, **constants)


def _move(
    programs: int,
    tables: tuple[Tensor, Tensor, Tensor],
    total: Tensor,
    weight: float,
    drift: Drift | None,
    trace: Trace | None,
    anchor: Tensor | None,
    momentum: Tensor | None,
    **constants: Any,
) -> None:
    written = _NO_RULE if trace is None else trace
    numbers = _numbers((1 / weight, *written.scales), total.device)
    state = total if anchor is None else anchor, total if momentum is None else momentum
    numel = total.numel()
    period, limit = drift.pattern(numel) if drift is not None else (1, 0)
    squares = drift.squares(total.device) if drift is not None else numbers
    _launch(
        passes.move,
        programs,
        *(*tables, total, *state, numbers, squares, numel, period, SAMPLE_PIECE, limit),
        OPERATIONS=written.operations,
        RESULTS=written.results,
        STATE=trace is not None,
        DRIFT=drift is not None,
        **constants,
    )


@lru_cache(maxsize=256)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Numbers on a device, in double precision, which a kernel's own arguments have not; most syncs need the same."""
    return torch.tensor(values, dtype=torch.float64).to(device, non_blocking=True)


def _launch(kernel: Any, programs: int, *arguments: Tensor | int, **constants: Any) -> None:
    """Run a kernel on the device of its first argument, in its present stream; nothing for an empty bucket."""
    if not programs:
        return
    device = arguments[0].device  # type: ignore[union-attr]
    with torch.cuda.device(device if device.type == "cuda" else -1):  # Triton launches on the present device
        kernel[(programs,)](*arguments, num_warps=8, enable_fp_fusion=False, **constants)
