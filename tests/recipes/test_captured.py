"""A captured step, where a recorder of torch's operations stands in for CUDA's graphs: it replays them in place."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_slowmo import LocalSGD, SimulatedStrategy
from recipes.images import Digits, ImageClassifier, captured
from recipes.images.captured import CapturedObjective
from recipes.schedules import constant


class Recorder(TorchDispatchMode):
    """Like a CUDA graph: replays operations on the memory that they had, and capturing them changes nothing."""

    def __init__(self):
        super().__init__()
        self.operations, self.before = [], []

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, values in reversed(self.before):
            if not torch.equal(tensor, values):
                tensor.data.copy_(values)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.before += [(each, each.clone()) for each in tree_leaves(arguments) if isinstance(each, torch.Tensor)]
        results = function(*arguments, **(options or {}))
        self.operations.append((function, arguments, options or {}, results))
        return results

    def replay(self):
        with torch.no_grad():
            for function, arguments, options, results in self.operations:
                again = function(*arguments, **options)
                for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Let capture work on a CPU, and count how often it is made."""
    graphs = []

    def graph():
        graphs.append(Recorder())
        return graphs[-1]

    stream = SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(captured, "DEVICE", "cpu")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    return graphs


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))


def fit(capture, strategy, tmp_path, **options):
    module = ImageClassifier(
        network(), partial(torch.optim.SGD, lr=0.1, momentum=0.9), constant, capture=capture, label_smoothing=0.1
    )
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "limit_train_batches": 12} | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        default_root_dir=tmp_path,
        precision="32-true",
        **options,
        **off,
    )
    trainer.fit(module, datamodule=Digits(16, held_out=300))
    return {name: value.clone() for name, value in module.state_dict().items()}, trainer.callback_metrics["val/loss"]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}],
    ids=["plain", "accumulated and clipped"],
)
def test_a_replayed_step_trains_as_one_that_is_not(recorded, workers, options, tmp_path):
    def strategy():
        if workers == 1:
            return "auto"
        simulated = SimulatedStrategy(LocalSGD(3), workers)
        simulated._static = True  # addresses are kept, as on a GPU
        return simulated

    values, loss = fit(False, strategy(), tmp_path, **options)
    others, other_loss = fit(True, strategy(), tmp_path, **options)
    assert len(recorded) == 1
    for name, value in values.items():
        torch.testing.assert_close(others[name], value, rtol=0, atol=1e-6)
    assert float(other_loss) == pytest.approx(float(loss), abs=1e-5)


def test_a_capture_is_made_anew_for_other_shapes_and_places_and_for_what_is_frozen(recorded):
    module = network()
    objective = CapturedObjective(lambda images, labels: nn.functional.cross_entropy(module(images), labels), module)

    def gradients(count):
        images, labels = torch.randn(count, 1, 8, 8), torch.randint(10, (count,))
        mine = []
        for replayed in (True, False):
            module.zero_grad()
            statistics = module[2].running_mean.clone()
            if replayed:
                objective(images, labels)
                objective.backward(share=0.5)
            else:
                (0.5 * nn.functional.cross_entropy(module(images), labels)).backward()
            mine.append([parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None])
            assert not torch.equal(module[2].running_mean, statistics)
        torch.testing.assert_close(*mine)

    for made, count in ((1, 4), (1, 4), (2, 6)):
        gradients(count)
        assert len(recorded) == made
    module[1].weight.data = module[1].weight.data.clone()
    gradients(6)
    assert len(recorded) == 3
    module[1].requires_grad_(False)
    gradients(6)
    assert len(recorded) == 4


def test_warming_up_leaves_buffers_as_they_are(recorded):
    module = network()
    objective = CapturedObjective(lambda images, labels: nn.functional.cross_entropy(module(images), labels), module)
    objective(torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    assert module[2].num_batches_tracked.item() == 1


def test_gradients_that_are_still_wanted_are_kept_when_the_next_are_computed(recorded):
    module = network()
    objective = CapturedObjective(lambda images, labels: nn.functional.cross_entropy(module(images), labels), module)
    batches = [(torch.randn(4, 1, 8, 8), torch.randint(10, (4,))) for _ in range(2)]
    objective(*batches[0])
    objective.backward()
    first = [parameter.grad.clone() for parameter in module.parameters()]
    objective(*batches[1])
    assert all(torch.equal(p.grad, value) for p, value in zip(module.parameters(), first, strict=True))
    objective.backward()
    both = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    for batch in batches:
        nn.functional.cross_entropy(module(batch[0]), batch[1]).backward()
    torch.testing.assert_close([parameter.grad for parameter in module.parameters()], both)


def test_gradients_lie_as_their_parameters_do(recorded):
    module = nn.Linear(4, 6, bias=False)
    module.weight = nn.Parameter(torch.randn(4, 6).t())

    def plain(images, labels):
        return nn.functional.cross_entropy((images[:, :, None] * module.weight).sum(1), labels)

    objective, batch = CapturedObjective(plain, module), (torch.randn(5, 6), torch.randint(4, (5,)))
    expected = torch.autograd.grad(plain(*batch), module.weight)[0]
    assert expected.stride() != module.weight.stride()
    for _ in range(2):
        module.zero_grad()
        objective(*batch)
        objective.backward()
        assert module.weight.grad.stride() == module.weight.stride()
        torch.testing.assert_close(module.weight.grad, expected)
