"""Workers that are killed at random moments: nothing hangs, no checkpoint is lost, and the end is the same."""

import random
import time
from itertools import chain, repeat

import pytest
import torch

from tests.faults import digits
from tests.harness import run_trainers

STEPS = 300
KILLS = 20
LIMIT = 60.0
"""Seconds that a life may last; it takes a few."""


class Killer:
    """Kills one worker, or all of them at once, at a random moment of a life."""

    def __init__(self, folder, dice, duration):
        self.folder, self.dice, self.duration = folder, dice, duration
        self.struck = False

    def __call__(self, processes):
        before = len(digits.diary(self.folder, "start"))
        everybody = self.dice.random() < 0.3
        if everybody and self.dice.random() < 0.5:  # anywhere, also while they start
            time.sleep(self.dice.uniform(0, 2))
        else:
            while len(digits.diary(self.folder, "start")) == before and all(p.is_alive() for p in processes):
                time.sleep(0.01)
            time.sleep(self.dice.uniform(0, self.duration))
        if all(process.is_alive() for process in processes):
            self.struck = True
            for process in processes if everybody else [self.dice.choice(processes)]:
                process.kill()


def check_resume(folder, start):
    """A life began exactly where the newest checkpoint was, with the slow momentum that is in it."""
    step, momentum = start
    life = digits.diary(folder, "start")[-1]
    assert life["step"] == step
    assert life["momentum"] == momentum
    return life


def newest(folder):
    """Step of the newest checkpoint, and the norm of the slow momentum in it; both 0 if there is none."""
    steps = digits.steps_saved(folder)
    if not steps:
        return 0, [0.0]
    note = torch.load(folder / f"step={steps[-1]}.ckpt", weights_only=True)["lightning_slowmo"]
    shared = torch.load(folder / f"step={steps[-1]}.ckpt.slowmo" / note["name"] / "shared.pt", weights_only=True)
    pieces = shared["shared"]["units"][0]["slow"]["momentum"]
    return steps[-1], [float(torch.cat([piece.flatten() for piece in pieces]).norm())]


def live_and_be_killed(folder, sizes, dice, duration):
    """Start workers again and again until a life is not cut short; return how many were, and the end."""
    kills, size_before = 0, None
    for size in sizes:
        start, lives = newest(folder), len(digits.diary(folder, "start"))
        killer = Killer(folder, dice, duration)
        outcomes = run_trainers(
            size, digits.train, size, str(folder), STEPS, limit=LIMIT, expect_failure=True, meanwhile=killer
        )  # raises if a survivor does not end by itself
        if len(digits.diary(folder, "start")) > lives:
            life = check_resume(folder, start)
            assert life["size"] == size
            assert bool(life["momentum"][0]) == (life["step"] > 0)
        assert newest(folder)[0] >= start[0]
        kills += killer.struck
        if digits.diary(folder, "end"):
            return kills, digits.diary(folder, "end")[-1]
        assert killer.struck, outcomes
        for text in outcomes:
            assert isinstance(text, list) or text.startswith(("died with exit code -9", "SyncError")), text
        complaints = [said for said in outcomes if isinstance(said, list) and said]
        assert not complaints or size != size_before
        size_before = size
    raise AssertionError("unreachable: sizes are endless")


@pytest.mark.faults
@pytest.mark.processes
def test_twenty_random_kills_lose_nothing_and_end_in_the_same_model(tmp_path):
    seed = random.randrange(2**32)
    print("seed:", seed)
    dice = random.Random(seed)

    def fresh(name):
        (tmp_path / name).mkdir()
        return tmp_path / name

    quiet = fresh("quiet")
    run_trainers(2, digits.train, 2, str(quiet), STEPS, limit=LIMIT)
    start, end = digits.diary(quiet, "start")[0], digits.diary(quiet, "end")[0]
    duration = end["time"] - start["time"]
    assert end["loss"] < 0.5

    kills, episode = 0, 0
    began = time.monotonic()
    while kills < KILLS:
        assert time.monotonic() - began < 400
        shrinking = episode == 0
        sizes = chain([3], repeat(2)) if shrinking else chain([2, 2, 2], repeat(1)) if episode == 1 else repeat(2)
        more, ended = live_and_be_killed(fresh(f"episode {episode}"), sizes, dice, duration / 2)
        lives = digits.diary(tmp_path / f"episode {episode}", "start")
        print(f"episode {episode}: {more} kills; started at", [(life["step"], life["size"]) for life in lives])
        assert ended["step"] == STEPS
        if {life["size"] for life in lives} == {2}:
            assert ended["weights"] == end["weights"]  # bit by bit: as if nobody had been killed
        assert abs(ended["loss"] - end["loss"]) < 0.1
        kills, episode = kills + more, episode + 1
    print(f"{kills} kills in {time.monotonic() - began:.0f} s")
