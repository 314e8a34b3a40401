"""Random modules through the Trainer: each fit ends with equal models, or with one error that names the cause on all.

Hypothesis draws the cases in the parent, always the same ones; the workers play all of them in the same processes.
"""

import re
import warnings
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from lightning import LightningModule
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader, TensorDataset

from lightning_slowmo import SlowMoStrategy
from lightning_slowmo.presets import PRESETS
from tests.harness import run_trainers
from tests.trainer.models import TAKE_ADAM, trainer

WORDS, WIDTH = 10, 4
COUNT = {2: 30, 3: 12}
"""Cases, by number of workers."""

KEPT = ("float32", "float16", "complex64", "int16", "bool", "float8_e5m2")
"""Dtypes of buffers."""


@dataclass(frozen=True)
class Buffer:
    """A buffer of the drawn module, and what becomes of its shape: ``"fixed"``, ``"grows"`` by one with every step,
    ``"by rank"`` from the start, or ``"late"``: appears in validation, with a shape by rank."""

    shape: str
    persistent: bool
    dtype: str


@dataclass(frozen=True)
class Case:
    """A module, its optimizers, and how it is trained."""

    algorithm: str
    dtype: str
    optimizer: str
    sparse: bool
    complex: bool
    tied: bool
    frozen: bool
    lazy: bool
    batch_norm: bool
    pruned: str
    buffers: tuple[Buffer, ...]
    accumulate: int
    batches: tuple[int, int, int]

    def causes(self, size: int) -> list[str]:
        """Patterns of the errors of which one must come; none if training must end with equal models."""
        if self.lazy:
            return [r"ValueError: .*middle\.\w+ in LazyLinear \(middle\) has no shape yet"]
        wants = dict.fromkeys(TAKE_ADAM, ("adam", "Adam or AdamW")) | {
            "sketched_sgd": ("sgd", "SGD"),
            "sensed_sgd": ("sgd", "SGD"),
        }
        optimizer, named = wants.get(self.algorithm, (self.optimizer, ""))
        shapes = {b.shape for b in self.buffers if b.persistent}
        uneven = len(set(self.batches[:size])) > 1
        if "by rank" in shapes:
            return [r"SyncError: The model differs between workers: .* as buffer\d in Drawn"]
        if self.optimizer != optimizer:
            return [f"ValueError: .*needs torch.optim.{named}"]
        if "late" in shapes or ("grows" in shapes and uneven):
            return [r"SyncError: The model differs between workers: .* as buffer\d in Drawn"]
        return []

    def may_fail(self) -> list[str]:
        """Patterns of errors that may come, as it depends on the numbers."""
        return ["SyncError: The mask middle.weight_mask differs between workers"] if self.pruned == "locally" else []


def cases() -> st.SearchStrategy[Case]:
    """Modules that torch itself can train."""
    buffer = st.builds(
        Buffer,
        st.sampled_from(["fixed", "fixed", "fixed", "grows", "by rank", "late"]),
        st.sampled_from([False, False, True]),
        st.sampled_from(KEPT),
    )
    rarely = st.sampled_from([True] + 9 * [False])
    drawn = st.builds(
        Case,
        algorithm=st.sampled_from(sorted(PRESETS)),
        dtype=st.sampled_from(["float32", "float32", "float64", "bfloat16"]),
        optimizer=st.sampled_from(["sgd", "sgd", "momentum", "adam", "two"]),
        sparse=st.booleans(),
        complex=st.booleans(),
        tied=st.booleans(),
        frozen=st.booleans(),
        lazy=rarely,
        batch_norm=st.booleans(),
        pruned=st.sampled_from(["never", "never", "locally", "together"]),
        buffers=st.lists(buffer, max_size=2).map(tuple),
        accumulate=st.sampled_from([1, 2]),
        batches=st.tuples(*[st.integers(2, 5)] * 3) | st.just((4, 4, 4)),
    )
    # Adam takes no sparse gradients, and sparse ones of bfloat16 are not for every optimizer.
    return drawn.filter(lambda case: not case.sparse or (case.optimizer != "adam" and case.dtype != "bfloat16"))


@cache
def drawn(size: int) -> list[Case]:
    found: list[Case] = []

    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=COUNT[size],
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def collect(case):
        found.append(case)

    collect()
    return found


