"""Simulated workers whose values lie in the host's memory, as where a GPU cannot hold them: to the bit as otherwise.

On a CPU both places are in the same memory, but values are copied between them as they are between a GPU and its host.
"""

import logging
from functools import partial
from itertools import chain

import pytest
import torch

from lightning_slowmo import SimulatedStrategy, SlowMo
from lightning_slowmo.replicas.states import found
from lightning_slowmo.trainer import simulated
from tests.trainer.models import numbers, trainer
from tests.trainer.test_simulated import CASES, SOME, Model, fit, loader
from tests.trainer.test_simulated_life import ALGORITHM, Compiled, SaveAt, alike
from tests.trainer.test_simulated_life import fit as fit_alike

SIZE = 3
MORE = [name for name in CASES if name not in SOME]
FEW = ("slowmo", "des_loc", "muloco", "accumulation", "accumulated exchange", "clipping", "manual exchange")
FEW += ("validation in between",)


def memory(module, optimizers):
    """Where all that lies that one worker could have."""
    states = chain.from_iterable(found(optimizer.state).values() for optimizer in optimizers)
    gradients = (parameter.grad for parameter in module.parameters() if parameter.grad is not None)
    tensors = chain(module.parameters(), module.buffers(), gradients, states)
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


class OnHost(SimulatedStrategy):
    """Believes that the device has nothing left for workers, and sees to it that they share no memory."""

    def _bytes_left(self):
        return 0

    def on_train_end(self):
        stage = self._stage
        everybody = [
            (self.lightning_module, self.optimizers),
            *((each.module, each.optimizers) for each in stage.replicas),
        ]
        places = [memory(module, optimizers) for module, optimizers in everybody]
        assert len(set.union(*places)) == sum(map(len, places))
        self._look_at_devices(stage)
        super().on_train_end()

    def _look_at_devices(self, stage):
        """On a GPU it shows."""
        for replica in stage.replicas:
            assert all(parameter.is_pinned() == (self.root_device.type == "cuda") for parameter in replica.parameters)
            states = (found(optimizer.state).values() for optimizer in replica.optimizers)
            tensors = chain(replica.parameters, replica.module.buffers(), *states)
            assert {tensor.device.type for tensor in tensors} == {"cpu"}
        for parameter in self.lightning_module.parameters():
            assert parameter.device.type == self.root_device.type


def ends(case, accelerators=("cpu", "cpu")):
    """What comes of a case with workers on the host, and on their device."""
    for kind, accelerator in zip((OnHost, SimulatedStrategy), accelerators, strict=True):
        yield fit(case, partial(kind, workers=SIZE), 1, range(SIZE), accelerator=accelerator)


def ends_with_adam(options, accelerators=("cpu", "cpu")):
    """The same of SlowMo over Adam, as parameters alone."""
    for kind, accelerator in zip((OnHost, SimulatedStrategy), accelerators, strict=True):
        torch.manual_seed(7)
        module = Model("slowmo")
        module.kind = partial(torch.optim.Adam, eps=0.1, **options)  # what is nearly zero would magnify rounding
        fitted = trainer(1, kind(ALGORITHM, SIZE), accelerator=accelerator, precision="64-true", max_steps=12)
        fitted.fit(module, loader(range(SIZE)))
        yield numbers(module)


def compare(case):
    host, device = ends(case)
    assert host == device


@pytest.mark.parametrize("case", [*dict.fromkeys(SOME + FEW)])
def test_workers_on_the_host_train_as_others_do(case):
    compare(case)


@pytest.mark.faults
@pytest.mark.parametrize("case", [case for case in MORE if case not in FEW])
def test_workers_on_the_host_train_as_others_do_with_every_other_preset(case):
    compare(case)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"fused": True}], ids=str)
def test_adam_trains_alike(options):
    host, device = ends_with_adam(options)
    assert host == device


def test_the_slow_state_may_be_offloaded_besides():
    trained = []
    for kind, options in ((OnHost, {"offload_slow_state": "cpu"}), (OnHost, {}), (SimulatedStrategy, {})):
        module, _ = fit_alike(kind(ALGORITHM, SIZE, **options), 1, range(SIZE), 10)
        trained.append(numbers(module))
    assert trained[0] == trained[1] == trained[2]


def test_checkpoints_are_those_of_workers_elsewhere_and_go_on_in_either_place(tmp_path):
    kinds, ends = {"host": OnHost, "device": SimulatedStrategy}, []
    for name, kind in kinds.items():
        saves = [SaveAt(str(tmp_path / name))]  # in the middle of a period
        ends.append(numbers(fit_alike(kind(ALGORITHM, SIZE), 1, range(SIZE), 12, callbacks=saves)[0]))
    for name in kinds:
        for kind in kinds.values():
            resumed, _ = fit_alike(kind(ALGORITHM, SIZE), 1, range(SIZE), 12, resume=str(tmp_path / name))
            ends.append(numbers(resumed))
    assert all(end == ends[0] for end in ends)
    sizes = [sorted(file.stat().st_size for file in (tmp_path / f"{name}.slowmo").rglob("*.pt")) for name in kinds]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)  # nobody saves a neighbour's row


def test_one_graph_serves_all_workers_on_the_host():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    module = Compiled(backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        trainer(1, OnHost(ALGORITHM, SIZE), precision="64-true", max_steps=6).fit(module, alike(range(SIZE)))
    assert len(graphs) == 1


def test_a_line_says_that_workers_lie_on_the_host_and_buckets_are_those_of_the_cpu(caplog, monkeypatch):
    asked = []
    sizes_for = simulated.sizes_for
    monkeypatch.setattr(
        simulated, "sizes_for", lambda device, workers: asked.append(device) or sizes_for(device, workers)
    )
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        fit_alike(OnHost(ALGORITHM, SIZE), 1, range(SIZE), 4)
    [line] = [record.message for record in caplog.records if "host's memory" in record.message]
    assert line.startswith(f"{SIZE} workers need")
    assert "averages run on the CPU" in line
    assert asked == ["cpu"]


def test_what_the_host_cannot_hold_either_is_refused(monkeypatch):
    monkeypatch.setattr(simulated, "free_bytes", lambda: 4000)
    with pytest.raises(
        ValueError, match=r"the device has 0 GB left; in the host's memory it would be .* at most 4 workers"
    ):
        trainer(1, OnHost(SlowMo(), 32), max_steps=1).fit(Model("slowmo"), alike(range(32)))
