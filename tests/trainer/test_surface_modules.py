"""What a LightningModule may consist of: every tensor in it ends equal on all ranks, or untouched."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.utils.checkpoint import checkpoint

from lightning_slowmo import DiLoCo, LocalSGD, SlowMo, SlowMoStrategy
from tests.harness import run_trainers
from tests.trainer.models import FEATURES, Regression, data, distance, trainer


def values(module):
    return {name: tensor.detach().double().flatten().tolist() for name, tensor in module.state_dict().items()}


class Watched(Regression):
    """Keeps what is validated, and what each rank has after each step."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.trained, self.validated = [], []

    def on_train_batch_end(self, *_):
        self.trained.append(values(self))

    def on_validation_epoch_end(self):
        self.validated.append(values(self))


class Frozen(Watched):
    """The first layer is frozen, though the optimizer holds it; another module is not used at all."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)
        self.idle = torch.nn.Parameter(torch.linspace(0.1, 1, 999), requires_grad=False)
        self.unused = torch.nn.Linear(40, 40)
        torch.nn.init.eye_(self.unused.weight)
        torch.nn.init.constant_(self.unused.bias, 0.3)

    @classmethod
    def start(cls):
        return values(cls())


class Tied(Watched):
    """An autoencoder whose decoder is its encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(FEATURES, FEATURES), torch.nn.Linear(FEATURES, FEATURES)
        torch.nn.init.eye_(self.encoder.weight)
        self.decoder.weight = self.encoder.weight

    def loss(self, batch):
        return torch.nn.functional.mse_loss(self.decoder(self.encoder(batch[0]).tanh()), batch[0])


class Teacher(Watched):
    """A teacher that follows the student, a queue of features that no optimizer sees, and a buffer with a count."""

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.queue = torch.nn.Parameter(torch.zeros(8), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def training_step(self, batch, batch_idx):
        self.seen += len(batch[0])
        self.queue.data.copy_(batch[0].flatten()[:8])
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *arguments):
        with torch.no_grad():
            for own, other in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                own.lerp_(other, 0.3)
        super().on_train_batch_end(*arguments)


class Checkpointed(Watched):
    """Computes its activations again in the backward pass."""

    def loss(self, batch):
        hidden = checkpoint(self.net[:2], batch[0].requires_grad_(), use_reentrant=False)
        return torch.nn.functional.mse_loss(self.net[2](hidden), batch[1])


