"""Workers that share one model, whether the stage points to their values or copies them in and out as on a GPU."""

import random
import re
import sys
from functools import partial

import numpy
import pytest
import torch
from torch import nn

from lightning_slowmo import DiLoCo, LocalSGD, SlowMo
from lightning_slowmo.replicas import Memory, Stage, buffers, memory_of_worker
from lightning_slowmo.replicas.host import HostMemory, bytes_taken, free_bytes
from lightning_slowmo.replicas.optimizers import move_together
from lightning_slowmo.replicas.randomness import NumpyRandomness, Randomness
from lightning_slowmo.replicas.rows import Rows
from tests.trainer.models import distance, numbers

places = pytest.mark.parametrize(
    "place", [{"static": False}, {"static": True}, {"on_host": True}], ids=["pointed to", "copied", "on the host"]
)
sizes = pytest.mark.parametrize("width", [2, 4], ids=["unaligned", "aligned"])


def small(width=4):
    return nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))


@places
@sizes
def test_workers_of_one_stage_do_not_mix(place, width):
    module = small(width)
    optimizer = torch.optim.Adam(module.parameters())
    stage = Stage(module, [optimizer], 3, **place)
    for index in range(3):
        stage.put(index)
        torch.manual_seed(index)
        module(torch.randn(4, width) + index).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    values = []
    for index in range(3):
        stage.put(index)
        values.append(numbers(module))
        assert int(optimizer.state[module[0].weight]["step"]) == 1
        assert int(module[1].num_batches_tracked) == 1
    assert min(distance(values[a], values[b]) for a, b in ((0, 1), (1, 2), (0, 2))) > 0
    stage.put(1)
    draws = torch.rand(1)
    stage.put(2)
    stage.put(1)
    assert torch.rand(1) != draws  # the stream goes on
    stage.retire()
    assert distance(numbers(module), values[1]) == 0


def test_every_worker_draws_as_if_it_were_alone():
    """NumPy keeps the second of two normal numbers beside its bits, Python's generator none: all orders are mixed."""
    plan = [["randn"], ["rand", "randn", "randn"], ["randn", "rand"], [], ["randn", "randn", "randn"], ["rand"]]

    def draw(kinds):
        for kind in kinds:
            yield float(getattr(numpy.random, kind)())
        yield random.gauss(0, 1)
        yield torch.rand(1).item()

    def seed():
        numpy.random.seed(3)  # noqa: NPY002
        random.seed(3)
        torch.manual_seed(3)

    turns = [[plan[(step + worker) % len(plan)] for step in range(12)] for worker in range(3)]
    expected = []
    for worker in range(3):
        seed()
        expected.append([list(draw(kinds)) for kinds in turns[worker]])
    seed()
    workers = [Randomness(torch.device("cpu")) for _ in range(3)]
    drawn = [[], [], []]
    for step in range(12):
        for worker in (0, 2, 1):
            workers[worker].restore()
            drawn[worker].append(list(draw(turns[worker][step])))
            workers[worker].note()
    assert drawn == expected


def test_the_memory_of_numpys_generator_is_read_where_it_is():
    worker = NumpyRandomness()
    worker.restore()
    for _ in range(3):
        numpy.random.rand(5)  # noqa: NPY002
        state = numpy.random.get_state(legacy=False)["state"]  # noqa: NPY002
        raw = worker._tail.raw
        assert numpy.frombuffer(raw[:-4], numpy.uint32).tolist() == state["key"][-8:].tolist()
        assert int.from_bytes(raw[-4:], sys.byteorder) == state["pos"]


