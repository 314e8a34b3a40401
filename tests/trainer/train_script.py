"""What a user would run: ``python -m tests.trainer.train_script STRATEGY FOLDER``; each rank writes its model there.

The process that was started writes the model, and the report of the syncs, once more after the fit.
"""

import json
import sys
from pathlib import Path

import torch

from tests.trainer.models import Regression, data, numbers, trainer


class Written(Regression):
    """Writes its model where it was trained: spawned processes take it with them when they end."""

    def on_fit_end(self):
        Path(self.folder, f"{self.global_rank}.json").write_text(json.dumps(numbers(self)))


def main(strategy: str, folder: str) -> None:
    torch.set_num_threads(1)
    module = Written()
    module.folder = folder
    fitting = trainer(2, strategy, use_distributed_sampler=True)
    fitting.fit(module, data(0, examples=104))
    if fitting.is_global_zero:
        report = fitting.strategy.report
        assert report is not None
        assert report.seconds > 0
        Path(folder, "afterwards.json").write_text(json.dumps(numbers(module)))
        Path(folder, "report.json").write_text(json.dumps(vars(report) | {"seconds": 0}))


if __name__ == "__main__":
    main(*sys.argv[1:])