class Staged(Watched):
    """A backbone that BackboneFinetuning unfreezes at the second of three epochs."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[0], self.net[1:]

    def configure_optimizers(self):
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.SGD(trained, lr=0.05)


def fit(rank, size, module, algorithm=None, **arguments):
    """Train, validate in the middle of a period; return the results of this rank."""
    compiled = arguments.pop("compiled", False)
    arguments = {"val_check_interval": 5, "max_epochs": 3} | arguments
    fitting = trainer(size, SlowMoStrategy(algorithm or SlowMo(sync_every=3)), **arguments)
    fitting.fit(torch.compile(module, backend="eager") if compiled else module, data(rank), data(9))
    return {
        "trained": [module.trained[step - 1] for step in (*VALIDATED_AT, 24)],
        "seen": [*module.validated, values(module)],
        "syncs": fitting.strategy.report.count,
    }


VALIDATED_AT = (5, 13, 21)

MODULES = {
    "frozen": Frozen,
    "tied": Tied,
    "teacher": Teacher,
    "BatchNorm": lambda: Watched(batch_norm=True),
    "plain": Watched,
    "gradient checkpointing": Checkpointed,
}


def fit_all(rank, size):
    results = {}
    for name, kind in MODULES.items():
        results[name] = fit(rank, size, kind())
    results["compiled"] = fit(rank, size, Watched(), compiled=True)
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.05, verbose=False)
    for name, algorithm in (("slowmo", None), ("diloco", DiLoCo(sync_every=3))):
        results[f"finetuning, {name}"] = fit(rank, size, Staged(), algorithm, callbacks=copy.deepcopy(finetuning))
    return results


@pytest.fixture(scope="module")
def fitted():
    return run_trainers(3, fit_all, 3)  # three: a mean of three equal float32 values need not be that value


def moved(first, other):
    """Names of the tensors that two ranks have trained to different values."""
    return {name for name, value in first.items() if value != other[name]}


@pytest.mark.processes
@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("plain", {"net.0.weight", "net.2.bias"}),
        ("frozen", {"net.2.weight", "net.2.bias"}),
        ("tied", {"encoder.weight", "decoder.weight", "decoder.bias"}),
        ("teacher", {"net.0.weight", "teacher.0.weight", "queue"}),
        ("BatchNorm", {"net.0.weight", "net.1.weight", "net.1.running_mean", "net.1.running_var"}),
        ("gradient checkpointing", {"net.0.weight", "net.2.weight"}),
        ("compiled", {"net.0.weight", "net.2.weight"}),
        ("finetuning, slowmo", {"head.2.weight"}),
        ("finetuning, diloco", {"head.2.weight"}),
    ],
)
def test_ranks_train_to_different_values_and_validate_and_end_with_their_mean(fitted, name, local):
    ranks = [results[name] for results in fitted]
    for index, step in enumerate((*VALIDATED_AT, "end")):
        own = [rank["trained"][index] for rank in ranks]
        seen = ranks[0]["seen"][index]
        assert all(rank["seen"][index] == seen for rank in ranks), step
        if index < 2:  # later ones are right after a sync
            assert local <= moved(own[0], own[1]), step
        for key, value in seen.items():
            if not key.endswith(("seen", "num_batches_tracked")):
                mean = torch.tensor([rank[key] for rank in own]).mean(0)
                torch.testing.assert_close(torch.tensor(value), mean, rtol=0, atol=1e-6, msg=f"{key} at {step}")
    assert ranks[0]["syncs"] == 8


@pytest.mark.processes
@pytest.mark.parametrize("name", ["finetuning, slowmo", "finetuning, diloco"])
def test_parameters_that_join_later_are_trained_and_synced_from_then_on(fitted, name):
    first, second, _ = (results[name] for results in fitted)
    start = values(Staged())["backbone.weight"]
    before, after, synced, _ = (seen["backbone.weight"] for seen in first["trained"])
    assert before == start
    assert after != start
    assert after != second["trained"][1]["backbone.weight"]
    assert synced == second["trained"][2]["backbone.weight"]  # step 21 ends in a sync


@pytest.mark.processes
def test_compilation_and_gradient_checkpointing_do_not_change_what_is_trained(fitted):
    for results in fitted:
        for name in ("compiled", "gradient checkpointing"):
            difference = distance(*([seen["net.0.weight"] for seen in results[n]["seen"]] for n in ("plain", name)))
            assert difference < 1e-6, name


@pytest.mark.processes
def test_frozen_parameters_keep_their_bits_and_unused_ones_their_values(fitted):
    for results in fitted:
        start, end = Frozen.start(), results["frozen"]["seen"][-1]
        for name in ("net.0.weight", "net.0.bias", "idle"):
            assert end[name] == start[name], name
        for name in ("unused.weight", "unused.bias"):  # the optimizer holds them, so they are averaged like all others
            torch.testing.assert_close(torch.tensor(end[name]), torch.tensor(start[name]), rtol=1e-6, atol=0)


# SyncBatchNorm --------------------------------------------------------------------------------------------------------


class Untrained(Regression):
    steps = 0

    def training_step(self, batch, batch_idx):
        self.steps += 1
        return super().training_step(batch, batch_idx)


class Looking(SlowMoStrategy):
    """Looks at the layer once it is converted. DDP would refuse it: SyncBatchNorm computes on GPUs alone."""

    def configure_ddp(self):
        layer = self.lightning_module.net[1]
        self.found = type(layer).__name__, torch.distributed.get_process_group_ranks(layer.process_group)


def convert_batch_norm(rank):
    module = Untrained(batch_norm=True)
    with pytest.raises(ValueError, match=r"sync_batchnorm=True.*workers_per_node='all'"):
        trainer(4, "slowmo", sync_batchnorm=True).fit(module, data(rank))
    strategy = Looking(LocalSGD(), workers_per_node=2)
    trainer(4, strategy, sync_batchnorm=True, max_steps=0).fit(module, data(rank))
    return module.steps, *strategy.found, isinstance(module.net[1], torch.nn.SyncBatchNorm)


@pytest.mark.processes
def test_sync_batchnorm_is_refused_between_workers_and_shared_inside_nodes():
    results = run_trainers(4, convert_batch_norm)
    for rank, found in enumerate(results):
        assert found == (0, "SyncBatchNorm", [0, 1] if rank < 2 else [2, 3], False)  # and back afterwards
