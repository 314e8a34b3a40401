"""Slow state that is brought to a device in pieces: the logic of it, with a CPU in the place of the GPU."""

import pytest
import torch

from lightning_slowmo.averaging.offload import Lift


@pytest.mark.parametrize("numel", [0, 1, 7, 8, 20])
def test_every_piece_is_changed_once_and_goes_back(numel):
    first, second = torch.arange(numel, dtype=torch.float64), torch.ones(numel, dtype=torch.float64)
    lift, places = Lift(torch.device("cpu"), piece_bytes=64), []

    def change(start: int, stop: int, pieces: list[torch.Tensor]) -> None:
        places.append((start, stop))
        pieces[0].add_(1)
        pieces[1].mul_(pieces[0])

    lift.begin()
    lift.change([first, second], change)
    lift.settle()
    assert torch.equal(first, torch.arange(1, numel + 1, dtype=torch.float64))
    assert torch.equal(second, first)
    assert places == [(start, min(start + 8, numel)) for start in range(0, numel, 8)]


def test_two_pieces_are_on_the_device_at_a_time_and_their_memory_is_used_again():
    seen = []
    lift = Lift(torch.device("cpu"), piece_bytes=16)
    for _ in range(2):
        tensor = torch.zeros(12)
        lift.change([tensor], lambda start, stop, pieces: seen.append(pieces[0].data_ptr()))
    assert len(seen) == 6
    assert seen[0] != seen[1]
    assert seen == [seen[0], seen[1]] * 3
