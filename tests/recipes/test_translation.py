"""Translation through fairseq: real text files, real ``fairseq-preprocess``, and two real worker processes."""

from __future__ import annotations

import gzip
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.harness import run_trainers
from tests.recipes.small_runs import CONF, run_all

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("fairseq is not installed: pip install 'lightning-slowmo[translation]'", allow_module_level=True)

pytestmark = pytest.mark.processes

WORDS = {
    "dog": "Hund",
    "man": "Mann",
    "tree": "Baum",
    "ball": "Ball",
    "hat": "Hut",
    "boy": "Junge",
    "table": "Tisch",
    "bird": "Vogel",
    "red": "roter",
    "small": "kleiner",
    "old": "alter",
    "green": "grüner",
    "sees": "sieht",
    "likes": "mag",
    "has": "hat",
    "finds": "findet",
}
NOUNS, ADJECTIVES, VERBS = list(WORDS)[:8], list(WORDS)[8:12], list(WORDS)[12:]
SIZES = {"train": 241, "valid": 30, "test": 31}


def write_text(folder: Path) -> None:
    """Sentence pairs such as "A red dog sees a boy, not a hat." in the files of a raw corpus."""
    draw = random.Random(1)
    for split, size in SIZES.items():
        pairs = []
        for _ in range(size):
            words = [draw.choice(ADJECTIVES), draw.choice(NOUNS), draw.choice(VERBS), draw.choice(NOUNS)]
            source, target = "A {} {} {} a {}".format(*words), "Ein {} {} {} ein {}".format(*(WORDS[w] for w in words))
            for _ in range(draw.randrange(3)):
                noun = draw.choice(NOUNS)
                source, target = f"{source}, not a {noun}", f"{target}, nicht ein {WORDS[noun]}"
            pairs.append((source + ".", target + "."))
        for i, language in enumerate(("en", "de")):
            with gzip.open(folder / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.writelines(pair[i] + "\n" for pair in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """``raw`` text, and what the command ``fairseq-preprocess`` makes of it in ``binarized``."""
    folder = tmp_path_factory.mktemp("translation")
    (folder / "raw").mkdir()
    write_text(folder / "raw")
    for path in (folder / "raw").iterdir():
        words = gzip.decompress(path.read_bytes()).decode().replace(".", " .").replace(",", " ,")
        (folder / path.stem).write_text(words, encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "-m", "fairseq_cli.preprocess", "--source-lang", "en"]
    command += ["--target-lang", "de", "--joined-dictionary", "--destdir", str(folder / "binarized")]
    for split in SIZES:
        command += [f"--{split}pref", str(folder / split)]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return folder


# What two workers do, all of it in the same processes: importing fairseq takes them longest. --------------------------


def build(folder: str, strategy: Any, model: dict[str, Any] | None = None, **trainer: Any) -> tuple:
    """A model, data and a Trainer of two workers."""
    from functools import partial

    import lightning as L

    from recipes.schedules import inverse_sqrt
    from recipes.translation import RawText, Translation, TranslationData

    L.seed_everything(1, verbose=False)
    settings = {"encoder_embed_dim": 32, "encoder_ffn_embed_dim": 64, "dropout": 0.0, "share_all_embeddings": True}
    options: dict[str, Any] = {"settings": settings, "generation": {"beam": 4, "max_len_a": 1.2, "max_len_b": 5}}
    optimizer = partial(torch.optim.Adam, lr=0.01)
    network = Translation(
        "transformer_tiny", optimizer, partial(inverse_sqrt, warmup_steps=20), **options | (model or {})
    )
    text = RawText(merges=20, cache=f"{folder}/cache")
    data = TranslationData(f"{folder}/raw", text=text, max_tokens=100, test_max_tokens=150, batch_multiple=1)
    defaults = {"accelerator": "cpu", "devices": 2, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "max_epochs": 2}
    return network, data, L.Trainer(strategy=strategy, **(defaults | quiet | trainer))


def record(trainer: Any) -> dict[str, list]:
    """Let a Trainer remember the sentences it trains on and what it logs."""
    import lightning as L

    seen: dict[str, list] = {"ids": [], "logged": []}

    class Recorder(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen["ids"].append((trainer.current_epoch, batch["id"].tolist()))

        def on_validation_end(self, trainer, module):
            seen["logged"].append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer.callbacks.append(Recorder())
    return seen


def numbers(module: torch.nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def work(rank: int, folder: str) -> dict[str, Any]:
    import logging

    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_slowmo import SlowMo, SlowMoStrategy
    from recipes.translation import RawText, Translation

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    result: dict[str, Any] = {}
    text = RawText(merges=20, cache=f"{folder}/cache")
    result["cache"] = str(text.binarize(f"{folder}/raw", "en", "de"))  # both workers at the same time

    def slowmo() -> SlowMoStrategy:
        return SlowMoStrategy(SlowMo(sync_every=4, slow_momentum=0.2))

    network, data, trainer = build(folder, slowmo(), max_epochs=4)
    seen = record(trainer)
    trainer.fit(network, datamodule=data)
    result |= {"ids": seen["ids"], "logged": seen["logged"], "weights": numbers(network)}
    result["batches"] = len(data._iterator("train", 100).frozen_batches)
    result["valid"] = [batch["id"].tolist() if batch else [] for batch in data.val_dataloader()]
    result["tested"] = trainer.test(network, datamodule=data, verbose=False)[0]
    result["translations"] = network._translations
    result["references"] = data.references("test")

    # Saved in the middle of the third epoch, and resumed.
    stop = 2 * len(data.train_dataloader()) + 3
    network, data, trainer = build(folder, slowmo(), max_epochs=4, max_steps=stop + 1, enable_checkpointing=True)
    trainer.callbacks.append(ModelCheckpoint(folder, filename="middle", every_n_train_steps=stop))
    trainer.fit(network, datamodule=data)
    network, data, trainer = build(folder, slowmo(), max_epochs=4)
    seen = record(trainer)
    trainer.fit(network, datamodule=data, ckpt_path=f"{folder}/middle.ckpt")
    result |= {"resumed ids": seen["ids"], "stop": stop, "resumed weights": numbers(network)}

    # A whole checkpoint opens without data, and translates as the Trainer's module does.
    trainer.save_checkpoint(f"{folder}/last.ckpt")
    opened = Translation.load_from_checkpoint(f"{folder}/last.ckpt", optimizer=torch.optim.Adam).eval()
    data.setup("test")
    batch = next(iter(data.test_dataloader()))
    network.eval()
    result["opened"] = [
        a.tolist() == b.tolist() for a, b in zip(opened.translate(batch), network.translate(batch), strict=True)
    ]

    # Other dictionaries are refused.
    network, data, trainer = build(folder, slowmo())
    data.text = RawText(merges=10, cache=f"{folder}/other")
    try:
        trainer.fit(network, datamodule=data, ckpt_path=f"{folder}/last.ckpt")
    except ValueError as error:
        result["other dictionaries"] = str(error)

    # Beam search leaves nothing behind in the network that is trained on.
    network = opened.train()
    before = network.criterion(network.network, batch)[0].item()
    network.translate(batch, beam=4)
    result["loss around beam search"] = (before, network.criterion(network.network.train(), batch)[0].item())

    # Lightning's own ddp, and all-reduce of gradients here, are the same training.
    for strategy in ("ddp", "allreduce"):
        network, data, trainer = build(folder, strategy, {"val_beam": None}, max_epochs=1, limit_train_batches=10)
        seen = record(trainer)
        trainer.fit(network, datamodule=data)
        result[strategy] = numbers(network)
    result["without bleu"] = sorted(trainer.callback_metrics)
    return result


@pytest.fixture(scope="module")
def workers(folder) -> list[dict[str, Any]]:
    return run_trainers(2, work, str(folder), limit=240)


def epochs(ids: list) -> list[list[list[int]]]:
    """Batches by epoch."""
    return [[batch for epoch, batch in ids if epoch == which] for which in sorted({epoch for epoch, _ in ids})]


def test_raw_text_is_prepared_once_also_by_several_processes_at_a_time(workers, folder):
    cache = Path(workers[0]["cache"])
    assert workers[1]["cache"] == str(cache)
    assert list((folder / "cache").iterdir()) == [cache]
    assert {path.name for path in cache.iterdir()} >= {"dict.en.txt", "codes", "test.de", "train.en-de.de.bin"}
    assert "@@" in (cache / "dict.en.txt").read_text()  # fewer merges than words have letters


def test_training_batches_are_dealt_out_without_overlap_and_equally_many(workers):
    orders = []
    for mine, other in zip(epochs(workers[0]["ids"]), epochs(workers[1]["ids"]), strict=True):
        assert len(mine) == len(other) == workers[0]["batches"] // 2
        sentences = [i for batch in mine + other for i in batch]
        assert len(sentences) == len(set(sentences))
        assert len(sentences) > 0.9 * SIZES["train"]
        orders.append(sentences)
    assert len(orders) == 4
    assert all(orders[i] != orders[0] for i in (1, 2, 3))
    if workers[0]["batches"] % 2:  # what is left out changes
        assert set().union(*orders) > set(orders[0])


def test_validation_sees_every_sentence_once(workers):
    shards = [worker["valid"] for worker in workers]
    assert len(shards[0]) == len(shards[1])
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(SIZES["valid"]))


def test_perplexity_falls_and_all_workers_log_the_same(workers):
    first, last = workers[0]["logged"][0], workers[0]["logged"][-1]
    assert last["val/perplexity"] < 0.7 * first["val/perplexity"]
    assert last["val/perplexity"] == pytest.approx(2 ** last["val/nll"], rel=1e-5)
    assert last["val/loss"] > last["val/nll"]  # label smoothing
    names = ("val/perplexity", "val/nll", "val/loss", "val/bleu")
    assert [[logged[name] for name in names] for logged in workers[0]["logged"]] == [
        [logged[name] for name in names] for logged in workers[1]["logged"]
    ]
    assert workers[0]["weights"] == workers[1]["weights"]


def test_bleu_is_that_of_sacrebleu_for_all_test_sentences_against_the_raw_text(workers, folder):
    import sacrebleu

    translations = dict(workers[0]["translations"]) | dict(workers[1]["translations"])
    assert sorted(translations) == list(range(SIZES["test"]))
    assert workers[0]["translations"]
    assert workers[1]["translations"]
    raw = gzip.decompress((folder / "raw" / "test.de.gz").read_bytes()).decode().splitlines()
    assert workers[0]["references"] == raw
    hypotheses = [translations[i] for i in range(len(raw))]
    assert not any("@@" in hypothesis or " ." in hypothesis for hypothesis in hypotheses)
    direct = sacrebleu.corpus_bleu(hypotheses, [raw]).score
    assert direct > 5
    for worker in workers:
        assert worker["tested"]["test/bleu"] == pytest.approx(direct, abs=1e-4)
        assert worker["tested"]["test/loss"] > worker["tested"]["test/nll"] > 0


def test_resumed_training_goes_on_with_the_next_batch_to_the_same_weights(workers):
    for worker in workers:
        assert worker["resumed ids"] == worker["ids"][worker["stop"] :]
        assert worker["resumed weights"] == worker["weights"]


def test_a_checkpoint_has_its_dictionaries(workers):
    for worker in workers:
        assert worker["opened"]
        assert all(worker["opened"])
        assert "trained with other dictionaries than those in" in worker["other dictionaries"]


def test_translating_does_not_change_what_is_trained(workers):
    for worker in workers:
        before, after = worker["loss around beam search"]
        assert before == after


def test_lightnings_ddp_trains_it_as_allreduce_does(workers):
    ddp, allreduce = (torch.tensor(workers[0][name]) for name in ("ddp", "allreduce"))
    torch.testing.assert_close(ddp, allreduce, rtol=1e-4, atol=1e-5)
    assert workers[0]["without bleu"] == ["train/loss", "val/loss", "val/nll", "val/perplexity"]


# The experiments ------------------------------------------------------------------------------------------------------

EXPERIMENTS = sorted(
    f"{path.parent.name}/{path.stem}"
    for paper in ("multi30k", "wmt16")
    for path in (CONF / "experiment" / paper).glob("[!_]*.yaml")
)
SMALL = ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.num_nodes=1", "trainer.precision=32-true"]
SMALL += [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.limit_test_batches=1",
    "data.max_tokens=100",
]
SMALL += ["model.architecture=transformer_tiny", "+model.generation={beam:2,max_len_b:5}"]
OF_PAPER = {
    "multi30k": ["data.text.test=test", "data.text.merges=20", "model.settings.encoder_embed_dim=32"],
    "wmt16": ["data.num_workers=0"],  # the processes of the tests may not have children
}


def test_every_experiment_trains(folder, tmp_path):
    from recipes.record import Record

    assert len(EXPERIMENTS) >= 10
    runs = {}
    for experiment in EXPERIMENTS:
        paper = experiment.split("/")[0]
        overrides = [f"experiment={experiment}", *SMALL, *OF_PAPER[paper]]
        if paper == "multi30k":
            overrides += [f"data.root={folder}/raw", f"data.text.cache={folder}/cache"]
        else:
            overrides += [f"data.root={folder}/binarized"]
            if experiment != "wmt16/ar_adam":
                overrides += ["strategy.workers_per_node=null"]
        runs[tmp_path / experiment] = overrides
    run_all(runs)
    for experiment in EXPERIMENTS:
        made = Record.read(tmp_path / experiment)
        assert (made.experiment, made.steps, made.workers) == (experiment, 2, 2)
        assert made.metric in ("test/bleu", "val/nll")
        if experiment.startswith("wmt16"):
            assert made.paper is not None
            assert {"title", "arxiv", "table", "row", "value", "unit", "unstated"} <= set(made.paper) | {"unit"}


def test_long_sentences_are_left_out_and_counted(folder):
    import numpy as np

    from recipes.translation import TranslationData

    data = TranslationData(folder / "binarized", max_tokens=100, batch_multiple=1)
    data.setup("fit")
    dataset = data.task.dataset("train")
    lengths = np.maximum(dataset.src_sizes, dataset.tgt_sizes)
    data.max_length = limit = int(np.median(lengths))
    longer = int((lengths > limit).sum())
    assert 0 < longer < len(lengths)
    expected = f"{longer} of {len(lengths)} sentences of train have more than {limit} tokens and are left out"
    with pytest.warns(UserWarning, match=expected):
        batches = data.train_dataloader()
    kept = {index for batch in batches.iterator.frozen_batches for index in batch}
    assert kept == set(np.flatnonzero(lengths <= limit))


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do(folder, tmp_path):
    from recipes.translation import RawText, Translation, TranslationData

    with pytest.raises(FileNotFoundError, match=r"No train\.en\.gz, .*multi30k/dataset.*data\.root"):
        TranslationData(tmp_path, text=RawText()).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"No dict\.en\.txt, .*fairseq-preprocess --source-lang en"):
        TranslationData(tmp_path).prepare_data()
    with pytest.raises(ValueError, match="merges must be a whole number"):
        RawText(merges=0)
    with pytest.raises(ValueError, match=r"knows no architecture 'transformer_huge'.*transformer_tiny"):
        Translation("transformer_huge", torch.optim.Adam)
    with pytest.raises(ValueError, match=r"knows no encoder_layer among its settings. Did you mean .*encoder_layers"):
        Translation("transformer_tiny", torch.optim.Adam, settings={"encoder_layer": 2})
    with pytest.raises(ValueError, match=r"knows no beams among its generation. Did you mean beam"):
        Translation("transformer_tiny", torch.optim.Adam, generation={"beams": 2})
    data = TranslationData(folder / "binarized", max_tokens=1)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"Every sentence of train has more than 1 tokens. Raise data.max_length"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="max_length must be from 1 to max_tokens, which is 5, got 6"):
        TranslationData(folder / "binarized", max_tokens=5, max_length=6)
    (tmp_path / "uneven").mkdir()
    write_text(tmp_path / "uneven")
    with gzip.open(tmp_path / "uneven" / "valid.de.gz", "at") as file:
        file.write("Zu viel.\n")
    with pytest.raises(ValueError, match=r"valid.en.gz has 30 lines and .*valid.de.gz has 31"):
        RawText(merges=5, cache=str(tmp_path / "cache")).binarize(tmp_path / "uneven", "en", "de")
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]


