"""Random requests: what `model.generate` says for each, and sampled text that does not depend on the drafter."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, WatermarkingConfig

from specdec.drafters.draft_model import DraftModelDrafter
from specdec.generator import SpeculativeGenerator
from specdec.planner import FixedPlanner
from tests.support_compare import TIE
from tests.support_models import VOCABULARY, left_padded, noised, prompts, tiny_model

# Of a thousand requests, so many may differ behind a tie, and no more.
TIES_IN_A_THOUSAND = 2
FAMILIES = ("llama", "gpt2", "mistral", "gemma2")
DRAFTERS = ("chain", "tree", "bad", "prompt-lookup", "suffix", "recycling")


@dataclass(frozen=True)
class Request:
    """One call of `generate`. drafted: the planner's number of tokens, None for the default planner."""

    family: str
    drafter: str
    drafted: int | None
    lengths: tuple[int, ...]
    text_seed: int
    options: dict[str, Any]


class _ByRow(LogitsProcessor):
    """Depends on the row's place, its length and its last token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        places = (torch.arange(len(scores)) + input_ids[:, -1] + input_ids.shape[1])[:, None]
        return scores - 4.0 * ((torch.arange(VOCABULARY) + places) % 4 == 0)


def _allowed(batch: int, text: Tensor) -> list[int]:
    return [t for t in range(2, VOCABULARY) if (t + batch + len(text)) % 3]


def _ends(batch: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    return (batch[:, -1] + torch.arange(len(batch))) % 7 == 0


_TOKENS = st.integers(3, VOCABULARY - 1)
_SETS = st.lists(_TOKENS, min_size=1, max_size=12, unique=True)
# An option is left out as often as it is given, so that most requests have a few of them.
_OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "eos_token_id": st.lists(_TOKENS, min_size=1, max_size=9, unique=True),
    "min_new_tokens": st.integers(1, 5),
    "repetition_penalty": st.sampled_from((0.7, 1.2, 1.9)),
    "encoder_repetition_penalty": st.sampled_from((0.8, 1.3)),
    "no_repeat_ngram_size": st.integers(1, 3),
    "encoder_no_repeat_ngram_size": st.integers(1, 3),
    "bad_words_ids": st.lists(st.lists(_TOKENS, min_size=1, max_size=3), min_size=1, max_size=4),
    "sequence_bias": _SETS.map(lambda tokens: [[[t], 2.0 - t % 5] for t in tokens]),
    "suppress_tokens": _SETS,
    "begin_suppress_tokens": _SETS,
    "forced_eos_token_id": st.just(2),
    "exponential_decay_length_penalty": st.sampled_from(((1, 1.5), (3, 1.1))),
    "renormalize_logits": st.just(True),
    "remove_invalid_values": st.just(True),
    "prefix_allowed_tokens_fn": st.just(_allowed),
    "logits_processor": st.just([_ByRow]),
    "stopping_criteria": st.just([_ends]),
    "watermarking_config": st.sampled_from(("lefthash", "selfhash")),
    "prefill_chunk_size": st.integers(1, 5),
    "use_cache": st.just(False),
}
_SAMPLING: dict[str, st.SearchStrategy[Any]] = {
    "temperature": st.sampled_from((0.4, 0.8, 1.5)),
    "top_k": st.integers(0, 20),
    "top_p": st.sampled_from((0.5, 0.9, 0.99)),
    "min_p": st.sampled_from((0.02, 0.2)),
    "typical_p": st.sampled_from((0.6, 0.95)),
    "epsilon_cutoff": st.sampled_from((0.001, 0.02)),
    "eta_cutoff": st.sampled_from((0.001, 0.02)),
    "num_return_sequences": st.integers(2, 3),
}


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request of tiny models; at most three prompts of ten tokens and nine new tokens, so that thousands can be tried."""
    chosen = dict(_OPTIONS)
    options: dict[str, Any] = {"max_new_tokens": draw(st.integers(1, 9)), "do_sample": draw(st.booleans())}
    if options["do_sample"]:
        chosen |= _SAMPLING
    names = draw(st.lists(st.sampled_from(sorted(chosen)), max_size=5, unique=True))
    options |= {name: draw(chosen[name]) for name in names}
    return Request(
        family=draw(st.sampled_from(FAMILIES)),
        drafter=draw(st.sampled_from(DRAFTERS)),
        drafted=draw(st.sampled_from((1, 2, 3, 4, 9, None))),
        lengths=tuple(draw(st.lists(st.integers(1, 10), min_size=1, max_size=3))),
        text_seed=draw(st.integers(0, 999)),
        options=_consistent(options),
    )


