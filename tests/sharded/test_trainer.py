"""Workers of shards through the real Trainer, all scenarios in the same four processes."""

import warnings
from datetime import timedelta
from functools import cache
from math import prod

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader, IterableDataset

from lightning_slowmo import QSDP, Engine, SlowMo, SlowMoModelParallelStrategy
from lightning_slowmo.communication.in_process import in_process, together
from tests.harness import run_trainers
from tests.sharded.modules import BATCHES, MetaInitialised, Sharded, loader, numbers
from tests.sharded.networks import Network, batch
from tests.trainer.models import L, all_finite, distance, trainer

ALGORITHM = SlowMo(sync_every=3)
CLIP = 0.5


class Streamed(IterableDataset):
    """Batches whose number nobody knows."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Start(Callback):
    """Keeps this process's pieces of the slow momentum as a fit finds them."""

    def __init__(self):
        self.momentum = []

    def on_train_start(self, trainer, module):
        [unit] = trainer.strategy.engine.shared_state()["units"]
        for leaf in unit["slow"]["momentum"]:
            self.momentum.append(([(place, piece.clone()) for place, piece in leaf.pieces], leaf.shape))


FITS = {
    "slowmo": {"save": "slowmo"},
    "resumed": {"resume": "slowmo/step=8.ckpt"},
    "one worker": {"sizes": (1, 4, 1), "resume": "slowmo/step=8.ckpt"},
    "tensor parallel": {"sizes": (2, 1, 2)},
    "poisoned": {"poison": True, "on_nonfinite": "skip"},
    "quantized": {"qsdp": QSDP(), "save": "quantized"},
    "quantized resumed": {"qsdp": QSDP(), "resume": "quantized/step=8.ckpt"},
    "bf16": {"precision": "bf16-true"},
    "without length": {"streamed": True, "batches": (8, 8, 5, 5)},
    "half": {"sizes": (1, 2, 1), "resume": "slowmo/step=8.ckpt"},
    "four workers": {"sizes": (4, 1, 1), "resume": "slowmo/step=8.ckpt"},
    "stock": {"sizes": (1, 4, 1), "strategy": "stock", "resume": "slowmo/step=8.ckpt"},
    "adam": {"adam": True, "save": "adam", "whole": True},
    "adam resumed": {"adam": True, "resume": "adam/step=8.ckpt", "whole": True},
    "adam of tensor parallel workers": {"sizes": (2, 1, 2), "adam": True, "resume": "adam/step=8.ckpt", "whole": True},
    "ddp": {"sizes": (4, 1, 1), "strategy": "ddp", "adam": True, "resume": "adam/step=8.ckpt", "save": "ddp"},
    "after ddp": {"adam": True, "resume": "ddp/step=16.ckpt", "max_epochs": 3},
    "meta": {"module": MetaInitialised, "qsdp": QSDP()},
    "fewer batches for a worker": {"batches": (8, 8, 5, 5)},
    "uneven": {"batches": (8, 8, 8, 7)},
}
QUICK = ("slowmo", "resumed", "one worker", "tensor parallel", "poisoned", "quantized", "quantized resumed", "uneven")
SLOW = tuple(name for name in FITS if name not in (*QUICK[2:], "half"))


def scenarios(rank, folder, names):
    found = {}

    def fit(
        name,
        sizes=(2, 2, 1),
        strategy="ours",
        module=Sharded,
        adam=False,
        poison=False,
        resume=None,
        save=None,
        whole=False,
        max_epochs=2,
        batches=(BATCHES,) * 4,
        precision=None,
        streamed=False,
        **options,
    ):
        ours = strategy == "ours"
        if ours:
            options |= {"save_distributed_checkpoint": not whole, "sync_timeout": timedelta(seconds=60)}
            strategy = SlowMoModelParallelStrategy(ALGORITHM, *sizes, **options)
        elif strategy == "stock":
            strategy = ModelParallelStrategy(4, 1)
        module = module(adam=adam)
        module.poison_at = 4 if poison and rank == 2 else None
        worker, place = divmod(rank, sizes[1] * sizes[2])
        start = Start()
        saving = [ModelCheckpoint(f"{folder}/{save}", "{step}", save_top_k=-1, every_n_train_steps=8)] if save else []
        fitting = trainer(
            prod(sizes),
            strategy,
            callbacks=[*saving, *([start] if ours else [])],
            enable_checkpointing=bool(save),
            gradient_clip_val=CLIP,
            max_epochs=max_epochs,
            precision=precision,
        )
        data = loader(worker, place // sizes[2], sizes[1], batches[rank])
        if streamed:
            data = DataLoader(Streamed(data.dataset), batch_size=None)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitting.fit(module, data, loader(9), ckpt_path=f"{folder}/{resume}" if resume else None)
        found[name] = {
            "start": module.started,
            "end": numbers(module),
            "validated": module.validated,
            "syncs": strategy.report.count if ours else 0,
            "momentum": start.momentum,
            "warnings": [str(warning.message) for warning in caught],
            "sampler": fitting.strategy.distributed_sampler_kwargs,
            "dtypes": {parameter.dtype for parameter in module.parameters()},
        }
        if ours and strategy.quantized:
            found[name]["quantized"] = strategy.quantized.traffic.sent, strategy.quantized.state_dict()

    for name in names:
        if name == "uneven":  # the last, after which nobody communicates
            with pytest.raises(Exception, match="different numbers of training batches") as raised:
                fit(name, **FITS[name])
            found[name] = str(raised.value)
        else:
            fit(name, **FITS[name])
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    return folder, run_trainers(4, scenarios, str(folder), QUICK, limit=900)


@pytest.fixture(scope="module")
def trained_more(tmp_path_factory):
    folder = tmp_path_factory.mktemp("more")
    return folder, run_trainers(4, scenarios, str(folder), SLOW, limit=900)


@cache
def on_whole_models():
    """What two workers with whole models and the whole batches do, in plain loops."""

    def one(workers):
        network = Network()
        trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
        engine = Engine(ALGORITHM, [optimizer], workers, module=network)
        losses, norms = [], []
        for step in range(2 * BATCHES):
            network.teach()
            optimizer.zero_grad()
            network.loss(batch(workers.rank, step % BATCHES)).backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP)))
            optimizer.step()
            engine.after_step()
            schedule.step()
            if step % BATCHES == BATCHES - 1:
                with engine.consensus(), torch.no_grad():
                    losses += [float(network.loss(batch(9, step))) for step in range(BATCHES)]
        engine.finish()
        assert max(norms) > CLIP
        return losses, numbers(network), engine.total.count

    return together(in_process(2, timedelta(seconds=20)), one)[0]