@places
def test_an_optimizer_that_holds_another_one_is_swapped_with_it(place):
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, parameters, inner):
            self.inner = inner(parameters)
            super().__init__(self.inner.param_groups, {})
            self.param_groups = self.inner.param_groups
            self.steps = 0

        def step(self, closure=None):
            self.steps += 1
            return self.inner.step(closure)

    module = nn.Linear(2, 1)
    optimizer = Wrapper(module.parameters(), partial(torch.optim.SGD, lr=0.1, momentum=0.9))
    stage = Stage(module, [optimizer], 2, **place)
    for index in (0, 0, 1):
        stage.put(index)
        module(torch.ones(1, 2) * (1 + index)).sum().backward()
        optimizer.step()
    buffers = []
    for index in (0, 1):
        stage.put(index)
        buffers.append((optimizer.steps, optimizer.inner.state[module.weight]["momentum_buffer"].clone()))
    assert [steps for steps, _ in buffers] == [2, 1]
    assert not torch.equal(buffers[0][1], buffers[1][1])


@places
def test_states_that_an_algorithm_replaces_or_drops_are_seen_on_the_stage(place):
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    stage = Stage(module, [optimizer], 2, **place)
    for index in (0, 1):
        stage.put(index)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    stage.clear()
    own = stage.replicas[0].optimizers[0]
    weight, bias = stage.replicas[0].parameters
    own.state[weight]["momentum_buffer"].fill_(5)  # in place
    own.state[bias] = {"momentum_buffer": torch.full((1,), 7.0)}
    stage.replicas[1].optimizers[0].state.clear()
    stage.put(0)
    buffers = [optimizer.state[parameter]["momentum_buffer"].flatten()[0].item() for parameter in module.parameters()]
    assert buffers == [5, 7]
    stage.put(1)
    assert not optimizer.state


@places
def test_gradients_go_with_their_worker_or_are_dropped(place):
    module = nn.Linear(2, 1)
    stage = Stage(module, [torch.optim.SGD(module.parameters(), lr=0.1)], 2, **place)
    stage.put(0)
    module(torch.ones(1, 2)).sum().backward()
    own = module.weight.grad.clone()
    stage.put(1)
    assert module.weight.grad is None
    module(torch.ones(1, 2)).sum().backward()
    stage.clear(drop_gradients=True)
    assert all(parameter.grad is None for parameter in (*module.parameters(), *stage.replicas[1].parameters))
    stage.put(0)
    assert torch.equal(module.weight.grad, own)
    module.zero_grad()
    stage.clear()
    assert stage.replicas[0].parameters[0].grad is None


@sizes
def test_addresses_stay_where_values_are_copied_also_if_an_optimizer_binds_parameters_anew(width):
    module = small(width)
    stage = Stage(module, [torch.optim.SGD(module.parameters(), lr=0.1)], 3, static=True)

    def addresses():
        return [tensor.data_ptr() for tensor in (*module.parameters(), *module.buffers())]

    before = addresses()
    for index in (0, 1, 2, 0):
        stage.put(index)
        assert addresses() == before
        module[0].weight.data = module[0].weight.data + 1 + index
    stage.put(1)
    seen = module[0].weight.detach().clone()
    stage.put(2)
    assert torch.allclose(module[0].weight, seen + 1)
    assert addresses() == before


