"""Triton kernels for averages and outer steps on a GPU: each works on all tensors of a bucket in one launch.

Without Triton, or for parameters on a CPU, averages run plain torch operations. Nothing here imports Triton before the
first tensor on a GPU asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_slowmo.parameters import Bucket
from lightning_slowmo.triton_support import works_on

if TYPE_CHECKING:
    from lightning_slowmo.averaging.kernels.table import Table


def table_of(bucket: Bucket) -> Table | None:
    """The kernels' view of a bucket, kept with it; None if its parameters are for plain torch operations."""
    if not works_on(bucket.device):
        return None
    from lightning_slowmo.averaging.kernels import table

    return table.table_of(bucket)
