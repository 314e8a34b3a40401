"""What an optimizer keeps in its state, found by a trial: momentum, step sizes, copies of the parameters, counters.

Names say little: RMSprop's groups have no ``betas``, Lion's have, and one class may be Muon for matrices and Adam for
the rest. So a copy of the optimizer takes three steps on tiny parameters; again with parameters and gradients mirrored
(multiplied by -1); again with other gradients; and one step with gradients of zero. Each entry of a parameter's state
has one of four roles:

* A **counter** is the same whatever the gradients are (``step``).
* An **iterate** equals the parameter after the step with gradients of zero (schedule-free's z, Lookahead's slow
  weights, float32 master weights, ASGD's average).
* **Momentum** is mirrored with the gradients (SGD's, Lion's and Muon's buffers, Adam's first moment).
* Everything else **adapts** the steps to the gradients so far (second moments, sums of squares, Rprop's step sizes,
  curvature, and codes of quantized buffers, whose sign cannot be seen).

The trial is the same on all workers, takes some ten milliseconds, and leaves optimizer, parameters and random numbers
as they are.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

Role = Literal["counter", "iterate", "momentum", "adapts"]
Kind = tuple[tuple[int, ...], torch.dtype, torch.device]
"""What tells the parameters of one group apart here: tiny shape, dtype and device."""
Key = tuple[int, str]
"""An entry of a parameter's state: the place of the optimizer that holds it (see :func:`nested`), and its name."""

STEPS = 3
"""Two are not enough: Rprop compares the signs of two gradients before it changes a step size."""
EXTENT = 3
"""The largest extent of a tiny parameter; the number of dimensions stays, as Muon and Adafactor look at it."""
TOLERANCE = 0.05
"""How far values that are meant to be equal may differ, relative to the largest: low precision, weight decay."""


class Entry(NamedTuple):
    """What is known of an entry: its role, and its dtype if it is one tensor."""

    role: Role
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Roles:
    """What a trial found.

    Attributes:
        found: by parameter group and kind of parameter, what is known of each entry.
        rebuilds: whether the optimizer builds the state of a parameter in its next step if it is empty.
        failure: why nothing was found; empty if the trial went well.
    """

    found: tuple[dict[Kind, dict[Key, Entry]], ...] = ()
    rebuilds: bool = True
    failure: str = ""

    def any(self, role: Role) -> bool:
        """Whether there is an entry of this role."""
        return any(entry.role == role for kinds in self.found for known in kinds.values() for entry in known.values())

    def of(self, group: int, parameter: Tensor) -> dict[Key, Entry] | None:
        """What is known of each entry of a parameter's state; None if nothing is."""
        return None if self.failure else self.found[group].get(_kind(parameter))


_known: WeakKeyDictionary[Optimizer, tuple[tuple[int, ...], Roles]] = WeakKeyDictionary()


def roles(optimizer: Optimizer) -> Roles:
    """Find the roles of all entries of an optimizer's state; warn once if the trial fails.

    Args:
        optimizer: the user's own. The result is remembered until its groups change.
    """
    groups = tuple(len(group["params"]) for group in optimizer.param_groups)
    known = _known.get(optimizer)
    if known is None or known[0] != groups:
        known = _known[optimizer] = groups, _try(optimizer)
        if known[1].failure:
            warnings.warn(
                f"What {type(optimizer).__name__} keeps in its state is not known, because steps of a copy of it on "
                f"tiny parameters failed ({known[1].failure}). inner_buffers='auto' maintains all of it, and copies of "
                "the parameters in it, if there are any, are not averaged.",
                stacklevel=2,
            )
    return known[1]


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """An optimizer and those that it holds in its attributes, such as SAM's base optimizer."""
    found: list[Optimizer] = []
    waiting = [optimizer]
    while waiting:
        current = waiting.pop(0)
        if not any(current is other for other in found):
            found.append(current)
            waiting += [value for value in vars(current).values() if isinstance(value, Optimizer)]
    return found


def holders_of_state(optimizer: Optimizer) -> list[tuple[int, Optimizer]]:
    """Those of :func:`nested` that hold state of their own, with their places there."""
    distinct: dict[int, tuple[int, Optimizer]] = {}
    for place, holder in enumerate(nested(optimizer)):
        if holder.state:
            distinct.setdefault(id(holder.state), (place, holder))
    return list(distinct.values())


