"""The text recipe: tokens, batches, and the same small GPT whole and in shards."""

import math

import pytest
import torch

from recipes.record import Record
from recipes.text.data import Pieces
from recipes.text.tokens import BytePairs, Characters
from tests.recipes.small_runs import run_all

TEXT = "the cat sat on the mat, the bat thought thrice — naïve\n" * 3


def test_characters_come_back():
    tokens = Characters(TEXT, 64)
    assert tokens.decode(tokens.encode(TEXT)) == TEXT
    assert int(tokens.encode(TEXT).max()) < len(set(TEXT))
    with pytest.raises(ValueError, match="different characters, more than vocabulary=5"):
        Characters(TEXT, 5)


def test_byte_pairs_merge_the_most_frequent_pair_first_and_come_back():
    tokens = BytePairs(TEXT, 262)
    assert list(tokens.merges.values()) == [256, 257, 258, 259, 260, 261]
    assert next(iter(tokens.merges)) == (ord("t"), ord("h"))  # of the, thought, thrice
    for text in (TEXT, "another text: ß"):
        assert tokens.decode(tokens.encode(text)) == text
    assert len(tokens.encode(TEXT)) < len(TEXT.encode())
    assert len(BytePairs("aa", 1000).merges) == 1  # there are no more pairs
    with pytest.raises(ValueError, match="at least 256 for byte_pair, got 100"):
        BytePairs(TEXT, 100)


def test_pieces_overlap_by_the_token_that_is_to_be_told():
    pieces = Pieces(torch.arange(10), 3)
    assert len(pieces) == 3
    assert pieces[[0, 2]].tolist() == [[0, 1, 2, 3], [6, 7, 8, 9]]


@pytest.mark.processes
def test_the_gpt_trains_whole_and_in_shards(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} times {number} is {number**2}.\n" for number in range(2000)))
    short = ["trainer.devices=2", "trainer.max_epochs=2", "trainer.limit_train_batches=12", "data.batch_size=8"]
    short += [f"data.path={text}", "model.layers=1", "model.width=32", "schedule.warmup_epochs=0"]
    shards = ["experiment=text/slowmo_fsdp", "strategy.workers=1", "strategy.algorithm.sync_every=1"]
    runs = {
        tmp_path / "ddp": ["experiment=text/ddp", *short],
        # One worker whose outer step takes all of each inner one is FSDP2 alone, which does what DDP does.
        tmp_path / "shards": [*shards, "strategy.algorithm.slow_momentum=0", *short],
        tmp_path / "pairs": [*shards, "data.tokens=byte_pair", "data.vocabulary=300", *short],
    }
    run_all(runs)
    ddp, sharded, pairs = (Record.read(folder) for folder in runs)
    assert (ddp.workers, sharded.workers) == (2, 1)
    assert ddp.steps == sharded.steps == 24
    assert ddp.parameters == sharded.parameters
    assert sharded.value == pytest.approx(ddp.value, rel=1e-3)
    assert ddp.value < math.log(256) - 1
    assert pairs.value < math.log(300)
