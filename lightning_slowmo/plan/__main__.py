"""``python -m lightning_slowmo.plan``: see :mod:`lightning_slowmo.plan`."""

from lightning_slowmo.plan.command import run

if __name__ == "__main__":
    run()
