"""`specdec certify` passes what is right and fails each planted fault; its statistics are what they say."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

from specdec.certify import CHECKS, Certificate, certify, compare
from specdec.certify_sampling import ALPHA, POWER, Cells, DraftTally, critical, smallest_distance, tail
from specdec.cli import app
from specdec.drafters.base import Drafter
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.medusa import MedusaDrafter
from specdec.drafters.medusa_heads import MedusaHeads
from specdec.drafters.pard import PardDrafter
from specdec.drafters.suffix import SuffixDrafter
from specdec.errors import SpecDecError
from specdec.runner import RunnerOptions
from specdec.types import Draft, Law, TokenTree
from tests import support_faults as faults
from tests.support_models import VOCABULARY, noised, prompts, tiny_model

TARGET: Any = tiny_model()
DRAFT: Any = noised(TARGET, 0.15)
# Text that repeats itself, for the lookup drafters.
TEXTS = [prompts((5,))[0] * 2, prompts((9,))[0]]
# The tiny model is sharp: at this temperature some tokens are drawn often and none always.
SAMPLING: dict[str, Any] = {"temperature": 3.0, "top_k": 4}


def _certify(drafter: Any, target: Any = TARGET, samples: int = 200, **options: Any) -> Certificate:
    return certify(target, drafter, prompts=TEXTS, samples=samples, max_new_tokens=12, **{**SAMPLING, **options})


def _verdicts(certificate: Certificate) -> dict[str, str]:
    return {check.name: check.verdict for check in certificate.checks}


def _medusa() -> Drafter:
    head = TARGET.get_output_embeddings().weight.detach()
    heads = MedusaHeads(32, VOCABULARY, 3, 1, shared_head=False, bias=True)
    with torch.no_grad():
        for own in heads.heads:  # type: ignore[union-attr]  # a ModuleList
            own.weight.copy_(head)
    return MedusaDrafter(heads)


HONEST: dict[str, tuple[Callable[[], Any], str, set[str]]] = {
    "chain, block": (lambda: DRAFT, "auto", set(CHECKS)),
    "chain, rejection": (lambda: DRAFT, "rejection", set(CHECKS)),
    "chain, sample-and-match": (lambda: DRAFT, "sample-and-match", {"greedy", "coupled", "law", "state"}),
    "chain, coupled": (lambda: DRAFT, "coupled", {"greedy", "coupled", "law", "state"}),
    "tree, traversal": (lambda: DraftModelDrafter(DRAFT, shape="tree"), "traversal", {"greedy", "coupled", "law", "state"}),
    "suffix": (lambda: SuffixDrafter(min_match=1), "auto", {"greedy", "coupled", "law", "state"}),
    "medusa": (_medusa, "auto", set(CHECKS)),
    "pard": (lambda: PardDrafter(DRAFT, 60), "block", set(CHECKS)),
}

# The other pairs are checked at night.
USUAL = ("chain, block", "tree, traversal", "suffix", "medusa", "pard")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name if name in USUAL else pytest.param(name, marks=pytest.mark.nightly) for name in HONEST])
def test_a_right_setup_is_certified(name: str) -> None:
    make, verifier, passed = HONEST[name]
    drafter, state = make(), torch.random.get_rng_state()
    certificate = _certify(drafter, verifier=verifier)
    assert certificate.certified, certificate
    assert {check for check, verdict in _verdicts(certificate).items() if verdict == "pass"} == passed
    assert torch.equal(torch.random.get_rng_state(), state)


FAULTY: dict[str, tuple[Callable[[], Any], str, set[str]]] = {
    "raw q, processed draws": (lambda: faults.RawLaw(DRAFT), "rejection", {"draft-law"}),
    "argmax drafts, soft q": (lambda: faults.ArgmaxDrafts(DRAFT), "block", {"draft-law"}),
    "dropped unlikely draws": (lambda: faults.DroppedDrafts(DRAFT), "rejection", {"draft-law"}),
    "one noise for draft and accept": (lambda: faults.SharedNoise(DRAFT), "rejection", {"law"}),
    "a drafter that forgets": (lambda: faults.ForgetsTokens(DRAFT), "auto", {"state"}),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_faulty_drafter_is_not_certified(name: str) -> None:
    make, verifier, checks = FAULTY[name]
    certificate = _certify(make(), verifier=verifier, checks=checks, samples=600 if "law" in checks else 200)
    assert set(certificate.failed) == checks, certificate
    assert not certificate.certified
    assert "FAILED" in certificate.verdict


@pytest.mark.parametrize("check", ["greedy", "coupled"])
@pytest.mark.parametrize("fault", ["stale_rows", "wrong_positions"])
def test_a_fault_of_the_cache_shows_in_the_text(fault: str, check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(faults, fault)(monkeypatch)
    assert _certify(DraftModelDrafter(DRAFT, shape="tree"), checks={check}).failed == (check,)


@pytest.mark.slow
def test_block_verification_that_breaks_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.early_break(monkeypatch)
    assert _certify(DRAFT, verifier="block", checks={"law"}, samples=1000).failed == ("law",)


@pytest.mark.parametrize("verifier", ["typical-lossy", "lenient-lossy"])
def test_a_lossy_rule_is_reported_by_its_name_and_not_certified(verifier: str) -> None:
    certificate = _certify(DRAFT, verifier=verifier, checks={"law", "draft-law"}, samples=200)
    assert not certificate.certified
    assert not certificate.failed
    assert verifier in certificate.verdict
    assert "lossy by its name" in certificate.checks[0].detail


@pytest.mark.slow
def test_half_precision_is_certified_within_its_rounding_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    target: Any = tiny_model().to(torch.bfloat16)
    texts = prompts((9, 14, 20, 5, 7))[-1:]
    options: dict[str, Any] = {"prompts": texts, "max_new_tokens": 60, "temperature": 0.0, "checks": {"greedy"}}
    drafter = DraftModelDrafter(noised(target, 0.1), shape="tree")
    certificate = certify(target, drafter, options=RunnerOptions(row_invariant=False, pack="off"), **options)
    assert certificate.certified, certificate
    assert certificate.checks[0].numbers["tokens"] == 60
    faults.stale_rows(monkeypatch)
    assert certify(target, drafter, **options).failed == ("greedy",)


def test_behind_an_excused_difference_the_comparison_goes_on_from_the_common_prefix() -> None:
    reference = [[5, 6, 7, 8, 9], [4, 4, 4, 4, 4]]
    asked: list[list[list[int]]] = []

    def run(texts: list[list[int]]) -> list[list[int]]:
        asked.append(texts)
        # The first text says 0 where the reference says 7, and after a 7 what the reference says; the second one is right.
        return [[8, 9, 1] if texts[0][-1] == 7 else [5, 6, 0, 0, 0], [4] * 5]

    excused, failure = compare([[1], [2]], reference, run, lambda row, text, ours, theirs, place: f"{row} {place}")
    assert (excused, failure) == (["0 2"], "")
    assert asked == [[[1], [2]], [[1, 5, 6, 7], [2]]]
    excused, failure = compare([[1], [2]], reference, run, lambda *difference: None)
    assert not excused
    assert "prompt 1 differs at new token 3: [0] for 7" in failure
    assert "prompt 1" in compare([[1]], [[4, 4]], lambda texts: [[4]], lambda *difference: "excused")[1]


def test_without_temperature_only_greedy_decoding_is_checked() -> None:
    certificate = _certify(DRAFT, temperature=0.0, top_k=None)
    assert _verdicts(certificate) == dict.fromkeys(CHECKS, "not applicable") | {"greedy": "pass", "state": "pass"}
    assert certificate.certified


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"checks": {"magic"}}, "magic"),
        ({"samples": 5}, "samples=5"),
        ({"temperature": -1.0}, "temperature=-1"),
        ({"verifier": "magic"}, "magic"),
        ({"prompts": ["text"]}, "tokenizer"),
        ({"prompts": [[]]}, "tokens"),
        ({"prompts": [[3] * 255]}, "positions"),
        ({"drafter": None}, "drafter is None"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_checked_is_told(options: dict[str, Any], what: str) -> None:
    given: dict[str, Any] = {"drafter": "suffix", "prompts": TEXTS, **options}
    with pytest.raises(SpecDecError, match=what):
        certify(TARGET, given.pop("drafter"), **given)


def test_the_statistics_agree_with_scipy() -> None:
    for freedom in (1, 7, 120):
        assert critical(freedom, ALPHA) == pytest.approx(stats.chi2.isf(ALPHA, freedom), rel=1e-6)
        assert tail(1.3 * freedom, freedom) == pytest.approx(stats.chi2.sf(1.3 * freedom, freedom), rel=1e-9)
        shift = 4 * 2000 * smallest_distance(2000, freedom) ** 2
        assert stats.ncx2.sf(critical(freedom, ALPHA), freedom, shift) == pytest.approx(POWER, abs=1e-6)


def _rows(paths: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Laws over 4 tokens that depend on how long the path is; token 3 is never said, token 2 ends the text."""
    laws = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.9, 0.05, 0.05, 0.0]], dtype=torch.float64)
    return laws[[min(len(path), 1) for path in paths]]