def _consistent(options: dict[str, Any]) -> dict[str, Any]:
    """Without what transformers itself refuses or leaves undefined."""
    if options.get("use_cache") is False:
        options.pop("prefill_chunk_size", None)
    if "exponential_decay_length_penalty" in options or "min_new_tokens" in options:
        options.setdefault("eos_token_id", [5, 8, 13])
    if "forced_eos_token_id" in options:
        options["eos_token_id"] = 2
    return options


@functools.cache
def _model(family: str) -> Any:
    return tiny_model(family)


@functools.cache
def _built(family: str, drafter: str | None, fixed: bool) -> SpeculativeGenerator:
    model, drafters = _model(family), {"chain": 0.08, "tree": 0.08, "bad": 3.0}
    made: Any = drafter
    if drafter in drafters:
        shape: Any = "tree" if drafter == "tree" else "chain"
        made = DraftModelDrafter(noised(model, drafters[drafter]), shape=shape)
    return SpeculativeGenerator(model, made, planner=1 if fixed else None)


def _generator(request: Request) -> SpeculativeGenerator:
    """Built once for each drafter, and given the request's own budget."""
    generator = _built(request.family, request.drafter, request.drafted is not None)
    if request.drafted is not None:
        width = 3 if request.drafter in ("tree", "suffix", "recycling") else 1
        generator.engine.planner = FixedPlanner(nodes=request.drafted, depth=min(request.drafted, 4), width=width)
    return generator


def _options(request: Request) -> dict[str, Any]:
    """The arguments, with processors of their own for each call."""
    options = {**left_padded(prompts(request.lengths, request.text_seed)), **request.options}
    options["logits_processor"] = [make() for make in options.get("logits_processor", ())]
    scheme = options.get("watermarking_config")
    if scheme is not None:
        options["watermarking_config"] = WatermarkingConfig(bias=2.0, seeding_scheme=scheme)
    return {**options, "return_dict_in_generate": True, "output_scores": True, "output_logits": True}


