"""What a family's walk does: greedy generation under drafts of random tokens, held against transformers' own."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from specdec.drafters.base import DraftSetup
from specdec.errors import UnsupportedModelError
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from specdec.trees.host import tree_from_lists
from specdec.types import Budget, Committed, Draft, Law
from tests.support_compare import TIE, RecordingPlanner
from tests.support_families import UNTRIED, VOCABULARY, every_family, family_model
from tests.support_models import left_padded, prompts

PAGE = Path(__file__).resolve().parent.parent / "docs" / "families.md"
NEW = 20
BATCHES = ((9,), (12, 3))
# Of the largest logit. fp32 on both sides; only the order of sums differs, which comes to 1e-5 at most.
TOLERANCE = 1e-4


class ScatteredDrafter:
    """Trees of random tokens, in which the true continuation takes a random child's place three times in four."""

    name, shape, taps = "scattered", "tree", ()
    laws = frozenset({Law.DETERMINISTIC})

    def __init__(self, texts: Sequence[Sequence[int]], seed: int = 0) -> None:
        """texts: the true continuation of each request."""
        self._texts, self._random = texts, random.Random(seed)

    def begin(self, prompts: tuple[tuple[int, ...], ...], setup: DraftSetup) -> None:
        self._device = setup.device
        self._last = [prompt[-1] for prompt in prompts]
        self._done = [0] * len(prompts)

    def propose(self, budget: Budget) -> Draft:
        tokens, parents = [], []
        for request, nodes, depth, width in zip(budget.requests, budget.nodes, budget.depth, budget.width, strict=True):
            own, above = [self._last[request]], [-1]
            true, level = [0], [0]
            for parent in range(nodes):
                if level[parent] == depth or len(own) + width > nodes:
                    break
                self._expand(request, parent, width, own, above, true, level)
            tokens.append(own)
            parents.append(above)
        return Draft(tree_from_lists(tokens, parents, self._device), Law.DETERMINISTIC)

    def _expand(
        self, request: int, parent: int, width: int, own: list[int], above: list[int], true: list[int], level: list[int]
    ) -> None:
        """Give a node its children. true: where the node lies on the true path, its depth; else -1."""
        place = self._done[request] + level[parent]
        fresh = self._random.sample(range(3, VOCABULARY), width)
        which = self._random.randrange(width) if self._random.random() < 0.75 and true[parent] >= 0 else -1
        if which >= 0 and place < len(self._texts[request]):
            token = self._texts[request][place]
            fresh = [t if t != token else 2 for t in fresh]
            fresh[which] = token
        for i, token in enumerate(fresh):
            own.append(token)
            above.append(parent)
            level.append(level[parent] + 1)
            true.append(level[-1] if i == which else -1)

    def commit(self, committed: Committed) -> None:
        for request, tokens in zip(committed.requests, committed.tokens, strict=True):
            self._last[request] = tokens[-1]
            self._done[request] += len(tokens)


@dataclass(frozen=True, slots=True)
class Walked:
    """How a family fared. verdict: "works", "refused", "untried", or "wrong", which no family may be."""

    family: str
    verdict: str
    why: str = ""


def walk(family: str) -> Walked:
    """Untried for want of a tiny model, refused at construction, or compared over every batch."""
    if family in UNTRIED:
        return Walked(family, "untried", UNTRIED[family])
    model = family_model(family)
    try:
        SpeculativeGenerator(model, None)
    except UnsupportedModelError as error:
        return Walked(family, "refused", _reason(str(error)))
    for lengths in BATCHES:
        why = compare(model, lengths)
        if why is not None:
            return Walked(family, "wrong", f"batch of {len(lengths)}: {why}")
    return Walked(family, "works")


def _reason(message: str) -> str:
    """The reason in an error's message, without the model's name before it and the advice behind it."""
    return re.sub(r"^\w+(:| \(\w+\)) ", "", message).partition("; use a")[0]


def compare(model: Any, lengths: tuple[int, ...]) -> str | None:
    """What differs from `model.generate`, or None. Behind a tie of the two likeliest tokens a row is not compared further."""
    inputs = left_padded(prompts(lengths))
    options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options)
    width = inputs["input_ids"].shape[1]
    texts = expected.sequences[:, width:]
    drafter = ScatteredDrafter(texts.tolist())
    planner = RecordingPlanner(FixedPlanner(nodes=12, depth=3, width=3))
    ours = SpeculativeGenerator(model, drafter, planner=planner).generate(**inputs, **options)
    if max(planner.accepted_lengths()) == 0:
        return "no drafted token was accepted"
    for row in range(len(lengths)):
        for step, (mine, theirs) in enumerate(zip(ours.scores, expected.scores, strict=True)):
            error = _error(mine[row], theirs[row])
            if error > TOLERANCE:
                return f"row {row} step {step}: logits differ by {error:.1e} of the largest"
            if ours.sequences[row, width + step] != texts[row, step]:
                top = theirs[row].topk(2).values
                gap = float((top[0] - top[1]) / theirs[row].std())
                if gap >= TIE:
                    return f"row {row} step {step}: another token, where the two likeliest are {gap:.1e} deviations apart"
                break
    return None


def _error(mine: Tensor, theirs: Tensor) -> float:
    return float((mine - theirs).abs().max() / theirs.abs().max())


def page(walked: Sequence[Walked]) -> str:
    """docs/families.md."""
    counts = {verdict: sum(w.verdict == verdict for w in walked) for verdict in ("works", "refused", "untried", "wrong")}
    rows = [f"| {w.family} | {w.verdict} | {w.why.replace('|', '/')} |" for w in walked]
    return "\n".join(
        [
            "# Families",
            "",
            f"Every causal LM of transformers {transformers.__version__}, walked with a tiny random model. "
            f"Works: {counts['works']}. Refused: {counts['refused']}. Untried: {counts['untried']}. Wrong: {counts['wrong']}.",
            "",
            "*works*: in fp32, every logit and token of greedy generation under draft trees of random tokens is that of",
            "`model.generate`, alone and in a left-padded batch, past the end of a sliding window.",
            "*refused*: when it is built, `SpeculativeGenerator` raises `UnsupportedModelError` with the reason.",
            "*untried*: there is no tiny model of it here; the same checks are made when it is built.",
            "",
            "Made by `python -m tests.support_walk`; a test holds it against the walk.",
            "",
            "| family | verdict | why |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def listed(text: str) -> dict[str, Walked]:
    """The table of docs/families.md."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: Walked(*row) for row in cells[1:]}


if __name__ == "__main__":
    again = sys.argv[1:] or every_family()
    known = listed(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    known.update({family: walk(family) for family in again})
    PAGE.write_text(page([known[family] for family in every_family()]), encoding="utf-8")
