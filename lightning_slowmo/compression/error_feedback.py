"""What a compressor loses in one message is added to the next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_slowmo.compression.base import Compressor, compute_dtype


class ErrorFeedback:
    """Owns the residual of one stream of messages.

    Each message carries ``vector + residual`` as well as the compressor can, and the new residual is what is missing:
    ``vector + old residual == decoded + new residual`` up to rounding, so that over time nothing is lost. The residual
    is computed from the payload as receivers decode it. It has the length of the vector, without any padding.

    Args:
        compressor: how messages are compressed.
        segments: lengths of the tensors in the vector.
        dtype: type of the vectors. Residual and message are float32 for half-precision vectors (small residuals would
            be rounded away), else of this type. Default: float32.
        device: where the residual lives.

    Example:
        >>> from lightning_slowmo.compression import TopK
        >>> feedback = ErrorFeedback(TopK(k=1), [3])
        >>> _, decoded = feedback.compress(torch.tensor([1.0, 5.0, 2.0]))
        >>> decoded, feedback.residual
        (tensor([0., 5., 0.]), tensor([1., 0., 2.]))

    References:
        Seide et al. 2014; Stich, Cordonnier and Jaggi 2018 (arXiv 1809.07599); Karimireddy et al. 2019
        (arXiv 1901.09847).
    """

    def __init__(
        self,
        compressor: Compressor,
        segments: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.compressor = compressor
        self.segments = tuple(segments)
        self.residual = torch.zeros(sum(self.segments), dtype=compute_dtype(dtype), device=device)

    def compress(self, flat: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Compress a vector and what earlier messages left out; keep what this one leaves out.

        Args:
            flat: 1-D float tensor of ``sum(segments)`` elements; it is not changed.
            generator: see :meth:`Compressor.compress`.

        Returns:
            The payload, and the vector that its receivers decode. Both are of the residual's type:
            ``decompress(payload, segments, feedback.residual.dtype)``.

        Raises:
            ValueError: if an argument does not fit or is not finite; the residual is then unchanged.
        """
        if flat.shape != self.residual.shape:
            raise ValueError(f"vector has shape {tuple(flat.shape)}, the residual {tuple(self.residual.shape)}")
        wanted = self.residual + flat.detach()
        if wanted.dtype != self.residual.dtype:
            raise ValueError(f"vector is {flat.dtype}, which a residual of {self.residual.dtype} cannot hold")
        payload = self.compressor.compress(wanted, self.segments, generator)
        decoded = self.compressor.decompress(payload, self.segments, wanted.dtype)
        torch.sub(wanted, decoded, out=self.residual)
        return payload, decoded

    def total(self) -> float:
        """Sum of the residual's elements in float64: what must be conserved when residuals change hands."""
        return float(self.residual.sum(dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """The residual and its segments; loads with ``torch.load(..., weights_only=True)``."""
        return {"residual": self.residual.clone(), "segments": list(self.segments)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: if it belongs to other segments or another type.
        """
        residual, segments = state["residual"], tuple(state["segments"])
        if segments != self.segments or residual.dtype != self.residual.dtype:
            raise ValueError(
                f"saved residual is {residual.dtype} for {len(segments)} segments of {sum(segments)} elements; "
                f"expected {self.residual.dtype} for {len(self.segments)} segments of {sum(self.segments)} elements"
            )
        self.residual.copy_(residual)
