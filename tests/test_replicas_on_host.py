"""Workers whose values lie in the host's memory while they are not on the stage, on a card that is made believe."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_slowmo.replicas import Stage
from lightning_slowmo.replicas.crossing import Crossing, Landing
from lightning_slowmo.replicas.host import HostMemory
from lightning_slowmo.replicas.rows import Rows
from lightning_slowmo.replicas.states import Slots, found
from tests.trainer.models import numbers

CPU, CARD = torch.device("cpu"), torch.device("meta")


class FakeCard(TorchDispatchMode):
    """Lets tensors without values be a card's: what is copied from there are zeros. Notes copies between both."""

    def __init__(self):
        super().__init__()
        self.down, self.up = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            (self.up if args[0].device == CARD else self.down).append(args[0].numel())
            return args[0] if args[0].device == CARD else args[0].zero_()
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") not in (None, args[0].device):
            (self.down if args[0].device == CARD else self.up).append(args[0].numel())
            return torch.zeros_like(args[0], device=kwargs["device"])
        return function(*args, **kwargs)


def network(width=4):
    module = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width))
    module[0].register_buffer("nothing", None)
    return module


def devices(tensors):
    return {tensor.device for tensor in tensors}


@pytest.mark.parametrize("width", [4, 3], ids=["aligned", "unaligned"])
def test_nothing_of_a_worker_stays_on_the_card_and_what_lies_in_rows_crosses_in_one_piece(width):
    with FakeCard() as card:
        module = network(width).to(CARD)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        stage = Stage(module, [optimizer], 3, on_host=True)
        for _turn in range(3):
            for index in range(3):
                card.down.clear()
                card.up.clear()
                stage.put(index)
                up = sorted(card.up)
                optimizer.zero_grad()
                module(torch.zeros(2, width, device=CARD)).sum().backward()
                optimizer.step()
                stage.clear(drop_gradients=True)
    numel = sum(parameter.numel() for parameter in module.parameters())
    assert up == sorted(card.down) == sorted([numel, numel, 2 * width, 1])  # with momentum and buffers, by dtype
    tensors = [*module.parameters(), *module.buffers(), *found(optimizer.state).values()]
    assert devices(tensors) == {CARD}
    assert len(tensors) == 2 * 6 + 3
    for replica in stage.replicas:
        tensors = [
            *replica.module.parameters(),
            *replica.module.buffers(),
            *found(replica.optimizers[0].state).values(),
        ]
        assert devices(tensors) == {CPU}
        assert len(tensors) == 2 * 6 + 3


def test_counters_of_steps_are_on_the_cpu_on_both_sides_and_gradients_cross_with_their_worker():
    with FakeCard() as card:
        module = network().to(CARD)
        optimizer = torch.optim.Adam(module.parameters())
        stage = Stage(module, [optimizer], 2, on_host=True)
        for index in (0, 1, 0, 1, 0):
            stage.put(index)
            optimizer.zero_grad()
            module(torch.zeros(2, 4, device=CARD)).sum().backward()
            optimizer.step()
            assert devices(parameter.grad for parameter in module.parameters()) == {CARD}
            assert devices(state["step"] for state in optimizer.state.values()) == {CPU}
            assert devices(state["exp_avg"] for state in optimizer.state.values()) == {CARD}
        card.down.clear()
        stage.clear()
    sizes = [parameter.numel() for parameter in module.parameters()]
    assert sorted(card.down) == sorted([sum(sizes), 2 * sum(sizes), 8, 1, *sizes])  # moments, buffers, gradients
    steps = [[state["step"].item() for state in each.optimizers[0].state.values()] for each in stage.replicas]
    assert steps == [6 * [3.0], 6 * [2.0]]
    for replica in stage.replicas:
        assert devices(found(replica.optimizers[0].state).values()) == {CPU}
        assert devices(parameter.grad for parameter in replica.parameters) == {CPU}


@pytest.mark.parametrize(
    ("options", "place"), [({}, CPU), ({"capturable": True}, CARD), ({"fused": True}, CARD)], ids=str
)
def test_states_that_a_checkpoint_brings_go_where_torch_puts_them(options, place):
    parameter = nn.Parameter(torch.zeros(3, device=CARD))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.param_groups[0].update(options)
    slots = Slots(optimizer, [parameter])
    path = id(parameter)
    states = {(path, "step"): torch.tensor(4.0), (path, "exp_avg"): torch.zeros(3), ("all", 0): torch.zeros(2)}
    assert [tensor.device for tensor in slots.of(states)] == [place, CARD, CARD]
    slots.note({(path, "step"): torch.zeros((), device=CARD), (path, "exp_avg"): torch.zeros(3)})
    assert [tensor.device for tensor in slots.of(states)] == [CARD, CPU, CARD]


OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    "amsgrad": partial(torch.optim.Adam, lr=0.1, amsgrad=True),
    "has a state from the start": partial(torch.optim.Adagrad, lr=0.1),
    "lists that grow": partial(torch.optim.LBFGS, lr=0.1, max_iter=3, history_size=4),
    "rprop": torch.optim.Rprop,
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
    "sparse gradients": lambda parameters: torch.optim.SparseAdam([next(parameters)], lr=0.1),
}


def ends(make, sparse, **place):
    """What three workers have after a few steps, in which the states of two are changed from outside."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Embedding(5, 3, sparse=sparse), nn.Linear(3, 2))
    optimizer = make(module.parameters())
    stage = Stage(module, [optimizer], 3, **place)

    def objective(index, step):
        optimizer.zero_grad()
        loss = (module(torch.tensor([index, (index * step) % 5, step % 5])) - index).square().mean()
        loss.backward()
        return loss

    for step in range(6):
        for index in range(3):
            stage.put(index)
            optimizer.step(partial(objective, index, step))
            stage.clear()  # and gradients are kept
        if step == 3:
            first, second, third = (replica.optimizers[0] for replica in stage.replicas)
            for own in first.state.values():  # as algorithms do at a sync
                own.pop("momentum_buffer", None)
            second.load_state_dict(deepcopy(third.state_dict()))
    for index in range(3):
        stage.put(index)
        states = [value.tolist() for value in found(optimizer.state).values()]
        gradients = [p.grad.to_dense().tolist() if p.grad is not None else None for p in module.parameters()]
        yield numbers(module), states, gradients


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_where_workers_lie_on_the_device(name):
    make, sparse = OPTIMIZERS[name], name == "sparse gradients"
    assert list(ends(make, sparse, on_host=True)) == list(ends(make, sparse, static=False))


class Views(torch.optim.SGD):
    """Keeps a view of each parameter, or one tensor under two names, in its state."""

    def __init__(self, parameters, of_parameter):
        super().__init__(parameters, lr=0.1)
        self.of_parameter = of_parameter

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            values = parameter.data if self.of_parameter else torch.zeros_like(parameter)
            self.state[parameter] |= {"one": values[:], "other": values[:0] if self.of_parameter else values[:]}


@pytest.mark.parametrize("of_parameter", [True, False])
def test_states_that_share_memory_are_refused(of_parameter):
    module = nn.Linear(2, 1)
    optimizer = Views(module.parameters(), of_parameter)
    stage = Stage(module, [optimizer], 2, on_host=True)
    stage.put(0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="Views has an entry 'one' in its state that shares memory"):
        stage.clear()


def test_one_tensor_in_several_states_stays_one():
    module = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    stage = Stage(module, [optimizer], 2, on_host=True)
    for index in (0, 1, 1):
        stage.put(index)
        counter = optimizer.state[module.weight].get("count", torch.zeros(()))
        for parameter in module.parameters():
            optimizer.state[parameter]["count"] = counter
        counter += 1
        stage.clear()
    counts = [[state["count"] for state in replica.optimizers[0].state.values()] for replica in stage.replicas]
    assert [float(count) for count, _ in counts] == [1, 2]
    assert all(one is other for one, other in counts)


def test_rows_cross_in_pieces_that_lie_together_on_both_sides():
    stage = [torch.arange(6.0).view(2, 3).t(), torch.ones(4), torch.ones(2, dtype=torch.int64), torch.full((5,), 7.0)]
    host = HostMemory(1, pinned=False)
    rows, own = Rows(stage), Rows(stage, host)
    alone = torch.zeros(4)
    for tensor in own.tensors:
        tensor.zero_()
    crossing = Crossing(rows.tensors, own.tensors)
    assert len(crossing._pieces) == 2  # the integers between do not keep the others apart
    crossing.forth()
    assert all(map(torch.equal, own.tensors, stage))
    apart = Crossing(rows.tensors[:2], [own.tensors[0], alone])
    assert len(apart._pieces) == 2
    apart.forth()
    assert torch.equal(alone, stage[1])
    scattered = [tensor.clone() for tensor in stage]
    gathered = Crossing(scattered, own.tensors, Landing())
    for tensor in own.tensors:
        tensor.add_(1)
    gathered.back()
    assert all(torch.equal(tensor, before + 1) for tensor, before in zip(scattered, stage, strict=True))
