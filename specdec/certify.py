"""Is the output the target's own, on this machine, with this drafter, rule and sampling? The checks behind `specdec certify`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.margin import explain, first_difference
from specdec.certify_sampling import DEPTH, POWER, DraftTally, Draws, Fit, Reference, WatchedDrafter, continued, sampled_fit
from specdec.doctor import versions
from specdec.drafters.base import Drafter
from specdec.errors import SpecDecError
from specdec.generator import OneDrafter, SpeculativeGenerator, as_drafter
from specdec.noise import Noise, Stream
from specdec.planner import FixedPlanner, Planner
from specdec.runner import RunnerOptions
from specdec.types import Budget, Committed, Draft, Law, TokenTree
from specdec.verify.compatibility import Rule, rule_for

CHECKS = ("greedy", "coupled", "law", "draft-law", "state")
Verdict = Literal["pass", "fail", "not applicable"]
PASS: Verdict = "pass"
FAIL: Verdict = "fail"
SKIPPED: Verdict = "not applicable"
# In fp32 a gap under this share of the logits' deviation is a tie: either token is right.
_TIE = 1e-5
# Tokens of the prompt whose sampled law is tested.
_SHORT = 24
# By default there is a draft in every round, so that every part is at work.
_DRAFTED = 3
_CHAINS, _TREES = FixedPlanner(nodes=_DRAFTED, depth=_DRAFTED), FixedPlanner(nodes=8, depth=_DRAFTED, width=3)
# Rounds in which the drafter's state is built anew, and the part of them that may differ by rounding in half precision.
_REBUILT, _ROUNDED = 16, 0.1
# Differences within rounding that are gone on from, before the comparison gives up.
_MOST_EXCUSED = 50
# These learn from earlier calls on purpose; see their own pages.
_REMEMBER = frozenset({"recycling", "retrieval"})

# Told the check and how far it is, from 0 to 1.
Progress = Callable[[str, float], None]
# (row, its text, our continuation, the reference's, where they differ) to why that is no difference; None if it is one.
Judge = Callable[[int, list[int], list[int], list[int], int], str | None]
# (row, the text before the token, its processed logits [V]) to what is decided on.
Decided = Callable[[int, list[int], Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Check:
    """One check. detail: what was found, or why the check does not apply.  numbers: the same for programs."""

    name: str
    verdict: Verdict
    detail: str
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Certificate:
    """What the checks found, with what, and where. lossless: whether the rule is, by its own name."""

    checks: tuple[Check, ...]
    lossless: bool
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of the checks that failed."""
        return tuple([check.name for check in self.checks if check.verdict == FAIL])

    @property
    def certified(self) -> bool:
        """The rule is lossless, something was checked, and nothing failed."""
        return self.lossless and not self.failed and any(check.verdict == PASS for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.failed:
            return f"FAILED: {', '.join(self.failed)}"
        if not self.lossless:
            return f"not certified: {self.settings['verifier']} is lossy by its name"
        return "certified: every check that applies passed" if self.certified else "not certified: no check applied"


@dataclass(frozen=True, slots=True)
class _Setup:
    """What is checked. prompts: token ids.  sampling: arguments of `generate`, empty for greedy decoding only."""

    target: PreTrainedModel
    drafter: Drafter
    rule: Rule
    verifier: str
    planner: Planner
    options: RunnerOptions | None
    sampling: Mapping[str, Any]
    prompts: tuple[tuple[int, ...], ...]
    new: int
    samples: int
    seed: int
    progress: Progress

    @property
    def half(self) -> bool:
        """Whether the target rounds so much that texts are equal up to a margin only."""
        return self.target.dtype in (torch.float16, torch.bfloat16)

    def generator(self, drafter: Drafter | None, verifier: str) -> SpeculativeGenerator:
        """A generator of the user's target and planner."""
        return SpeculativeGenerator(self.target, drafter, verifier=verifier, planner=self.planner, options=self.options)


def certify(
    target: PreTrainedModel,
    drafter: OneDrafter | Sequence[OneDrafter] | Mapping[str, OneDrafter],
    *,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase | None = None,
    verifier: str = "auto",
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    samples: int = 2000,
    seed: int = 0,
    max_new_tokens: int = 48,
    planner: Planner | None = None,
    options: RunnerOptions | None = None,
    checks: Collection[str] = CHECKS,
    progress: Progress | None = None,
) -> Certificate:
    """Check that this setup says what the target alone says; a wrong setup fails at least one check with high probability.

    drafter, verifier, options: as for `SpeculativeGenerator`.  prompts: texts, which need the tokenizer, or token ids.
    temperature: 0 checks greedy decoding only.  samples: draws of the sampled law.  planner: by default a fixed one that drafts in
    every round.  checks: of `CHECKS`.  Torch's random state is left as it was. Raises a SpecDecError for what cannot be built.
    """
    own = _checked(as_drafter(drafter, target), checks, samples, max_new_tokens)
    planner = planner or (_TREES if own.shape == "tree" else _CHAINS)
    sampling = _sampling(temperature, top_k, top_p)
    rule = rule_for(verifier, own.laws, own.shape, bool(sampling), False, planner.post_draw)[0]
    ids = _token_ids(prompts, tokenizer, target, max_new_tokens)
    report = progress or (lambda name, share: None)
    setup = _Setup(target, own, rule, verifier, planner, options, sampling, ids, max_new_tokens, samples, seed, report)
    setup.generator(own, verifier)
    found = _run(setup, checks)
    return Certificate(tuple(found), rule.lossless, _settings(setup), versions(target.device))


def _checked(drafter: Drafter | None, checks: Collection[str], samples: int, new: int) -> Drafter:
    """The drafter. Raises SpecDecError for what cannot be checked."""
    if set(checks) - set(CHECKS) or samples < 100 or new < 1:
        raise SpecDecError(
            f"checks={list(checks)}, samples={samples}, max_new_tokens={new}: allowed are checks of {CHECKS}, at least 100 samples "
            "and 1 token"
        )
    if drafter is None:
        raise SpecDecError("drafter is None: plain decoding speculates nothing that could be certified; give a drafter")
    return drafter


def _sampling(temperature: float, top_k: int | None, top_p: float | None) -> dict[str, Any]:
    if temperature < 0:
        raise SpecDecError(f"temperature={temperature}: give 0 for greedy decoding only, or more to sample")
    if not temperature:
        return {}
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {"do_sample": True, **{name: value for name, value in given.items() if value is not None}}


def _settings(setup: _Setup) -> dict[str, Any]:
    drafter = setup.drafter
    name = str(getattr(setup.target.config, "_name_or_path", "")) or type(setup.target).__name__
    return {
        "target": name,
        "dtype": str(setup.target.dtype).removeprefix("torch."),
        "drafter": drafter.name,
        "shape": drafter.shape,
        "verifier": setup.rule.name,
        **{name: value for name, value in setup.sampling.items() if name != "do_sample"},
        "prompts": len(setup.prompts),
        "max_new_tokens": setup.new,
        "samples": setup.samples,
        "seed": setup.seed,
    }


def _token_ids(
    prompts: Sequence[str] | Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase | None, target: PreTrainedModel, new: int
) -> tuple[tuple[int, ...], ...]:
    """The prompts' token ids, each with room for the comparisons. Raises SpecDecError where there is none."""
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise SpecDecError("prompts that are texts need a tokenizer; pass tokenizer=, or prompts as token ids")
    every: list[Any] = [tokenizer(p)["input_ids"] if tokenizer is not None and isinstance(p, str) else p for p in prompts]
    ids = [tuple(map(int, prompt)) for prompt in every]
    room = room_of(target, new)
    if not ids or not all(ids) or max(map(len, ids)) > room:
        raise SpecDecError(
            f"prompts of {[len(prompt) for prompt in ids]} tokens: give one or more, each of 1 to {room} tokens, so that twice "
            f"{new} new ones fit into the model's positions; or lower max_new_tokens"
        )
    return tuple(ids)


def room_of(target: PreTrainedModel, new: int) -> int:
    """Most tokens of a prompt: a comparison that goes on from a difference generates anew from there."""
    most = getattr(target.config.get_text_config(), "max_position_embeddings", None) or 1 << 40
    return int(most) - 2 * new - _DRAFTED


def _run(setup: _Setup, checks: Collection[str]) -> list[Check]:
    """The checks in their order."""
    found: list[Check] = []
    if "greedy" in checks:
        found.append(_greedy(setup))
    if "coupled" in checks:
        found.append(_coupled(setup))
    if {"law", "draft-law"} & set(checks):
        found += [check for check in _sampled(setup) if check.name in checks]
    if "state" in checks:
        found.append(_state(setup))
    return found


def _greedy(setup: _Setup) -> Check:
    """Greedy text against transformers' own, prompt by prompt there and as one batch here."""
    target, texts, how = setup.target, list(map(list, setup.prompts)), {"do_sample": False}
    reference = []
    for row, text in enumerate(texts):
        reference += continued(target, target, [text], setup.new, how)
        setup.progress("greedy", (row + 1) / (len(texts) + 1))
    generator = setup.generator(setup.drafter, setup.verifier)
    judge = _judge(setup, how, lambda row, before, scores: scores)
    found = compare(texts, reference, lambda now: continued(generator, target, now, setup.new, how), judge)
    return _identity("greedy", setup, found, reference, generator, "transformers' generate")


def _coupled(setup: _Setup) -> Check:
    """Sampling with a seed against plain decoding with that seed: noise is keyed by request and position, so texts are equal."""
    if not setup.sampling:
        return Check("coupled", SKIPPED, "temperature 0: nothing is sampled")
    if not setup.drafter.laws & {Law.COUPLED, Law.DETERMINISTIC}:
        laws = ", ".join(sorted(setup.drafter.laws))
        return Check("coupled", SKIPPED, f"the coupled rule verifies coupled and deterministic drafts; this drafter's are {laws}")
    target, texts, how = setup.target, list(map(list, setup.prompts)), {**setup.sampling, "seed": setup.seed}
    plain, generator = setup.generator(None, "coupled"), setup.generator(setup.drafter, "coupled")
    reference = continued(plain, target, texts, setup.new, how)
    setup.progress("coupled", 0.5)

    def noisy(row: int, before: list[int], scores: Tensor) -> Tensor:
        request, position = (torch.tensor([value], device=scores.device) for value in (row, len(before)))
        return scores.log_softmax(-1) + Noise(setup.seed).gumbel(Stream.COUPLED, len(scores), request, position)[0]

    judge = _judge(setup, setup.sampling, noisy)
    found = compare(texts, reference, lambda now: continued(generator, target, now, setup.new, how), judge)
    return _identity("coupled", setup, found, reference, generator, "plain decoding with the same noise")


def compare(
    texts: list[list[int]], reference: list[list[int]], run: Callable[[list[list[int]]], list[list[int]]], judge: Judge
) -> tuple[list[str], str]:
    """Differences that rounding excuses, and the first that it does not. Behind an excused one, both go on from the reference."""
    done = [0] * len(texts)
    excused: list[str] = []
    while len(excused) <= _MOST_EXCUSED:
        begun = [[*text, *own[:count]] for text, own, count in zip(texts, reference, done, strict=True)]
        rows, before = run(begun), len(excused)
        for row, ours in enumerate(rows):
            rest = reference[row][done[row] :]
            place = first_difference(ours, rest)
            if place is None and len(ours) >= len(rest):
                continue
            why = None if place is None else judge(row, begun[row], ours, rest, place)
            if place is None or why is None:
                at = len(ours) if place is None else place
                return excused, f"prompt {row + 1} differs at new token {done[row] + at + 1}: {ours[at : at + 1]} for {rest[at]}"
            excused.append(why)
            done[row] += place + 1
        if len(excused) == before:
            return excused, ""
    return excused, f"more than {_MOST_EXCUSED} differences, each within rounding"


def _judge(setup: _Setup, how: Mapping[str, Any], decided: Decided) -> Judge:
    """Either token is right where the gap between what is decided on lies within the rounding. how: arguments of `generate`."""
    scale = 1 / min(1.0, how.get("temperature", 1.0))

    def judge(row: int, text: list[int], ours: list[int], theirs: list[int], place: int) -> str | None:
        before, pair = [*text, *theirs[:place]], [ours[place], theirs[place]]
        raw, processed = (rows[0] for rows in Reference(setup.target, before, how).scores([before]))
        scores, kept = decided(row, before, processed), processed.isfinite()
        inside, gap = bool(kept[pair].all()), float(scores.max() - scores[pair].min())
        if not setup.half:
            share = gap / (float(raw.std()) * scale)
            return f"a tie: {share:.1e} of the deviation" if inside and share < _TIE else None
        found = explain(setup.target, text, ours, theirs)
        noise = found.noise * scale if found is not None else 0.0
        if not inside:
            # One of them lies beyond a top-k or top-p edge in one forward and not in the other.
            gap, noise = float((raw[pair].min() - raw[kept].min()).abs()), noise / scale
        return f"{gap:.3g} apart, noise {noise:.3g}" if gap <= noise else None

    return judge


def _identity(
    name: str,
    setup: _Setup,
    found: tuple[list[str], str],
    reference: list[list[int]],
    generator: SpeculativeGenerator,
    against: str,
) -> Check:
    excused, failure = found
    tokens, length = sum(map(len, reference)), generator.stats.mean_acceptance_length if generator.stats else 0.0
    numbers = {"tokens": tokens, "excused": len(excused), "mean_acceptance_length": length}
    setup.progress(name, 1.0)
    if failure:
        return Check(name, FAIL, f"not the text of {against}: {failure}", numbers)
    rounding = f", {len(excused)} difference(s) within rounding ({excused[0]})" if excused else ""
    return Check(name, PASS, f"{tokens} tokens equal {against}{rounding}; {length:.2f} tokens a round", numbers)


def _sampled(setup: _Setup) -> list[Check]:
    """Many samples of a short prompt by the setup's own rule, and what was drafted for them."""
    rule = setup.rule
    if not setup.sampling:
        return [Check(name, SKIPPED, "temperature 0: nothing is sampled") for name in ("law", "draft-law")]
    tally = DraftTally()
    watched = WatchedDrafter(setup.drafter, drafted=lambda budget, draft: tally.add(draft))
    generator = setup.generator(watched, setup.verifier)
    prompt = min(setup.prompts, key=len)[:_SHORT]
    told = partial(setup.progress, "law")
    fit = sampled_fit(generator, Draws(prompt, setup.samples, setup.sampling, setup.seed, told, exact=not setup.half))
    law = _fitted("law", fit, f"{fit.samples} samples of {DEPTH} tokens") if rule.lossless else None
    lossy = Check("law", SKIPPED, f"{rule.name} is lossy by its name: {fit.distance:.1%} from the target's law here", asdict(fit))
    return [law or lossy, _draft_law(setup, tally)]


def _draft_law(setup: _Setup, tally: DraftTally) -> Check:
    name, fits = "draft-law", tally.fits()
    if Law.INDEPENDENT not in tally.laws:
        laws = ", ".join(sorted(tally.laws)) or "none at all"
        return Check(name, SKIPPED, f"the rule {setup.rule.name} asked for {laws} drafts: there is no q to compare with")
    if tally.impossible:
        return Check(name, FAIL, f"{tally.impossible} of {tally.draws} drafted tokens have probability 0 in the q that was told")
    if not fits:
        return Check(name, SKIPPED, f"q left no choice in {tally.draws} draws")
    depth, worst = min(fits.items(), key=lambda item: item[1].p)
    return _fitted(name, worst, f"{tally.draws} drafted tokens against q, the least likely at depth {depth} of {len(fits)}")


def _fitted(name: str, fit: Fit, what: str) -> Check:
    if fit.cells == 1 and not fit.impossible:
        return Check(name, SKIPPED, f"{what}: the law leaves one outcome", asdict(fit))
    if fit.impossible:
        return Check(name, FAIL, f"{what}: {fit.impossible} that the target cannot say", asdict(fit))
    power = f"a law {fit.smallest:.1%} or more away in total variation is found with probability {POWER}"
    verdict = FAIL if fit.refused else PASS
    return Check(name, verdict, f"{what}, {fit.cells} cells: p = {fit.p:.2g}, refused below {fit.alpha:.2g}; {power}", asdict(fit))


def _state(setup: _Setup) -> Check:
    """What the drafter proposes in mid-text against what it proposes when told the same text anew."""
    drafter, name = setup.drafter, "state"
    if drafter.name in _REMEMBER or set(getattr(drafter, "names", ())) & _REMEMBER:
        return Check(name, SKIPPED, f"{drafter.name} learns from earlier calls: its drafts are no function of this text alone")
    drafts: list[tuple[int, Budget, TokenTree]] = []
    commits: list[Committed] = []

    def drafted(budget: Budget, draft: Draft) -> None:
        tree = draft.tree
        drafts.append((len(commits), budget, replace(tree, tokens=tree.tokens.clone(), parents=tree.parents.clone())))

    def committed(given: Committed) -> None:
        commits.append(replace(given, taps={key: tap.clone() for key, tap in given.taps.items()}))

    watched = WatchedDrafter(drafter, drafted=drafted, committed=committed)
    generator, texts = setup.generator(watched, setup.verifier), list(map(list, setup.prompts[:2]))
    continued(generator, setup.target, texts, setup.new, {"do_sample": False})
    prompts, tried, differ = tuple(map(tuple, texts)), drafts[:_REBUILT], 0
    for row, (before, budget, tree) in enumerate(tried):
        watched.rebuild(prompts, commits[:before])
        differ += not _same(tree, drafter.propose(budget).tree)
        setup.progress(name, (row + 1) / len(tried))
    verdict = FAIL if differ > (int(_ROUNDED * len(tried)) if setup.half else 0) else PASS
    found = f"{len(tried) - differ} of {len(tried)} drafts are the same from a state built anew"
    return Check(name, verdict, found, {"rounds": len(tried), "differ": differ})


def _same(one: TokenTree, other: TokenTree) -> bool:
    pairs = (one.tokens, other.tokens), (one.parents, other.parents)
    return one.num_nodes == other.num_nodes and all(torch.equal(*pair) for pair in pairs)