def _forced(text: Tensor, options: dict[str, Any]) -> Callable[..., Any]:
    """A decoding loop that says this text: the scores that transformers' own processors give on the way, [steps, B, V]."""

    @torch.no_grad()
    def loop(model: Any, input_ids: Tensor, logits_processor: Any, **kwargs: Any) -> Tensor:
        begin = input_ids.shape[1]
        mask = options["attention_mask"].repeat_interleave(options.get("num_return_sequences", 1), 0)
        mask = torch.cat((mask, mask.new_ones(len(text), text.shape[1] - begin)), 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(text, attention_mask=mask, position_ids=positions).logits.float()
        steps = range(begin, text.shape[1])
        return torch.stack([logits_processor(text[:, :n], logits[:, n - 1].clone()) for n in steps])

    return loop


def _close(mine: Tensor, theirs: Tensor) -> bool:
    """Equal to 1e-5 of the largest, and infinite in the same places."""
    finite = theirs.isfinite()
    if not torch.equal(finite, mine.isfinite()) or not torch.equal(mine[~finite], theirs[~finite]):
        return False
    largest = theirs[finite].abs().max() if finite.any() else torch.ones(())
    return bool(((mine[finite] - theirs[finite]).abs() <= 1e-5 * largest).all())


def _check_scores(request: Request, options: dict[str, Any], out: Any) -> bool:
    """Whether the scores are those of transformers; False where they differ only at the edge of a cut that a tie decides."""
    model = _model(request.family)
    theirs = model.generate(**_options(request), custom_generate=_forced(out.sequences, options))
    begin = options["input_ids"].shape[1]
    ends = torch.as_tensor(options.get("eos_token_id", -1)).view(-1)
    live = torch.ones(len(out.sequences), dtype=torch.bool)
    excused = False
    for step, mine in enumerate(out.scores):
        for row in live.nonzero()[:, 0].tolist():
            if not _close(mine[row], theirs[step, row]):
                gap = _edge(mine[row], theirs[step, row], out.logits[step][row])
                assert gap < TIE, f"scores differ at step {step}, row {row} of {request}: gap {gap:.1e}"
                excused = True
        live &= ~torch.isin(out.sequences[:, begin + step], ends)
        if "stopping_criteria" in options:
            live &= ~_ends(out.sequences[:, : begin + step + 1], None)
    return not excused


def _edge(mine: Tensor, theirs: Tensor, logits: Tensor) -> float:
    """How far apart, in deviations of the logits, the tokens lie that a cut kept in one and dropped in the other."""
    differs = mine.isfinite() != theirs.isfinite()
    if not differs.any():
        return float("inf")
    kept = logits[mine.isfinite() & theirs.isfinite()]
    return float((logits[differs][:, None] - kept[None]).abs().min() / logits.std())


def _same_text(request: Request, mine: Any, theirs: Any, begin: int) -> bool:
    """Whether the texts are equal; False where they part at a tie of the scores."""
    if torch.equal(mine.sequences, theirs.sequences):
        return True
    width = min(mine.sequences.shape[1], theirs.sequences.shape[1])
    ties = 0
    for row in range(len(theirs.sequences)):
        differs = (mine.sequences[row, :width] != theirs.sequences[row, :width]).nonzero()
        if len(differs):
            step = int(differs[0]) - begin
            top = theirs.scores[step][row].topk(2).values
            gap = float((top[0] - top[1]) / theirs.logits[step][row].std())
            assert gap < TIE, f"texts differ at step {step}, row {row} of {request}: gap {gap:.1e}"
            ties += 1
    assert ties, f"lengths differ without a tie, {mine.sequences.shape[1]} and {theirs.sequences.shape[1]}, of {request}"
    return False


def _check(request: Request) -> bool:
    """Compare one request; False where a tie was excused."""
    options = _options(request)
    begin = options["input_ids"].shape[1]
    generator = _generator(request)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.options["do_sample"]:
            mine = generator.generate(**options, seed=request.text_seed)
            plain = _built(request.family, None, True).generate(**_options(request), seed=request.text_seed)
            same = _same_text(request, mine, plain, begin)
        else:
            mine = generator.generate(**options)
            same = _same_text(request, mine, _model(request.family).generate(**_options(request)), begin)
        return _check_scores(request, options, mine) and same


def _try(count: int, which: int) -> None:
    """Check so many requests, and count those that a tie excused and the drafted tokens that were accepted."""
    excused: list[bool] = []
    accepted: list[int] = []

    @seed(which)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def run(request: Request) -> None:
        excused.append(not _check(request))
        stats = _generator(request).stats
        accepted.append(0 if stats is None else stats.accepted)

    run()
    ties = sum(excused)
    print(f"{len(excused)} requests, {ties} excused by ties, {sum(accepted)} drafted tokens accepted")
    assert len(excused) >= count * 0.9
    assert sum(accepted) > count / 2
    assert ties <= max(1, TIES_IN_A_THOUSAND * count // 1000)


def test_random_requests() -> None:
    _try(100, which=1)


@pytest.mark.slow
def test_more_random_requests() -> None:
    _try(400, which=2)


@pytest.mark.nightly
def test_many_random_requests() -> None:
    _try(5000, which=3)
