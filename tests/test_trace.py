"""A trace tells what happened and changes nothing."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from specdec.cli import app
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.prompt_lookup import PromptLookupDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import InvalidRequestError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.trace import TracedRound, trace
from specdec.types import Budget, Draft, Load, TokenTree
from tests.support_models import noised, prompts, tiny_model

NEW = 24
MODEL: Any = tiny_model()
DRAFT = noised(MODEL, 0.1)
IDS = torch.tensor(prompts((9,)))
DRAFTERS = {
    "none": lambda: None,
    "chain": lambda: DraftModelDrafter(DRAFT),
    "tree": lambda: DraftModelDrafter(DRAFT, shape="tree"),
    "several": lambda: {"lookup": PromptLookupDrafter(min_ngram=1), "model": DraftModelDrafter(DRAFT)},
}
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.2, "seed": 5},
}
TREES = FixedPlanner(nodes=6, depth=3, width=2)


class _Alternating(FixedPlanner):
    """Asks one drafter and then the other."""

    def plan(self, load: Load) -> Budget:
        return replace(super().plan(load), drafter=("lookup", "model")[load.lengths[0] % 2])


class _Dropping(FixedPlanner):
    """Keeps two drafted tokens of each draft."""

    def select(self, draft: Draft) -> Draft:
        tree = draft.tree
        sizes = tuple(min(n, 3) for n in tree.num_nodes)
        return replace(draft, tree=TokenTree(tree.tokens[:, :3], tree.parents[:, :3], sizes, tree.is_chain))


PLANNERS = {"several": _Alternating(nodes=3, depth=3)}


def _generate(generator: SpeculativeGenerator, **kwargs: Any) -> list[int]:
    tokens: list[int] = generator.generate(IDS, attention_mask=torch.ones_like(IDS), **kwargs)[0, IDS.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_text_is_that_of_a_run_without_a_trace(drafter: str, sampling: str) -> None:
    planner = PLANNERS.get(drafter, TREES)
    expected = _generate(
        SpeculativeGenerator(MODEL, DRAFTERS[drafter](), planner=planner), max_new_tokens=NEW, **SAMPLING[sampling]
    )
    found = trace(SpeculativeGenerator(MODEL, DRAFTERS[drafter](), planner=planner), IDS, max_new_tokens=NEW, **SAMPLING[sampling])
    assert list(found.tokens) == expected
    assert found.prompt == tuple(IDS[0].tolist())


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_rounds_make_up_the_text(drafter: str) -> None:
    planner = PLANNERS.get(drafter, TREES)
    found = trace(SpeculativeGenerator(MODEL, DRAFTERS[drafter](), planner=planner), IDS, max_new_tokens=NEW, do_sample=False)
    assert tuple(chain.from_iterable(one.added for one in found.rounds)) == found.tokens
    text = found.prompt
    for one in found.rounds:
        assert one.tokens[0] == text[-1]
        assert one.parents[0] == -1
        assert len(one.parents) == len(one.tokens)
        assert [one.tokens[node] for node in one.path] == list(one.added[: one.accepted])
        assert [one.parents[node] for node in one.path] == [0, *one.path][: one.accepted]
        text += one.added
    assert (found.accepted > 0) == (drafter != "none")


def test_what_the_rounds_say_is_what_the_stats_say() -> None:
    generator = SpeculativeGenerator(MODEL, DraftModelDrafter(DRAFT, shape="tree"), planner=TREES)
    found = trace(generator, IDS, max_new_tokens=NEW, do_sample=False)
    _generate(generator, max_new_tokens=NEW, do_sample=False)
    stats = generator.stats
    assert stats is not None
    assert [one.path for one in found.rounds] == [told.paths[0] for told in stats.history]
    assert [one.parents[1:] for one in found.rounds] == [told.parents[0] if told.parents else () for told in stats.history]
    assert (found.drafted, found.accepted) == (stats.drafted, stats.accepted)
    assert found.mean_acceptance_length == pytest.approx(stats.mean_acceptance_length)


def test_the_generator_is_left_as_it_was() -> None:
    generator = SpeculativeGenerator(MODEL, DraftModelDrafter(DRAFT))
    engine, planner, drafter = generator.engine, generator.engine.planner, generator.engine.drafter
    trace(generator, IDS, max_new_tokens=8, do_sample=False)
    assert generator.engine is engine
    assert engine.planner is planner
    assert engine.drafter is drafter
    assert generator.stats is None


def test_the_tree_is_the_one_that_was_scored() -> None:
    """A planner that drops drafted nodes: they are not in the trace."""
    generator = SpeculativeGenerator(MODEL, DraftModelDrafter(DRAFT), planner=_Dropping(nodes=4, depth=4))
    found = trace(generator, IDS, max_new_tokens=NEW, do_sample=False)
    assert max(one.drafted for one in found.rounds) == 2
    assert found.accepted > 0
    assert list(found.tokens) == _generate(SpeculativeGenerator(MODEL), max_new_tokens=NEW, do_sample=False)


def test_each_round_names_its_drafter_and_forecast() -> None:
    found = trace(
        SpeculativeGenerator(MODEL, DRAFTERS["several"](), planner=PLANNERS["several"]), IDS, max_new_tokens=NEW, do_sample=False
    )
    assert found.drafters == ("lookup", "model")
    assert {one.drafter for one in found.rounds} == {"lookup", "model"}
    assert all(one.forecast is None for one in found.rounds)
    planned = trace(SpeculativeGenerator(MODEL, SuffixDrafter()), IDS, max_new_tokens=NEW, do_sample=False)
    assert planned.drafters == ("suffix",)
    assert {one.drafter for one in planned.rounds} == {"suffix"}
    assert all(one.forecast is not None for one in planned.rounds)


def test_a_text_that_ends_inside_a_draft() -> None:
    generator = SpeculativeGenerator(MODEL, DraftModelDrafter(MODEL), planner=FixedPlanner(nodes=4, depth=4))
    whole = trace(generator, IDS, max_new_tokens=NEW, do_sample=False)
    inside = next(i for i in (1, 2, 6, 7) if whole.tokens.index(whole.tokens[i]) == i)
    cut = trace(generator, IDS, max_new_tokens=NEW, do_sample=False, eos_token_id=whole.tokens[inside])
    assert cut.tokens == whole.tokens[: inside + 1]
    assert cut.rounds[-1].next_token is None
    assert tuple(chain.from_iterable(one.added for one in cut.rounds)) == cut.tokens


@pytest.mark.parametrize(
    ("parents", "path", "kind"),
    [
        ((-1,), (), "plain"),
        ((-1, 0), (), "recovered"),
        ((-1, 0), (1,), "bonus"),
        ((-1, 0, 0, 2), (1,), "bonus"),
        ((-1, 0, 0, 2), (2,), "recovered"),
    ],
)
def test_the_next_token_is_named_by_how_it_came(parents: tuple[int, ...], path: tuple[int, ...], kind: str) -> None:
    one = TracedRound((5,) * len(parents), parents, path, (5,) * len(path) + (6,), "", None, (0.0, 0.0, 0.0, 0.0))
    assert one.next_kind == kind
    assert one.next_token == 6


@pytest.mark.parametrize(("rows", "sequences"), [(2, 1), (1, 2)])
def test_more_than_one_request_is_refused(rows: int, sequences: int) -> None:
    with pytest.raises(InvalidRequestError, match="one request"):
        trace(SpeculativeGenerator(MODEL), IDS.repeat(rows, 1), max_new_tokens=2, do_sample=True, num_return_sequences=sequences)


@pytest.mark.slow
def test_the_command_writes_a_page(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    arguments = ["--drafter", "suffix", "--drafter", "bundled", "--nodes", "2", "--max-new-tokens", "16", "--output", str(file)]
    done = CliRunner().invoke(app, ["trace", "Once upon a time", *arguments])
    assert done.exit_code == 0, done.output
    assert "16 tokens in" in done.output
    text = file.read_text(encoding="utf-8")
    assert "Once upon" in text
    assert "the bundled target, suffix, the bundled draft" in text
    assert 'id="round-1"' in text


def test_the_command_tells_where_it_cannot_write(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["trace", "Hello", "--output", str(tmp_path / "no" / "page.html")])
    assert isinstance(done.exception, InvalidRequestError)
    assert "--output" in str(done.exception)
