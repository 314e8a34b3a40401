"""Loaded once by the fork server, so that worker processes start quickly."""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import lightning  # noqa: F401
import torch

import lightning_slowmo  # noqa: F401

torch.set_num_threads(1)