def states(holders: Sequence[tuple[int, Optimizer]], parameter: Tensor) -> Iterator[tuple[int, dict[str, Any]]]:
    """The states of a parameter, with the place of the optimizer that holds them.

    Args:
        holders: what :func:`holders_of_state` found.
        parameter: one of the optimizer's.
    """
    for place, holder in holders:
        if isinstance(state := holder.state.get(parameter), dict) and state:
            yield place, state


def tensors(value: Any) -> list[Tensor]:
    """The tensors in an entry of the state, which may be a collection of them."""
    return [leaf.detach() for leaf in _leaves(value) if isinstance(leaf, Tensor)]


def _leaves(value: Any) -> Iterator[Tensor | float]:
    """The tensors and numbers in an entry."""
    if isinstance(value, Tensor) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)


# The trial ------------------------------------------------------------------------------------------------------------


def _kind(parameter: Tensor) -> Kind:
    return tuple(min(extent, EXTENT) for extent in parameter.shape), parameter.dtype, parameter.device


def _try(optimizer: Optimizer) -> Roles:
    """Try with an empty state, as most optimizers build theirs in a step; else with what the constructor has built.

    Some accept sparse gradients alone.
    """
    failures = []
    devices = {p.device for group in optimizer.param_groups for p in group["params"] if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices, key=str)):
        for keep, sparse in ((False, False), (True, False), (False, True)):
            try:
                return Roles(_compare(optimizer, keep, sparse), rebuilds=not keep)
            except Exception as error:  # of the user's optimizer, so it may be any; the caller warns
                failures.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return Roles(failure=failures[0])


def _compare(optimizer: Optimizer, keep: bool, sparse: bool) -> tuple[dict[Kind, dict[Key, Entry]], ...]:
    plain, mirrored, other, still = (
        _Trial(optimizer, keep, sparse, sign, turn) for sign, turn in ((1, 1), (-1, 1), (1, -2), (1, 0))
    )
    for trial in (plain, mirrored, other):
        for step in range(STEPS):
            trial.step(step)
    still.step(0)
    found: list[dict[Kind, dict[Key, Entry]]] = [{} for _ in optimizer.param_groups]
    for place, (index, kind) in enumerate(plain.places):
        a, b, c, d = (trial.state(place) for trial in (plain, mirrored, other, still))
        start = still.starts[place]
        found[index][kind] = {key: _entry(a[key], b.get(key), c.get(key), d.get(key), start) for key in a}
    return tuple(found)


def _entry(plain: Any, mirrored: Any, other: Any, still: Any, start: Tensor) -> Entry:
    a, b, c, d = ([_wide(leaf) for leaf in _leaves(value)] for value in (plain, mirrored, other, still))
    dtype = plain.dtype if isinstance(plain, Tensor) else None
    if _alike(a, b) and _alike(a, c):
        return Entry("counter", dtype)
    if dtype is not None and (dtype.is_floating_point or dtype.is_complex) and _alike(d, [_wide(start)]):
        return Entry("iterate", dtype)
    return Entry("momentum" if _alike(a, [-tensor for tensor in b]) else "adapts", dtype)


def _wide(value: Tensor | float) -> Tensor:
    """In double precision, on the CPU."""
    if not isinstance(value, Tensor):
        return torch.tensor(value, dtype=torch.float64)
    return value.detach().to("cpu", torch.complex128 if value.is_complex() else torch.float64)


def _alike(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and bool(((a - b).abs() <= TOLERANCE * torch.cat([a, b]).abs().max()).all())
        for a, b in ((a.reshape(-1), b.reshape(-1)) for a, b in zip(left, right, strict=True))
        if a.numel() or b.numel()
    )