class Drawn(LightningModule):
    """The module of a case, on one rank."""

    def __init__(self, case: Case, rank: int) -> None:
        super().__init__()
        self.case, self.rank = case, rank
        self.automatic_optimization = case.optimizer != "two"
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.words = nn.Embedding(WORDS, WIDTH, sparse=case.sparse)
            self.middle = nn.LazyLinear(WIDTH) if case.lazy else nn.Linear(WIDTH, WIDTH)
            self.norm = nn.BatchNorm1d(WIDTH) if case.batch_norm else nn.Identity()
            self.last, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1)
        if case.tied and not case.lazy:
            self.last.weight = self.middle.weight
        self.head.bias.requires_grad_(not case.frozen)
        self.to(getattr(torch, case.dtype))
        if case.complex:
            phases = torch.polar(torch.ones(WIDTH), torch.arange(WIDTH) / WIDTH)
            self.turn = nn.Parameter(phases.to(torch.complex128 if case.dtype == "float64" else torch.complex64))
        for index, buffer in enumerate(case.buffers):
            if buffer.shape != "late":
                self._put(index, 1 + rank * (buffer.shape == "by rank"))

    def _put(self, index: int, length: int) -> None:
        buffer = self.case.buffers[index]
        self.register_buffer(f"buffer{index}", torch.ones(length).to(getattr(torch, buffer.dtype)), buffer.persistent)

    def loss(self, batch):
        words, targets = batch
        hidden = self.words(words)
        if self.case.complex:
            hidden = (hidden * self.turn).real.to(hidden.dtype)
        output = self.head(torch.tanh(self.last(self.norm(self.middle(hidden)))))
        return (output - targets.to(output.dtype)).square().mean()

    def training_step(self, batch, batch_idx):
        for index, buffer in enumerate(self.case.buffers):
            if buffer.shape == "grows":
                self._put(index, getattr(self, f"buffer{index}").numel() + 1)
        loss = self.loss(batch)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return None

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.loss(batch), on_epoch=True, sync_dist=True)
        for index, buffer in enumerate(self.case.buffers):
            if buffer.shape == "late" and not hasattr(self, f"buffer{index}"):
                self._put(index, 1 + self.rank)

    def on_train_epoch_end(self):
        if self.case.pruned == "locally":
            prune.l1_unstructured(self.middle, "weight", 0.5)
        elif self.case.pruned == "together":
            with self.trainer.strategy.consensus():
                prune.l1_unstructured(self.middle, "weight", 0.5)

    def configure_optimizers(self):
        kind = self.case.optimizer
        if kind == "two":
            words = list(self.words.parameters())
            rest = [p for p in self.parameters() if p.requires_grad and all(p is not word for word in words)]
            sparse = torch.optim.SparseAdam if self.case.sparse else torch.optim.SGD
            return sparse(words, lr=0.05), torch.optim.Adam(rest, lr=0.05)
        trained = [p for p in self.parameters() if p.requires_grad]
        if kind == "adam":
            return torch.optim.Adam(trained, lr=0.05)
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9 if kind == "momentum" else 0)


def loader(seed: int, batches: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (4 * batches,), generator=generator)
    return DataLoader(TensorDataset(words, torch.randn(4 * batches, 1, generator=generator)), batch_size=4)


def play(rank: int, size: int, case: Case) -> str:
    """Train; how it ended on this rank: an error, or a fingerprint of everything that belongs to the consensus."""
    module = Drawn(case, rank)
    accumulate = case.accumulate if module.automatic_optimization else 1
    fitting = trainer(size, SlowMoStrategy(case.algorithm), accumulate_grad_batches=accumulate)
    try:
        fitting.fit(module, loader(rank, case.batches[rank]), loader(9, 1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finite = all(parameter.isfinite().all() for parameter in module.parameters())
    raw = [tensor.contiguous().reshape(-1).view(torch.uint8).tolist() for tensor in module.state_dict().values()]
    return f"finite {finite}, {raw}"


def play_all(rank: int, size: int, found: list[Case]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [play(rank, size, case) for case in found]


def verdict(case: Case, endings: tuple[str, ...]) -> str | None:
    """What is wrong with how a case ended, by rank; None if it ended as it should."""
    must, may = case.causes(len(endings)), case.may_fail()
    if not any(re.match(r"\w+(Error|Exception|Interrupt): ", ending) for ending in endings):
        if must:
            return f"ended without an error, and not with {must}"
        return None if len(set(endings)) == 1 and endings[0].startswith("finite True") else "models are not equal"
    expected = must or may
    wrong = [ending for ending in endings if not any(re.match(pattern, ending, re.DOTALL) for pattern in expected)]
    return f"expected {expected or 'equal models'}: {wrong}" if wrong else None


@pytest.mark.processes
@pytest.mark.parametrize("size", COUNT)
def test_every_fit_ends_with_equal_models_or_with_one_error_on_all_ranks(size):
    found = drawn(size)
    endings = zip(*run_trainers(size, play_all, size, found), strict=True)
    verdicts = [(case, verdict(case, ending)) for case, ending in zip(found, endings, strict=True)]
    wrong = [f"{case}\n    {text}" for case, text in verdicts if text is not None]
    assert not wrong, "\n".join(wrong)


def test_what_is_drawn_has_both_endings_and_all_kinds():
    found = drawn(2)
    assert len(found) == COUNT[2]
    assert 0.15 < sum(bool(case.causes(2)) for case in found) / len(found) < 0.7
    for name in ("sparse", "complex", "tied", "frozen", "batch_norm"):
        assert {getattr(case, name) for case in found} == {True, False}
    assert {case.dtype for case in found} >= {"float32", "float64", "bfloat16"}
    assert {case.optimizer for case in found} == {"sgd", "momentum", "adam", "two"}


def test_other_endings_would_be_seen():
    case = next(case for case in drawn(2) if not case.causes(2) and not case.may_fail())
    assert verdict(case, ("finite True, [[1]]", "finite True, [[1]]")) is None
    assert verdict(case, ("finite True, [[1]]", "finite True, [[2]]")) == "models are not equal"
    gloo = "RuntimeError: [enforce fail at gloo/transport/tcp/pair.cc:1] op.preamble.length <= op.nbytes. 20 vs 16"
    assert "gloo" in str(verdict(case, (gloo, gloo)))
    failing = next(case for case in drawn(2) if case.causes(2))
    assert "not with" in str(verdict(failing, ("finite True, [[1]]", "finite True, [[1]]")))
    assert verdict(failing, (gloo, gloo)) is not None
