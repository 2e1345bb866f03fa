"""Tokens a round by group, of drafters whose acceptance is known."""

from __future__ import annotations

import pytest

from specdec.bench.acceptance import drafters, tokens_a_round
from specdec.bench.speed import Prompt
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.errors import SpecDecError
from tests.support_models import tiny_model

PROMPTS = [Prompt("short", (1, 2, 3)), Prompt("long", tuple(range(1, 12)))]


def test_a_draft_equal_to_the_target_gives_all_it_drafts_and_the_bonus_token() -> None:
    target = tiny_model()
    found = tokens_a_round(target, DraftModelDrafter(tiny_model()), PROMPTS, 3, 12)
    assert found == {"short": 4.0, "long": 4.0, "all": 4.0}


def test_a_group_counts_its_own_rounds() -> None:
    target = tiny_model()
    draft = tiny_model(seed=5)
    alone = {p.group: tokens_a_round(target, DraftModelDrafter(draft), [p], 3, 12)["all"] for p in PROMPTS}
    together = tokens_a_round(target, DraftModelDrafter(draft), PROMPTS, 3, 12)
    assert {name: together[name] for name in alone} == alone
    assert min(alone.values()) <= together["all"] <= max(alone.values())
    assert all(1.0 <= value < 4.0 for value in alone.values())


def test_a_drafter_without_a_name_is_refused() -> None:
    with pytest.raises(SpecDecError, match="NAME=PATH"):
        drafters(tiny_model(), ["runs/pard/final"])
