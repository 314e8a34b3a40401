"""``python -m lightning_slowmo.plan``: see :mod:`lightning_slowmo.plan`."""

import sys

from lightning_slowmo.plan.command import main

if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