pytestmark = pytest.mark.processes


def test_two_workers_of_two_shards_do_what_two_whole_models_do(trained):
    losses, end, syncs = on_whole_models()
    for name in ("slowmo", "tensor parallel"):
        for results in trained[1]:
            found = results[name]
            assert found["syncs"] == syncs
            assert max(abs(a - b) for a, b in zip(found["validated"], losses, strict=True)) < 1e-12
            assert distance(found["end"], end) < 1e-12
        assert distance(end, numbers(Network())) > 1e-2


def test_every_data_parallel_process_has_data_of_its_own(trained):
    for name, size in (("slowmo", 4), ("one worker", 4), ("tensor parallel", 2)):
        places = [results[name]["sampler"] for results in trained[1]]
        assert [place["num_replicas"] for place in places] == [size] * 4
        assert [place["rank"] for place in places] == [rank * size // 4 for rank in range(4)]


def test_a_resume_in_the_middle_of_a_period_is_bit_exact(trained):
    for results in trained[1]:
        assert results["resumed"]["end"] == results["slowmo"]["end"]
        assert not [text for text in results["resumed"]["warnings"] if "left behind" in text]


@pytest.mark.faults
def test_a_resume_from_one_file_is_bit_exact(trained_more):
    for results in trained_more[1]:
        assert results["adam resumed"]["end"] == results["adam"]["end"]
        assert not [text for text in results["adam resumed"]["warnings"] if "left behind" in text]


def assembled(ranks, name):
    """The slow momentum that the processes together hold at the start of a fit."""
    whole = [torch.full(shape, float("nan"), dtype=torch.float64).flatten() for _, shape in ranks[0][name]["momentum"]]
    for results in ranks:
        for (pieces, _), flat in zip(results[name]["momentum"], whole, strict=True):
            for start, piece in pieces:
                flat[start : start + piece.numel()] = piece
    return [flat.tolist() for flat in whole]


def check_other_numbers(ranks, name, crew):
    momentum = assembled(ranks, "resumed")
    assert all_finite(momentum)
    assert max(abs(value) for values in momentum for value in values) > 1e-3
    assert assembled(ranks, name) == momentum
    assert all(results[name]["start"] == ranks[0][name]["start"] for results in ranks)
    [text] = [text for text in ranks[0][name]["warnings"] if "left behind" in text]
    assert f"was saved by 2 workers of 2 x 1 shards and is continued by {crew}" in text


def test_other_numbers_of_workers_and_shards_keep_weights_and_slow_state_and_say_what_they_left(trained):
    check_other_numbers(trained[1], "one worker", "1 workers of 4 x 1 shards")


@pytest.mark.faults
def test_so_do_workers_of_one_shard_and_tensor_parallel_ones(trained_more):
    _, ranks = trained_more
    check_other_numbers(ranks, "four workers", "4 workers of 1 x 1 shards")
    assert ranks[0]["four workers"]["start"] == ranks[0]["stock"]["start"]
    name = "adam of tensor parallel workers"
    assert assembled(ranks, name) == assembled(ranks, "adam resumed")
    assert ranks[0][name]["start"] == ranks[0]["ddp"]["start"]


@pytest.mark.faults
def test_lightning_s_own_strategy_opens_the_folder(trained_more):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder, ranks = trained_more
    dcp_to_torch_save(folder / "slowmo/step=8.ckpt", folder / "whole.pt")
    state = torch.load(folder / "whole.pt", weights_only=False)["state_dict"]
    weights = [tensor.flatten().tolist() for tensor in state.values()]
    for results in ranks:
        assert results["stock"]["start"] == weights
        assert distance(results["stock"]["end"], weights) > 1e-3
        assert results["stock"]["end"] == ranks[0]["stock"]["end"]


@pytest.mark.faults
def test_one_file_is_an_ordinary_checkpoint(trained_more):
    folder, ranks = trained_more
    module = Sharded.load_from_checkpoint(folder / "adam/step=8.ckpt", weights_only=True)
    assert numbers(module) == ranks[0]["ddp"]["start"]
    assert distance(ranks[0]["ddp"]["end"], numbers(module)) > 1e-3


@pytest.mark.faults
def test_a_ddp_checkpoint_starts_sharded_workers(trained_more):
    folder, ranks = trained_more
    path = folder / "ddp/step=16.ckpt"
    saved = [tensor.flatten().tolist() for tensor in torch.load(path, weights_only=True)["state_dict"].values()]
    for results in ranks:
        assert results["after ddp"]["start"] == saved
        assert results["after ddp"]["end"] == ranks[0]["after ddp"]["end"]
        assert all_finite(results["after ddp"]["end"])


@pytest.mark.faults
def test_models_that_begin_on_the_meta_device_start_equal(trained_more):
    for results in trained_more[1]:
        assert all_finite(results["meta"]["start"])
        assert results["meta"]["start"] == trained_more[1][0]["meta"]["start"]
        assert results["meta"]["end"] == trained_more[1][0]["meta"]["end"]
        assert distance(results["meta"]["end"], results["meta"]["start"]) > 1e-2


def test_nan_in_one_worker_is_skipped_by_all_of_its_processes(trained):
    for results in trained[1]:
        assert all_finite(results["poisoned"]["end"])
        assert results["poisoned"]["end"] == trained[1][0]["poisoned"]["end"]
    [text] = [text for text in trained[1][0]["poisoned"]["warnings"] if "NaN or infinite" in text]
    assert "rank 2, rank 3" in text


@pytest.mark.faults
@pytest.mark.parametrize("name", ["fewer batches for a worker", "without length"])
def test_workers_may_have_different_numbers_of_batches(trained_more, name):
    for results in trained_more[1]:
        assert results[name]["end"] == trained_more[1][0][name]["end"]
        assert results[name]["syncs"] == trained_more[1][0]["fewer batches for a worker"]["syncs"]


def test_quantized_messages_train_nearly_the_same_and_resume_bit_for_bit(trained):
    ranks = [results["quantized"] for results in trained[1]]
    for rank, found in enumerate(ranks):
        assert found["end"] == ranks[0]["end"]
        assert 1e-6 < distance(found["end"], trained[1][rank]["slowmo"]["end"]) < 0.1
        sent, state = found["quantized"]
        assert sent > 0
        assert state == {"weights": [2 * BATCHES] * 4, "gradients": [2 * BATCHES] * 4}  # of four modules
        resumed = trained[1][rank]["quantized resumed"]
        assert resumed["end"] == found["end"]
        assert resumed["validated"] == found["validated"][BATCHES:]
        assert resumed["quantized"][1] == state


@pytest.mark.faults
def test_models_of_sixteen_bits_train_nearly_the_same(trained_more):
    for results in trained_more[1]:
        found = results["bf16"]
        assert found["dtypes"] == {torch.bfloat16}
        assert found["end"] == trained_more[1][0]["bf16"]["end"]
        assert 0 < distance(found["end"], results["slowmo"]["end"]) < 0.1


@pytest.mark.faults
def test_half_as_many_processes_go_on(trained_more):
    folder, ranks = trained_more
    half = run_trainers(2, scenarios, str(folder), ("half",), limit=300)
    for results in half:
        assert results["half"]["start"] == ranks[0]["four workers"]["start"]
        assert results["half"]["end"] == half[0]["half"]["end"]
    assert assembled(half, "half") == assembled(ranks, "resumed")
    [text] = [text for text in half[0]["half"]["warnings"] if "left behind" in text]
    assert "was saved by 2 workers of 2 x 1 shards and is continued by 1 workers of 2 x 1 shards" in text


def test_processes_of_a_worker_may_not(trained):
    texts = [results["uneven"] for results in trained[1]]
    for text in texts:
        assert "The processes of one worker have different numbers of training batches" in text
        assert "rank 2 has 8, rank 3 has 7" in text


# Without processes ----------------------------------------------------------------------------------------------------


def test_presets_are_registered_by_name():
    own = SlowMoModelParallelStrategy(workers=1)
    assert L.Trainer(strategy=own, accelerator="cpu", devices=1, logger=False).strategy is own
    fitting = L.Trainer(strategy="slowmo_fsdp", accelerator="cpu", devices=1, logger=False)
    assert isinstance(fitting.strategy, SlowMoModelParallelStrategy)
    assert fitting.strategy.algorithm == SlowMo()
    for name in ("local_sgd_fsdp", "diloco_fsdp"):
        assert L.Trainer(strategy=name, accelerator="cpu", devices=1, logger=False).strategy.algorithm.kind
