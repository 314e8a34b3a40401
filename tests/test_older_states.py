"""States that version 0.1 saved in the middle of a run: today's code goes on from them to the last bit.

``data/states_of_0_1.json.gz`` holds, for two gloo workers and many configurations, the state after 10 of 24 steps and
parameters afterwards. It is replayed here on two workers in this process. Random quantizers draw other noise since
version 0.2 (from a counter, so that GPUs and CPUs draw the same), so with them runs are equal up to the next message.
"""

import gzip
import json
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_slowmo
from lightning_slowmo import compression
from lightning_slowmo.communication.in_process import in_process, together
from tests.algorithms.training import CHANGING, MOMENTUM, PLAIN, Training

OPTIMIZERS = {"plain": PLAIN, "momentum": MOMENTUM, "adam": partial(torch.optim.Adam, betas=(0.9, 0.98))}
NAMES = {name: getattr(lightning_slowmo, name) for name in lightning_slowmo.__all__} | vars(compression)
SAVED_AT, SEEN = 10, (0, 3, -1)
"""Steps before the state was saved, and after it, those whose parameters are known."""


DRAWS_OTHER_NOISE = ("slowmo_compressed", "slowmo_qprsgd", "qprsgd", "qprsgd_gossip")


@cache
def saved():
    with gzip.open(Path(__file__).parent / "data" / "states_of_0_1.json.gz") as file:
        return json.load(file)


def plain(value):
    """What the file says, as the objects that a checkpoint holds."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "dict" in value:
        return {plain(key): plain(item) for key, item in value["dict"]}
    if "float" in value:
        return float.fromhex(value["float"])
    dtype = getattr(torch, value["dtype"])
    numbers = [float.fromhex(v) if isinstance(v, str) else v for v in value["values"]]
    return torch.tensor(numbers, dtype=dtype).view(value["shape"])


def algorithm(text):
    return eval(text, {"torch": torch}, NAMES)  # a configuration, written down by this project's own script


@pytest.mark.parametrize("case", saved())
def test_training_goes_on_bit_exactly_from_a_state_of_the_first_version(case):
    record = saved()[case]

    def go_on(workers):
        training = Training(workers, algorithm(record["algorithm"]), CHANGING, OPTIMIZERS[record["optimizer"]])
        shared, local, inner = plain(record["workers"][workers.rank]["state"])
        training.optimizer.load_state_dict(inner)
        training.engine.load_shared_state(shared)
        training.engine.load_local_state(local)
        training.steps = SAVED_AT
        return training.trajectory()

    seen = SEEN[:1] if case in DRAWS_OTHER_NOISE else SEEN
    for rank, rows in enumerate(together(in_process(2), go_on)):
        for step, expected in zip(seen, record["workers"][rank]["after"], strict=False):
            np.testing.assert_array_equal(rows[step], plain(expected).numpy(), f"worker {rank}, step {step}")
