"""QSDP: weights and gradients that are quantized where FSDP2 gathers and reduces them (Markov et al. 2023).

Each ``fully_shard`` module gathers its shards with one message and reduces its gradients with another. Here both become
payloads of the package's compressors: an all-gather of rounded weights, and an all-to-all of rounded gradients, which
their owner adds up. What the owner keeps and steps is in full precision, and there is no error feedback.

A module's message holds the padded shards of its parameters one after another. Buckets do not cross them, and
parameters with fewer than two dimensions (norms, biases) travel as they are.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Module

from lightning_slowmo.communication.workers import Traffic
from lightning_slowmo.compression import QSGD, Compressor, ShiftedGrid, compute_dtype, seeded_generator
from lightning_slowmo.compression.finite import FiniteCheck
from lightning_slowmo.private import sharding, version_of


@dataclass(frozen=True)
class QSDP:
    """Quantized messages for modules that ``torch.distributed.fsdp.fully_shard`` has sharded.

    Weights are rounded to a grid of ``2**weight_bits`` points between the smallest and largest of a bucket, with one
    random shift for all of them (:class:`~lightning_slowmo.compression.ShiftedGrid`): every rank sees the same weights,
    in the backward pass those of the forward pass, and over the shifts, which change when the weights change, they are
    unbiased. Gradients are rounded at random to ``2**gradient_bits - 1`` levels of the largest of a bucket
    (:class:`~lightning_slowmo.compression.QSGD`), unbiased, with noise of its own on every data-parallel rank.

    Args:
        weight_bits: bits for a weight, 1 to 16; None leaves weights as they are.
        gradient_bits: bits for an element of a gradient, 2 to 16; None leaves gradients as they are.
        bucket: elements that share a scale.
        seed: of the random shifts and roundings. Models that are averaged with one another need different ones;
            ``SlowMoModelParallelStrategy(qsdp=...)`` sees to it.

    Raises:
        ValueError: if an argument is out of range.

    Example::

        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        quantized = QSDP(weight_bits=8, gradient_bits=8).apply(model)
        ...                                                          # train as before
        print(quantized.traffic.sent)

    References:
        Markov, Vladu, Guo and Alistarh 2023 (arXiv 2302.02390).
    """

    weight_bits: int | None = 8
    gradient_bits: int | None = 8
    bucket: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name, bits, least in (("weight_bits", self.weight_bits, 1), ("gradient_bits", self.gradient_bits, 2)):
            integer = isinstance(bits, int) and not isinstance(bits, bool)
            if bits is not None and not (integer and least <= bits <= 16):
                raise ValueError(f"{name} is {bits!r}; allowed are {least} to 16, or None for full precision.")
        if not isinstance(self.bucket, int) or self.bucket < 1:
            raise ValueError(f"bucket is {self.bucket!r}; it must be at least 1 element.")

    @property
    def weights(self) -> Compressor | None:
        """How weights are rounded."""
        return None if self.weight_bits is None else ShiftedGrid(self.weight_bits, self.bucket)

    @property
    def gradients(self) -> Compressor | None:
        """How gradients are rounded."""
        return None if self.gradient_bits is None else QSGD(self.gradient_bits, bucket=self.bucket, norm="max")

    def bytes_sent(
        self, shapes: Sequence[Sequence[int]], ranks: int, dtype: torch.dtype = torch.float32
    ) -> tuple[int, int]:
        """What a rank sends to gather all weights once, and to reduce all gradients once.

        Args:
            shapes: of the parameters, which ``fully_shard`` cuts along their first dimension.
            ranks: between which they are cut.
            dtype: of the elements that travel.

        Example:
            >>> QSDP(8, None).bytes_sent([(1024, 1024)], ranks=2)
            (528384, 2097152)
        """
        shards = [(-(-shape[0] // ranks) * math.prod(shape[1:]), len(shape) > 1) for shape in shapes if shape]
        plain = sum(length for length, _ in shards) * dtype.itemsize
        rounding = self.weights, self.gradients
        weights, gradients = (plain if each is None else Codec(each, shards, dtype).size for each in rounding)
        return (ranks - 1) * weights, (ranks - 1) * gradients

    def apply(self, model: Module) -> QuantizedSharding:
        """Quantize the messages of all ``fully_shard`` modules in a model, itself among them; on every rank alike.

        Args:
            model: after ``fully_shard``, before or after its first step.

        Raises:
            ValueError: if there is no such module, or one that is cut differently after the forward pass.
        """
        from torch.distributed.fsdp import FSDPModule  # which loads much of torch that nothing else here needs

        modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        modules = [module for module in modules if sharding.fsdp_shards(module)]
        if not modules:
            raise ValueError(
                f"There is no fully_shard module in {type(model).__name__}, so QSDP has no messages to round: call "
                "fully_shard first; under a strategy, in configure_model."
            )
        if any(sharding.fsdp_sizes(module)[1] for module in modules):
            raise ValueError("QSDP needs fully_shard(reshard_after_forward=True) or False, not a number of processes.")
        traffic = Traffic()
        gathers: list[Any] = []  # they have what FSDP2's own, abstract classes ask for, which are private
        reductions: list[Any] = []
        for index, module in enumerate(modules):
            if self.weights is not None:
                gathers.append(QuantizedAllGather(module, self.weights, self.seed, traffic))
                module.set_custom_all_gather(gathers[-1])
            if self.gradients is not None:
                reductions.append(QuantizedReduceScatter(module, self.gradients, self.seed, index, traffic))
                module.set_custom_reduce_scatter(reductions[-1])
        return QuantizedSharding(gathers, reductions, traffic)


class QuantizedSharding:
    """A model whose messages are quantized.

    Args:
        gathers: one per ``fully_shard`` module; none where weights travel as they are.
        reductions: the same for gradients.
        traffic: what they count.

    Attributes:
        traffic: bytes that this rank gave to the transport for quantized messages, and took from it. An all-gather
            sends this rank's payload to each other one, a reduction one payload to each.
    """

    def __init__(
        self, gathers: Sequence[QuantizedAllGather], reductions: Sequence[QuantizedReduceScatter], traffic: Traffic
    ) -> None:
        self.gathers = list(gathers)
        self.reductions = list(reductions)
        self.traffic = traffic

    @property
    def gather_bytes(self) -> int:
        """What this rank sends to gather all weights once; modules that reshard are gathered twice in a step."""
        return sum(each.bytes_sent for each in self.gathers)

    @property
    def reduce_bytes(self) -> int:
        """What this rank sends to reduce all gradients once."""
        return sum(each.bytes_sent for each in self.reductions)

    def state_dict(self) -> dict[str, list[int]]:
        """How far the random numbers are, equal on all ranks: with it training goes on bit for bit."""
        return {"weights": [each.drawn for each in self.gathers], "gradients": [each.count for each in self.reductions]}

    def load_state_dict(self, state: dict[str, list[int]]) -> None:
        """Go on where :meth:`state_dict` was, in a model that is sharded by the same modules.

        What is rounded in one of the two runs alone, weights or gradients, begins anew.

        Raises:
            ValueError: if it is the state of another number of modules.
        """
        for kind, own in (("weights", self.gathers), ("gradients", self.reductions)):
            if state[kind] and own and len(state[kind]) != len(own):
                raise ValueError("The state is that of a model with other fully_shard modules.")
        for gather, drawn in zip(self.gathers, state["weights"], strict=False):
            gather.draws, gather.version = drawn, None
        for reduction, count in zip(self.reductions, state["gradients"], strict=False):
            reduction.count = count


class _Message:
    """What a module's messages have in common: which elements are rounded, and how a shard becomes a payload."""

    def __init__(self, module: Any, compressor: Compressor, seed: int, traffic: Traffic) -> None:
        self.module = weakref.ref(module)
        self.compressor = compressor
        self.seed = seed
        self.traffic = traffic
        self.others = sharding.fsdp_sizes(module)[0] - 1

    @property
    def shards(self) -> list[tuple[Any, int]]:
        """The module's parameters, and the elements of a shard of each."""
        module = self.module()
        assert module is not None  # it is the one that calls
        return sharding.fsdp_shards(module)

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for what FSDP2 fills and reads; it asks for it here."""
        return torch.empty(*size, dtype=dtype, device=device)

    def codec(self, numel: int, dtype: torch.dtype) -> Codec:
        """How shards of one rank are written."""
        if not dtype.is_floating_point:
            raise ValueError(
                "The parameters of a fully_shard module have different dtypes, or are quantized already. Give them one "
                "dtype, by MixedPrecisionPolicy(param_dtype=...) or by a module of their own."
            )
        shards = [(length, parameter.dim() > 1) for parameter, length in self.shards]
        if sum(length for length, _ in shards) != numel:
            # Some parameters have no gradients; FSDP2 does not say which. Then all are rounded, across their borders.
            shards = [(numel, True)]
        return Codec(self.compressor, shards, dtype)


class QuantizedAllGather(_Message):
    """FSDP2's all-gather with rounded weights, for one module."""

    def __init__(self, module: Any, compressor: Compressor, seed: int, traffic: Traffic) -> None:
        super().__init__(module, compressor, seed, traffic)
        self.draws = 0
        self.version: tuple[int, ...] | None = None

    @property
    def bytes_sent(self) -> int:
        """What this rank sends in one all-gather of parameters in their own dtype."""
        parameter = self.shards[0][0]
        return self.others * self.codec(sum(length for _, length in self.shards), parameter.dtype).size

    @property
    def drawn(self) -> int:
        """Shifts that were drawn for weights before the present ones."""
        return self.draws - (self.version == self._present)

    @property
    def _present(self) -> tuple[int, ...]:
        """How often each parameter was changed: new weights get a new shift, and the backward pass the forward's.

        An optimizer's step is counted by the ``DTensor``, a write to the memory of this rank's shard by that.
        """
        with torch.no_grad():
            both = ((parameter, parameter.to_local()) for parameter, _ in self.shards)
            return tuple(version_of(tensor) for pair in both for tensor in pair)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Fill ``output_tensor`` with all ranks' rounded shards; nothing is rounded where nothing travels."""
        ranks = group.size()
        if ranks == 1:
            output_tensor.copy_(input_tensor)
            return
        present = self._present
        if present != self.version:
            self.draws, self.version = self.draws + 1, present
        codec = self.codec(input_tensor.numel(), input_tensor.dtype)
        own = codec.encode(input_tensor, seeded_generator(self.seed, round=self.draws))
        payloads = own.new_empty(ranks * codec.size)
        dist.all_gather_into_tensor(payloads, own, group=group)
        self.traffic.collectives += 1
        self.traffic.sent += (ranks - 1) * codec.size
        self.traffic.received += (ranks - 1) * codec.size
        for payload, shard in zip(payloads.split(codec.size), output_tensor.chunk(ranks), strict=True):
            codec.decode(payload, shard)