def test_cells_hold_the_whole_law() -> None:
    cells = Cells(_rows, 2, 1000, {2})
    assert sum(cells.law) == pytest.approx(1.0)
    found = {text: cells.law[cells.place(text)] for text in [(0, 0), (0, 1), (1, 1), (2,)]}
    assert found == pytest.approx({(0, 0): 0.45, (0, 1): 0.025, (1, 1): 0.015, (2,): 0.2})
    assert cells.place((0, 3)) == cells.place((3,)) == -1
    rounded = Cells(_rows, 2, 1000, {2}, exact=False)
    assert rounded.law == cells.law
    assert rounded.place((3,)) == len(rounded.law) - 1
    few = Cells(_rows, 2, 60, {2})
    assert sum(few.law) == pytest.approx(1.0)
    assert all(p * 60 >= 10 for p in few.law)


def _drawn(q: torch.Tensor, law: torch.Tensor, count: int, seed: int) -> Draft:
    """Chains of one token drawn from `law` that tell `q`. q: [V] or [count, V]."""
    generator = torch.Generator().manual_seed(seed)
    rows = law.expand(count, -1)
    tokens = torch.multinomial(rows, 1, generator=generator)
    tree = TokenTree(torch.cat((torch.zeros_like(tokens), tokens), 1), torch.tensor([[-1, 0]]).expand(count, 2), (2,) * count, True)
    told = q.expand(count, -1)[:, None]
    return Draft(tree, Law.INDEPENDENT, torch.cat((told, torch.zeros_like(told)), 1))


