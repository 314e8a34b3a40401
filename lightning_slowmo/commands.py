"""The package's commands: ``slowmo-train``, ``slowmo-report``, ``slowmo-plan`` and ``slowmo-reproduce``.

All but ``slowmo-plan`` run a module of the recipes. Where the package was installed from a wheel, the recipes and their
configuration lie inside it, where they take no name from anybody; in a checkout, they lie beside it.
"""

from __future__ import annotations

import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent


def recipes_folder() -> Path:
    """The folder that holds ``recipes`` and ``conf``."""
    bundled = HERE / "bundled"
    return bundled if bundled.is_dir() else HERE.parent


def train() -> None:
    """``slowmo-train``: see ``recipes/train.py``."""
    _run("recipes.train", needs=("hydra", "torchvision", "sklearn"))


def report() -> None:
    """``slowmo-report``: see ``recipes/report``."""
    _run("recipes.report", needs=("matplotlib",))


def reproduce() -> None:
    """``slowmo-reproduce``: see ``recipes/reproduce``."""
    _run("recipes.reproduce", needs=("hydra", "torchvision", "sklearn", "matplotlib"))


def plan() -> None:
    """``slowmo-plan``: see :mod:`lightning_slowmo.plan`."""
    from lightning_slowmo.plan.command import run

    run()


def _run(module: str, needs: tuple[str, ...]) -> None:
    """Run a module of the recipes as ``python -m`` does; processes that it starts find the recipes, too.

    Args:
        module: its name.
        needs: packages that it imports, of the extra ``recipes``.

    Raises:
        SystemExit: if one of them is missing; says how to install it.
    """
    missing = [name for name in needs if find_spec(name) is None]
    if missing:
        command = Path(sys.argv[0]).name
        sys.exit(f"{command} needs {', '.join(missing)}, of the recipes: pip install 'lightning-slowmo[recipes]'")
    folder = str(recipes_folder())
    sys.path.insert(0, folder)
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, *others])
    runpy.run_module(module, run_name="__main__", alter_sys=True)