class QuantizedReduceScatter(_Message):
    """FSDP2's reduce-scatter with rounded gradients, for one module."""

    def __init__(self, module: Any, compressor: Compressor, seed: int, index: int, traffic: Traffic) -> None:
        super().__init__(module, compressor, seed, traffic)
        self.index = index
        self.count = 0
        self.replica = sharding.fsdp_replica(module)  # tensor-parallel processes share the noise: they hold copies

    @property
    def bytes_sent(self) -> int:
        """What this rank sends in one reduction of gradients of the parameters' own dtype."""
        parameter = self.shards[0][0]
        return self.others * self.codec(sum(length for _, length in self.shards), parameter.dtype).size

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Fill ``output_tensor`` with the sum or mean of all ranks' gradients of this rank's shards.

        This rank's own share is not rounded. NaN and infinity arrive as NaN, so that a gradient scaler sees them.

        Raises:
            ValueError: if they are to be multiplied by something else.
        """
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(
                f"QSDP reduces gradients to their sum or mean, not by {op}: no set_gradient_divide_factor."
            )
        ranks, rank = group.size(), group.rank()
        shards = input_tensor.chunk(ranks)
        codec = self.codec(shards[0].numel(), input_tensor.dtype)
        generator = seeded_generator(self.seed, 1 + self.replica * ranks + rank, self.count * 2**20 + self.index)
        self.count += 1
        leaving = [codec.encode(shard, generator) for to, shard in enumerate(shards) if to != rank]
        sizes = [0 if to == rank else codec.size for to in range(ranks)]
        arriving = input_tensor.new_empty(sum(sizes), dtype=torch.uint8)
        if ranks > 1:
            dist.all_to_all_single(arriving, torch.cat(leaving), sizes, sizes, group=group)
            self.traffic.collectives += 1
            self.traffic.sent += sum(sizes)
            self.traffic.received += sum(sizes)
        total = shards[rank].to(compute_dtype(input_tensor.dtype), copy=True)
        share = torch.empty_like(shards[rank])
        for payload in arriving.split(codec.size) if ranks > 1 else ():
            total.add_(codec.decode(payload, share))
        output_tensor.copy_(total.div_(ranks) if op == dist.ReduceOp.AVG else total)


class Codec:
    """How one rank's shards become a payload: some rounded, the others as they are.

    Args:
        compressor: rounds.
        shards: the length of each, and whether it is rounded.
        dtype: of the elements.

    Attributes:
        size: bytes of a payload, a multiple of 8.
    """

    def __init__(self, compressor: Compressor, shards: Sequence[tuple[int, bool]], dtype: torch.dtype) -> None:
        self.compressor, self.dtype = compressor, dtype
        self.segments = tuple(length for length, rounded in shards if rounded)
        self.exact = sum(length for length, rounded in shards if not rounded)
        self.runs = [(sum(n for n, _ in run), rounded) for rounded, run in groupby(shards, key=lambda shard: shard[1])]
        self.rounded_bytes = math.ceil(compressor.payload_bytes(self.segments, dtype) / 8) * 8
        self.size = self.rounded_bytes + math.ceil(self.exact * dtype.itemsize / 8) * 8

    def encode(self, flat: Tensor, generator: torch.Generator) -> Tensor:
        """The payload of shards that lie one after another."""
        payload = torch.zeros(self.size, dtype=torch.uint8, device=flat.device)
        rounded, exact = self._parts(flat)
        if rounded:
            content = self.compressor.encode(_joined(rounded), self.segments, generator, _AnyNumber())
            payload[: content.numel()] = content
        if exact:
            self._exact(payload).copy_(_joined(exact))
        return payload

    def decode(self, payload: Tensor, out: Tensor) -> Tensor:
        """Write what a payload says into ``out``, and return it."""
        rounded, exact = self._parts(out)
        if rounded:
            length = self.compressor.payload_bytes(self.segments, self.dtype)
            values = self.compressor.decompress(payload[:length], self.segments, self.dtype)
            for part, value in zip(rounded, values.split([len(part) for part in rounded]), strict=True):
                part.copy_(value)
        if exact:
            values = self._exact(payload)
            for part, value in zip(exact, values.split([len(part) for part in exact]), strict=True):
                part.copy_(value)
        return out

    def _parts(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The parts of a vector that are rounded, and the others."""
        parts = flat.split([length for length, _ in self.runs])
        rounded = [part for part, (_, is_rounded) in zip(parts, self.runs, strict=True) if is_rounded]
        return rounded, [part for part, (_, is_rounded) in zip(parts, self.runs, strict=True) if not is_rounded]

    def _exact(self, payload: Tensor) -> Tensor:
        end = self.rounded_bytes + self.exact * self.dtype.itemsize
        return payload[self.rounded_bytes : end].view(self.dtype)


class _AnyNumber(FiniteCheck):
    """Lets NaN and infinity pass: what a bucket with one becomes is NaN on all ranks, as without quantization."""

    def require(self, values: Tensor, compressor: Compressor, what: str = "input") -> None:
        """Require nothing."""


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
