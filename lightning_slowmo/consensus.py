"""The consensus: the mean model that is evaluated and saved, in the module's place for a while, or for good.

Beside the trained parameters it has the module's persistent buffers (BatchNorm statistics), and parameters that no
optimizer trains and that change all the same, such as those of an EMA teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_slowmo.algorithms import inner_buffers
from lightning_slowmo.algorithms.base import Running
from lightning_slowmo.averaging import average_tensors
from lightning_slowmo.buffers import Aside, shared
from lightning_slowmo.buffers import load as load_buffers
from lightning_slowmo.communication.meeting import Header, Meeting, Reason, Round
from lightning_slowmo.communication.workers import Workers
from lightning_slowmo.consistency import compare_buffers
from lightning_slowmo.private import held
from lightning_slowmo.shards import is_sharded, reshard
from lightning_slowmo.storage import local
from lightning_slowmo.tensors import checksum


class Consensus:
    """Swaps the consensus in and out, and keeps what no algorithm averages in step.

    Args:
        module: the model; None if there are only the optimizers' parameters.
        workers: between which parameters are exchanged.
        everyone: all processes.

    Attributes:
        untrained: parameters that no optimizer trains and that were seen to differ between workers, by name.
        masks: names of the buffers that were masks when the workers last compared them; they are equal, and not
            averaged.
    """

    def __init__(self, module: Module | None, workers: Workers, everyone: Workers) -> None:
        self.module = module
        self.workers = workers
        self.everyone = everyone
        self.untrained: dict[str, Tensor] = {}
        self.masks: frozenset[str] = frozenset()
        self._own: list[list[Tensor]] | None = None
        self._own_untrained: list[Tensor] = []
        self._own_buffers = Aside(None)
        self._own_iterates: list[list[Tensor]] = []

    @property
    def entered(self) -> bool:
        """Whether the model holds the consensus at present, and the workers' own parameters are put aside."""
        return self._own is not None

    def enter(self, running: Sequence[Running], meeting: Meeting) -> None:
        """Put this worker's parameters and buffers aside and load the consensus; all workers must call this.

        Args:
            running: the algorithms, by optimizer.
            meeting: at which the workers have met for this.

        Raises:
            SyncError, ValueError: on all workers, if their buffers do not go together.
        """
        self.look_for_untrained(running)
        self.compare_buffers()
        self._own = [each.layout.snapshot() for each in running]
        self._own_untrained = [tensor.clone() for tensor in self.untrained.values()]
        self._own_buffers = Aside(self.module)
        self._own_iterates = [[tensor.clone() for tensor in each.iterates.tensors()] for each in running]
        self._load(running, meeting)

    def leave(self, running: Sequence[Running]) -> None:
        """Give this worker its own parameters and buffers back, bit for bit.

        Buffers that have first appeared in the meantime stay, and masks that were drawn anew.
        """
        if self._own is None:
            return
        reshard(self.module)
        with torch.no_grad():
            for each, snapshot, iterates in zip(running, self._own, self._own_iterates, strict=True):
                each.layout.restore(snapshot)
                _copy(each.iterates.tensors(), iterates)
            _copy(list(self.untrained.values()), self._own_untrained)
            self._own_buffers.put_back(self.masks)
        self._own, self._own_untrained, self._own_iterates, self._own_buffers = None, [], [], Aside(None)

    def settle(self, running: Sequence[Running], meeting: Meeting) -> None:
        """Load the consensus for good: training ends, or goes on from there."""
        self.look_for_untrained(running)
        self.compare_buffers()
        self._load(running, meeting, for_good=True)

    def _load(self, running: Sequence[Running], meeting: Meeting, for_good: bool = False) -> None:
        with torch.no_grad():
            for index, each in enumerate(running):
                each.averager.drain()
                round = meeting.round(Header(Reason.SYNC, index))
                with each.iterates.following(self.workers) as average_offsets:
                    if for_good:
                        each.averager.finish(round)
                        each.moved()
                    else:
                        each.averager.consensus(round)
                    average_offsets(round.weights)
            self._average_alike([*self._buffers(), *self.untrained.values()], meeting)

    def compare_buffers(self, everyone: Workers | None = None) -> None:
        """Make sure that the workers' buffers go together; all must call this.

        Args:
            everyone: whose; those of all processes if None.

        Raises:
            SyncError: on all workers; names a buffer that differs in shape, or a mask that differs.
        """
        self.masks = compare_buffers(self.module, self.everyone if everyone is None else everyone)

    def _buffers(self) -> list[Tensor]:
        """The persistent buffers without masks."""
        return [slot.tensor.detach() for slot in shared(self.module) if slot.name not in self.masks]

    def model(self, running: Sequence[Running]) -> list[Tensor]:
        """Everything that the consensus is made of: trained parameters, buffers and, of the module, all others.

        Raises:
            ValueError: if any is sharded: it is in no process as a whole.
        """
        trained = [parameter for each in running for parameter in each.layout.parameters]
        known = {id(parameter) for parameter in trained}
        others = [] if self.module is None else [p for p in self.module.parameters() if id(p) not in known]
        buffers = [slot.tensor for slot in shared(self.module)]
        if any(map(is_sharded, (*trained, *others))):
            raise ValueError("Workers of sharded models cannot join or leave in the middle of training.")
        return [tensor.detach() for tensor in (*trained, *others, *buffers)]

    # What no algorithm averages ---------------------------------------------------------------------------------------

    def look_for_untrained(self, running: Sequence[Running]) -> None:
        """Find parameters that no optimizer trains and that change all the same.

        Shards that were gathered for a forward pass are let go of first: the module lists the whole parameters then.

        Frozen parameters must keep their bits, and a mean of equal values can lose one; so a parameter is averaged
        only once the workers' checksums of it differ.
        """
        reshard(self.module)
        if self.module is None or self.everyone.alone:
            return
        trained = {id(parameter) for each in running for parameter in each.layout.parameters}
        others = {
            name: parameter.detach()
            for name, parameter in self.module.named_parameters()
            if id(parameter) not in trained and name not in self.untrained and parameter.numel()
        }
        if not others:
            return
        sharded = any(map(is_sharded, others.values()))
        numbers = [self.workers.places[0] if sharded else 0, *(checksum(local(tensor)) for tensor in others.values())]
        places, *columns = zip(*self.everyone.gather(numbers, "checksums of untrained parameters"), strict=True)
        pairs = [set(zip(places, column, strict=True)) for column in columns]  # one of each place, if workers agree
        differ = [name for name, seen in zip(others, pairs, strict=True) if len(seen) > len(set(places))]
        self.untrained |= {name: others[name] for name in differ}

    def average_also(self, names: Sequence[str]) -> None:
        """Set which of the module's untrained parameters are averaged."""
        named = dict(self.module.named_parameters()) if self.module is not None else {}
        self.untrained = {name: named[name].detach() for name in names}

    def average_untrained(self, meeting: Meeting) -> None:
        """Average the parameters that were found to change."""
        with torch.no_grad():
            self._average_alike(list(self.untrained.values()), meeting)

    def _average_alike(self, tensors: Sequence[Tensor], meeting: Meeting) -> None:
        """Average tensors over all healthy ones that hold the same: shards over workers, others over processes."""
        well = meeting.healthy()
        worker_of = {process: worker for worker, ranks in enumerate(meeting.members) for process in ranks}
        everywhere = [float(well[worker_of[process]]) for process in range(self.everyone.size)]
        average_tensors([tensor for tensor in tensors if not is_sharded(tensor)], self.everyone, everywhere)
        shards = [tensor for tensor in tensors if is_sharded(tensor)]
        average_tensors(shards, self.workers, [float(each) for each in well])

    def heal(self, running: Running, round: Round) -> None:
        """Give the workers that were left out of a mean what their parameters alone do not bring back to health."""
        healthy = round.healthy[self.workers.rank]
        self.compare_buffers()
        buffers = self._buffers()
        own = [buffer.clone() for buffer in buffers]
        average_tensors(buffers, self.workers, [float(well) for well in round.healthy])
        if healthy:
            for buffer, value in zip(buffers, own, strict=True):
                buffer.copy_(value)
        else:
            inner_buffers.reset(running.optimizer)

    # State ------------------------------------------------------------------------------------------------------------

    def local_state(self, running: Sequence[Running]) -> dict[str, Any]:
        """This worker's own parameters and buffers, also while the model holds the consensus."""
        own = self._own if self._own is not None else [each.layout.snapshot() for each in running]
        iterates = self._own_iterates if self.entered else [each.iterates.tensors() for each in running]
        return {
            "parameters": [each.layout.per_parameter(flat) for each, flat in zip(running, own, strict=True)],
            "moving": list(self.untrained),
            "untrained": list(map(held, self._own_untrained if self.entered else self.untrained.values())),
            "buffers": (self._own_buffers if self.entered else Aside(self.module)).values,
            "iterates": [
                list(map(held, tensors)) for tensors in iterates
            ],  # the optimizer's state is saved too, but perhaps while it holds the consensus's
        }

    def load_local_state(self, running: Sequence[Running], state: dict[str, Any]) -> None:
        """Restore what :meth:`local_state` returned on this worker."""
        with torch.no_grad():
            for each, parameters in zip(running, state["parameters"], strict=True):
                for parameter, own in zip(each.layout.parameters, parameters, strict=True):
                    local(parameter).copy_(own)
            self.average_also(state["moving"])
            saved, count = state["buffers"], len(self.untrained)
            if isinstance(saved, list):  # written before buffers had names: untrained parameters lie behind them
                untrained, saved = saved[len(saved) - count :], saved[: len(saved) - count]
            else:
                untrained = state["untrained"]
            _copy(list(self.untrained.values()), untrained)
            load_buffers(self.module, saved)
            for each, iterates in zip(running, state.get("iterates", ()), strict=False):  # version 0.1 saved none
                _copy(each.iterates.tensors(), iterates)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        held(target).copy_(held(source))