def test_references_come_from_the_tokens_where_there_is_no_raw_text(folder):
    from recipes.translation import TranslationData

    data = TranslationData(folder / "binarized")
    data.setup("test")
    raw = gzip.decompress((folder / "raw" / "test.de.gz").read_bytes()).decode().splitlines()
    assert data.references("test") == raw


def test_importing_fairseq_leaves_hydra_and_logging_as_they_were():
    code = """
import logging, warnings
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
before = sorted(ConfigStore.instance().repo), logging.getLogger().handlers[:], logging.getLogger().level
import recipes.translation
assert before == (sorted(ConfigStore.instance().repo), logging.getLogger().handlers, logging.getLogger().level)
warnings.simplefilter("error")
with initialize_config_dir(CONF, version_base="1.3"):
    print(compose("train", ["optimizer=adam"]).optimizer._target_)
"""
    command = [sys.executable, "-c", code.replace("CONF", repr(str(CONF)))]
    path = {"PYTHONPATH": str(CONF.parent)}
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.optim.Adam\n"


def test_without_fairseq_there_is_one_clear_error(tmp_path):
    (tmp_path / "fairseq.py").write_text("raise ImportError('gone', name='fairseq')")
    command = [sys.executable, "-c", "import recipes.translation"]
    paths = os.pathsep.join([str(tmp_path), str(CONF.parent)])
    failed = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=120
    )
    assert failed.returncode == 1
    assert "'fairseq' cannot be imported. Install them with: pip install" in failed.stderr.splitlines()[-1]