def test_draws_are_refused_exactly_when_they_are_not_of_their_law() -> None:
    generator = torch.Generator().manual_seed(1)
    laws = torch.rand(500, 9, generator=generator) ** 3
    laws /= laws.sum(1, keepdim=True)
    flatter = laws.sqrt() / laws.sqrt().sum(1, keepdim=True)
    smallest = []
    for seed in range(25):
        right, wrong = DraftTally(), DraftTally()
        right.add(_drawn(laws, laws, 500, seed))
        wrong.add(_drawn(laws, flatter, 500, seed))
        (fit,) = right.fits().values()
        assert not fit.refused
        smallest.append(fit.p)
        assert wrong.fits()[1].refused
    # Right laws give uniform p-values, unlike contexts or not.
    assert stats.kstest(smallest, "uniform").pvalue > 1e-3


def test_a_draw_that_its_law_does_not_hold_is_counted() -> None:
    tally = DraftTally()
    tally.add(_drawn(torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.4, 0.4, 0.2]), 100, 0))
    assert tally.impossible > 0
    assert tally.draws == 100


@pytest.mark.slow
def test_the_command_prints_a_verdict_and_a_document() -> None:
    few = ["--samples", "100", "--max-new-tokens", "4", "--top-k", "20"]
    lossy = CliRunner().invoke(
        app, ["certify", *few, "--verifier", "typical-lossy", "--check", "greedy", "--check", "law", "--json"]
    )
    assert lossy.exit_code == 1, lossy.output
    document = json.loads(lossy.stdout)
    assert not document["certified"]
    assert [(check["name"], check["verdict"]) for check in document["checks"]] == [("greedy", "pass"), ("law", "not applicable")]
    passed = CliRunner().invoke(app, ["certify", *few, "--check", "state"], env={"COLUMNS": "200"})
    assert passed.exit_code == 0, passed.output
    assert "certified: every check that applies passed" in passed.stdout


@pytest.mark.slow
def test_doctor_says_whether_a_pair_fits() -> None:
    fits = CliRunner().invoke(app, ["doctor", "--drafter", "bundled"], env={"COLUMNS": "200"})
    assert fits.exit_code == 0, fits.output
    assert "fits: draws chains" in fits.stdout
    assert "specdec tune" in fits.stdout
    wrong = CliRunner().invoke(app, ["doctor", "--drafter", "./no-such-draft"], env={"COLUMNS": "200"})
    assert wrong.exit_code == 1
    assert "no-such-draft" in wrong.stdout


def test_doctor_alone_says_what_is_here() -> None:
    done = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert torch.__version__ in done.stdout
    assert "sdpa" in done.stdout or "triton:" in done.stdout
    missing = CliRunner().invoke(app, ["doctor", "--target", "./no-such-target"], env={"COLUMNS": "200"})
    assert missing.exit_code == 1
    assert "no-such-target" in missing.stdout