class _Trial:
    """A copy of an optimizer on tiny parameters: one for each kind in each group.

    The loss is a parabola in each element, so that optimizers that call a closure several times get what they expect.

    Args:
        optimizer: the user's own.
        keep: whether to begin with its state, cut to size, instead of an empty one.
        sparse: whether gradients are sparse.
        sign: -1 mirrors parameters and gradients.
        turn: what the gradients are multiplied by from one step to the next; 0 makes all of them zero.
    """

    def __init__(self, optimizer: Optimizer, keep: bool, sparse: bool, sign: int, turn: int) -> None:
        self.sparse, self.turn = sparse, turn
        generator = torch.Generator().manual_seed(0)
        memo: dict[int, Any] = {}
        self.places: list[tuple[int, Kind]] = []
        self.parameters: list[Parameter] = []
        for index, group in enumerate(optimizer.param_groups):
            taken = set()
            for parameter in group["params"]:
                kind = _kind(parameter)
                start = sign * (1 + torch.rand(kind[0], generator=generator, dtype=torch.float64))
                tiny = Parameter(start.to(parameter.dtype).to(parameter.device))
                vars(tiny).update(vars(parameter))  # marks that some optimizers look for
                memo[id(parameter)] = tiny
                if kind not in taken:
                    self.places.append((index, kind))
                    self.parameters.append(tiny)
                taken.add(kind)
        self.starts = [parameter.detach().clone() for parameter in self.parameters]
        self.targets = [start + sign * _push(start) for start in self.starts]
        self.optimizer = _copy(optimizer, memo)
        for group in self.optimizer.param_groups:
            group["params"][:] = [p for p in group["params"] if any(p is own for own in self.parameters)]
            if not isinstance(group.get("lr"), Tensor) and group.get("lr") == 0:
                group["lr"] = 1e-3  # the start of a warm-up: at 0 nothing would move
            if group.get("capturable") and not any(parameter.is_cuda for parameter in group["params"]):
                group["capturable"] = False  # simulated workers of a GPU whose values lie on the host: torch refuses
        if keep:
            self._keep_state(optimizer, memo)

    def _keep_state(self, optimizer: Optimizer, memo: dict[int, Any]) -> None:
        """Begin with the optimizer's state; what is a copy of each parameter becomes one of the tiny parameter."""
        for holder, own in zip(nested(optimizer), nested(self.optimizer), strict=True):
            entries = [(name, v, p) for p, state in holder.state.items() for name, v in state.items()]
            moving = {name for name, v, p in entries if p.count_nonzero()}  # a copy of zeros may be a buffer as well
            copies = moving - {name for name, v, p in entries if not _is_copy(v, p)}
            for name, value, parameter in entries:
                tiny = memo[id(parameter)]
                copied = tiny.detach().to(value.dtype, copy=True) if name in copies else _cut(value, parameter, tiny)
                own.state[tiny][name] = copied

    def step(self, step: int) -> None:
        """Take a step, by way of a closure if the optimizer accepts one."""

        def closure() -> Tensor:
            differences = []
            for parameter, target in zip(self.parameters, self.targets, strict=True):
                # With turn = -2 gradients change signs and sizes at every step.
                away = self.turn**step * (target - parameter.detach()) if self.turn else torch.zeros_like(parameter)
                gradient = -away.to(parameter.dtype)
                parameter.grad = gradient.to_sparse(1) if self.sparse else gradient
                differences.append(away.abs().square().sum() / 2)
            return sum(differences, torch.zeros(()).to(differences[0].device))

        closure()
        accepts = "closure" in inspect.signature(type(self.optimizer).step).parameters
        type(self.optimizer).step(self.optimizer, **({"closure": closure} if accepts else {}))  # type: ignore[arg-type]

    def state(self, place: int) -> dict[Key, Any]:
        """The entries of one parameter."""
        found = states(holders_of_state(self.optimizer), self.parameters[place])
        return {(holder, name): value for holder, state in found for name, value in state.items()}


def _push(start: Tensor) -> Tensor:
    """Where a trial pulls its parameters: up and down by turns."""
    return torch.where(torch.arange(start.numel(), device=start.device) % 2 == 0, 4.0, -3.0).view(start.shape)


def _is_copy(value: Any, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.is_complex() != parameter.is_complex():
        return False
    return torch.equal(value.to(parameter), parameter)


def _cut(value: Any, parameter: Tensor, tiny: Tensor) -> Any:
    if isinstance(value, Tensor) and value.shape == parameter.shape:
        return value.detach()[tuple(slice(extent) for extent in tiny.shape)].clone()
    return copy.deepcopy(value)


def _copy(optimizer: Optimizer, memo: dict[int, Any]) -> Optimizer:
    """A copy that holds other parameters, with an empty state and without hooks.

    ``copy.deepcopy`` would lose all attributes but the groups; and learning-rate schedulers replace ``step`` by a
    function that steps the original.
    """
    made = memo[id(optimizer)] = object.__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if name == "state":
            vars(made)[name] = memo.setdefault(id(value), defaultdict(dict))
        elif name.endswith("_hooks"):
            vars(made)[name] = OrderedDict()
        elif isinstance(value, Optimizer):
            vars(made)[name] = memo[id(value)] if id(value) in memo else _copy(value, memo)
        elif not (callable(value) and hasattr(type(optimizer), name)):
            vars(made)[name] = copy.deepcopy(value, memo)
    return made
