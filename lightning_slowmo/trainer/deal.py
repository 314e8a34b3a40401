"""One loader for many workers: of the next batches, each worker gets one."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from lightning_slowmo.private import simulated as loops
from lightning_slowmo.trainer.simulated_state import SimulatedState


class Deal:
    """A loader that yields the first worker's batches, and keeps those of the others until they are asked for.

    Of the next ``workers`` batches of the loader, worker i gets the i-th. What is left at the end is dropped.

    Args:
        loader: what the user's data module made; all else is asked of it.
        workers: number of workers.

    Example:
        >>> deal = Deal([1, 2, 3, 4, 5], workers=2)
        >>> len(deal), [(first, deal.others()) for first in deal]
        (2, [(1, [2]), (3, [4])])
    """

    def __init__(self, loader: Any, workers: int) -> None:
        self._loader = loader
        self._workers = workers
        self._others: deque[list[Any]] = deque()  # several, where the Trainer fetches ahead

    def __iter__(self) -> Iterator[Any]:
        self._others.clear()
        batches = iter(self._loader)
        while len(dealt := list(islice(batches, self._workers))) == self._workers:
            first, *others = dealt
            self._others.append(others)
            yield first

    def __len__(self) -> int:
        return len(self._loader) // self._workers

    def others(self) -> list[Any]:
        """The batches of the other workers, by rank, that go with the first one's next."""
        return self._others.popleft()

    @property
    def worker_init_fn(self) -> Any:
        """The loader's, which Lightning may set."""
        return self._loader.worker_init_fn

    @worker_init_fn.setter
    def worker_init_fn(self, function: Any) -> None:
        self._loader.worker_init_fn = function

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self._loader, name)


class DealingMixin(SimulatedState):
    """The part of :class:`~lightning_slowmo.trainer.simulated.SimulatedMixin` that deals batches to the workers."""

    _deals: list[Deal]
    _dealing: bool

    def process_dataloader(self, dataloader: Any) -> Any:
        """Deal out the batches of training loaders to the workers."""
        dataloader = super().process_dataloader(dataloader)
        if not self._dealing:
            return dataloader
        self._deals.append(Deal(dataloader, len(self.cores)))
        return self._deals[-1]

    def _deal_out(self, setup_data: Callable[[], None]) -> None:
        """Make the training loaders, each of which serves all workers."""
        present, self._deals, self._dealing = self._deals, [], True
        try:
            setup_data()
        finally:
            self._dealing = False
            self._deals = self._deals or present
        if not self._deals:
            return
        if loops.uses_iterator(self._trainer):
            raise ValueError(
                "training_step takes dataloader_iter, but simulated workers are dealt batches. Let it take a batch."
            )
        mode = loops.combination(self._trainer)
        if len(self._deals) > 1 and mode not in ("min_size", "max_size_cycle"):
            raise ValueError(
                f"The training loaders are combined by {mode!r}, but simulated workers can be dealt batches of several "
                "loaders only where each step takes one of each: by 'min_size' or 'max_size_cycle'."
            )

    def _batches_of_others(self) -> list[Any]:
        """The present batch of every worker but the first, by rank."""
        dealt = [deal.others() for deal in self._deals]
        return [loops.combine(self._trainer, batches) for batches in zip(*dealt, strict=True)]