class Grows(nn.Module):
    """Keeps all that it has seen in a buffer, and makes another one at its second call."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("nothing", None)

    def forward(self, value):
        self.seen = torch.cat([self.seen, torch.tensor([value])])
        if len(self.seen) == 2:
            self.nothing = torch.tensor(value)


@places
def test_buffers_that_grow_or_appear_are_each_workers_own(place):
    module = Grows()
    stage = Stage(module, [torch.optim.SGD(module.parameters(), lr=0.1)], 3, **place)
    for value in (0.0, 10.0, 20.0):
        for index in range(3):
            stage.put(index)
            module(value + index)
    for index in range(3):
        stage.put(index)
        assert module.seen.tolist() == [index, 10.0 + index, 20.0 + index]
        assert module.nothing.item() == 10.0 + index


def test_buffers_are_copied_together_also_where_one_is_none(monkeypatch):
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    module.loss = nn.CrossEntropyLoss()  # its buffer with the weights of classes is None
    stage = Stage(module, [torch.optim.SGD(module.parameters(), lr=0.1)], 2, static=True)
    alone = []
    monkeypatch.setattr(buffers, "_copy", lambda source, target: alone.append(source))
    for value in (0.0, 1.0):
        for index in range(2):
            stage.put(index)
            module[1].running_mean.add_(value + index)
    assert not alone
    for index in range(2):
        stage.put(index)
        assert module[1].running_mean.tolist() == [1.0 + 2 * index] * 4


def test_a_row_says_whether_kernels_can_take_it():
    assert Rows([torch.zeros(4), torch.zeros(8), torch.zeros(3)]).aligned
    assert not Rows([torch.zeros(3), torch.zeros(8)]).aligned
    rows = Rows([torch.ones(2, 3).t(), torch.ones(4, dtype=torch.float64), torch.ones(2)])
    assert [whole.numel() for whole in rows.wholes] == [8, 4]
    assert rows.tensors[0].stride() == (1, 3)


def test_states_are_moved_together_but_for_those_whose_memory_something_else_looks_at():
    parameter, flat = torch.ones(3), torch.arange(6.0)
    states = [
        {"momentum": torch.full((3,), 2.0), "step": torch.tensor(4.0), "alias": parameter.detach(), "note": "a"},
        {"first": flat[:3], "whole": flat, "wide": torch.full((2, 3), 5.0).t()},
        "no state",
    ]
    before = [dict(state) for state in states[:2]]
    move_together(states, apart_from=[parameter])
    for state, old in zip(states, before, strict=False):
        assert all(state[name] is value or torch.equal(state[name], value) for name, value in old.items())
    assert states[0]["alias"] is before[0]["alias"]
    assert states[1]["first"] is before[1]["first"]
    assert states[1]["whole"] is before[1]["whole"]
    moved = [states[0]["momentum"], states[0]["step"], states[1]["wide"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in moved}) == 1
    assert states[1]["wide"].stride() == (1, 3)


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "copies"),
    [
        (partial(torch.optim.SGD, lr=0.1), 0),
        (partial(torch.optim.SGD, lr=0.1, momentum=0.9), 1),
        (torch.optim.Adam, 2),
        (partial(torch.optim.AdamW, amsgrad=True), 3),
    ],
)
@pytest.mark.parametrize(("algorithm", "slow"), [(LocalSGD(), 0), (SlowMo(), 2), (DiLoCo(), 2)])
def test_the_memory_of_a_worker_is_known_before_it_trains(make, copies, algorithm, slow):
    module = small(width=50)
    optimizer = make(module.parameters())
    rate = torch.optim.lr_scheduler.ConstantLR(optimizer)  # takes the optimizer's step over
    before = numbers(module)
    parameters = sum(4 * parameter.numel() for parameter in module.parameters())
    memory = memory_of_worker(module, [optimizer], algorithm, 8)
    assert memory.model == parameters + 4 * 2 * 50 + 8
    assert copies * parameters <= memory.optimizer <= copies * parameters + 4 * 4  # with counters of steps
    assert memory.slow == slow * parameters
    assert not optimizer.state
    assert distance(numbers(module), before) == 0
    assert rate.last_epoch == 0


def test_an_optimizer_that_needs_values_is_counted_with_the_state_that_it_has():
    class Looks(torch.optim.SGD):
        def step(self, closure=None):
            if self.param_groups[0]["params"][0].grad.sum().item() > 0:
                super().step(closure)

    module = nn.Linear(10, 10)
    assert memory_of_worker(module, [Looks(module.parameters(), lr=0.1, momentum=0.9)], SlowMo(), 8).optimizer == 0


MEMORY = Memory(model=4_000_000, optimizer=4_000_000, slow=8_000_000)


def test_workers_lie_on_the_device_if_it_holds_them_and_else_on_the_host():
    assert MEMORY.place(256, free=4_096_000_000, free_on_host=0, offloaded=False) is None
    assert MEMORY.place(256, free=2_048_000_000, free_on_host=0, offloaded=True) is None
    assert MEMORY.place(257, free=4_096_000_000, free_on_host=10**10, offloaded=False) == (
        "257 workers need 4.11 GB for parameters, optimizer states and slow state, and the device has 4.1 GB left. So "
        "they lie in the host's memory, of which they take 5.16 GB with what a consensus needs; workers are copied to "
        "the device for their turns, and averages run on the CPU. With offload_slow_state='cpu' they would lie on the "
        "device."
    )
    said = MEMORY.place(512, free=4_000_000_000, free_on_host=11 * 10**9, offloaded=True)
    assert "512 workers need 4.1 GB for parameters and optimizer states" in said
    assert "offload" not in said


def test_what_neither_the_device_nor_the_host_can_hold_is_refused_with_what_would_fit():
    with pytest.raises(
        ValueError,
        match=re.escape(
            "257 workers need 4.11 GB for parameters, optimizer states and slow state, and the device has 4.1 GB left; "
            "in the host's memory it would be 5.16 GB, and that has 5 GB left. Use at most 256 workers, or "
            "offload_slow_state='cpu'."
        ),
    ):
        MEMORY.place(257, free=4_096_000_000, free_on_host=5 * 10**9, offloaded=False)
    with pytest.raises(ValueError, match=r"Use at most 199 workers\.$"):
        MEMORY.place(512, free=10**9, free_on_host=4 * 10**9, offloaded=False)
    with pytest.raises(ValueError, match=r"Use a smaller model\.$"):
        MEMORY.place(2, free=10**6, free_on_host=10**7, offloaded=True)


@pytest.mark.parametrize("size", [1, 100, 4096, 44_700_000, 1_100_000_000])
@pytest.mark.parametrize("workers", [1, 3, 32])
def test_rows_of_many_workers_share_blocks_that_are_powers_of_two(size, workers, monkeypatch):
    blocks = []

    def empty(size, **_):
        blocks.append(size)
        return torch.zeros(1, dtype=torch.uint8).expand(size)  # takes no memory

    host = HostMemory(workers, pinned=False)
    monkeypatch.setattr(torch, "empty", lambda size, **options: empty(size, **options) if size else torch.zeros(0))
    rows = [host.take(size, torch.int8) for _ in range(workers)]
    assert [len(row) for row in rows] == workers * [size]
    assert all(block & (block - 1) == 0 for block in blocks)
    assert sum(blocks) == bytes_taken(size, workers)
    most = {1: 2, 3: 1.5, 32: 1.13}[workers]  # found by trying all sizes
    assert workers * size <= sum(blocks) <= most * workers * max(size, 128)
    for _ in range(workers):
        host.take(size, torch.int8)  # momenta, say
    assert sum(blocks) <= 2 * bytes_taken(size, workers)


def test_rows_of_the_host_do_not_overlap_and_each_has_a_storage_of_its_own():
    host = HostMemory(3, pinned=False)
    rows = [host.take(5, dtype) for _ in range(5) for dtype in (torch.float32, torch.float64, torch.bfloat16)]
    for place, row in enumerate(rows):
        row.fill_(place)
    assert all(row.tolist() == 5 * [place] for place, row in enumerate(rows))
    assert all(row.untyped_storage().nbytes() == row.nbytes for row in rows)
    assert host.take(0, torch.float32).numel() == 0


def test_what_the_host_has_left_is_what_linux_says_and_not_more_than_a_container_may_take(tmp_path):
    assert 0 < free_bytes() < 2**50
    assert free_bytes(tmp_path / "nothing", tmp_path) > 0  # what sysconf says
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemFree: 10 kB\nMemAvailable: 1000 kB\n")
    assert free_bytes(meminfo, tmp_path) == 1024_000
    for name, text in (("max", "max\n"), ("current", "500000\n"), ("stat", "anon 1\ninactive_file 100000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_bytes(meminfo, tmp_path) == 1024_000
    (tmp_path / "memory.max").write_text("600000\n")
    assert free_bytes(meminfo, tmp_path) == 200_000
