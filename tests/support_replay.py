"""Texts for replays, written down by how much of a draft is accepted at each token."""

from __future__ import annotations

import random


def text(rng: random.Random, rate: float) -> str:
    """128 tokens, of which each drafted one is accepted so often."""
    length, found = 128, []
    for place in range(length):
        count = next((i for i in range(8) if rng.random() >= rate), 8)
        found.append(str(min(count, length - place)))
    return "".join(found)
