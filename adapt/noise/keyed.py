"""Randomness keyed by integers: the same example, epoch and view draw the same noise on any number of ranks."""

from __future__ import annotations

import numpy as np
import torch


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator keyed by integers (seed, example, epoch, view): the same key gives the same noise everywhere."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64: neighbouring keys give unrelated seeds
        state = (state + part + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return torch.Generator().manual_seed(state & 0x7FFFFFFFFFFFFFFF)


def uniform_for(seed: int, example: np.ndarray, epoch: int) -> np.ndarray:
    """Numbers in [0, 1) keyed by (seed, example, epoch), the shape of `example`, float64."""
    state = example.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    state = state + np.uint64((seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # splitmix64; arrays wrap silently
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
