"""The scaling study: the law that made points is found again, and a small study is measured, fitted and drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from specdec.bench.records import read_results
from specdec.bench.scaling import DraftOf, Fit, Point, charts, draft_of, fit, main, sentence
from specdec.bundled import bundled_path
from specdec.errors import SpecDecError

APP = typer.Typer()
APP.command()(main)


def _grid(sizes: tuple[int, ...], tokens: tuple[float | None, ...], batches: tuple[int, ...] = (1,)) -> list[Point]:
    """Points of a law: 0.5 tokens for a tenfold of parameters, 0.2 for a tenfold of tokens, 0.3 less speedup a doubled batch."""
    found = []
    for batch in batches:
        for size in sizes:
            for count in tokens:
                length = 0.5 * math.log10(size) + 0.2 * math.log10(count or 1e6) - 2
                speedup = length - 0.3 * math.log2(batch)
                found.append(Point(f"{size} {count}", size, count, batch, length, speedup, None))
    return found


def test_a_fit_finds_the_law_that_made_the_points() -> None:
    points = _grid((10**6, 10**7, 10**8), (1e6, 1e8), (1, 2, 8))
    length, speedup = fit(points, "tokens_a_round"), fit(points, "speedup")
    assert length is not None
    assert speedup is not None
    assert length.axes == speedup.axes == ("parameters", "tokens", "batch")
    assert length.slopes == pytest.approx((0.5, 0.2, 0.0), abs=1e-9)
    assert speedup.slopes == pytest.approx((0.5, 0.2, -0.3), abs=1e-9)
    assert speedup.intercept == pytest.approx(-2)
    assert speedup.r2 == pytest.approx(1)
    assert speedup.at(Point("new", 10**9, 1e7, 4, None, None, None)) == pytest.approx(0.5 * 9 + 0.2 * 7 - 0.6 - 2)
    assert "+0.500" in sentence(speedup)
    assert "each doubling of batch" in sentence(speedup)


def test_a_fit_takes_the_axes_that_vary_and_nothing_else() -> None:
    only_size = fit(_grid((10**6, 10**7, 10**8), (1e6,)), "speedup")
    assert only_size is not None
    assert only_size.axes == ("parameters",)
    some_unknown = fit(_grid((10**6, 10**7, 10**8), (1e6, 1e7, None)), "speedup")
    assert some_unknown is not None
    assert some_unknown.points == 6
    assert fit(_grid((10**6,), (1e6,)), "speedup") is None
    assert fit(_grid((10**6, 10**7), (1e6,), (1,)), "fixed_speedup") is None
    # Size and tokens grow together, so nobody can tell which of them it was.
    together = [*_grid((10**6,), (1e6,)), *_grid((10**7,), (1e7,)), *_grid((10**8,), (1e8,)), *_grid((10**9,), (1e9,))]
    assert fit(together, "speedup") is None


def test_points_off_the_law_have_a_spread() -> None:
    points = _grid((10**6, 10**7, 10**8, 10**9), (1e6,))
    points[1] = Point("off", 10**7, 1e6, 1, 3.0, 3.0, None)
    own = fit(points, "speedup")
    assert own is not None
    assert own.r2 < 1
    assert own.errors[0] is not None
    assert own.errors[0] > 0.01


def test_charts_have_a_line_for_each_group_and_its_fit_and_only_axes_that_vary() -> None:
    points = _grid((10**6, 10**7, 10**8), (1e6,), (1, 4))
    fits = [own for own in (fit(points, name) for name in ("tokens_a_round", "speedup")) if own is not None]
    drawn = charts(points, fits)
    assert drawn.count("<figure>") == 4
    assert "against tokens" not in drawn
    assert "1 M tokens, batch 4: fit" in drawn
    assert "100 M parameters, 1 M tokens" in drawn
    assert charts(points[:1], ()).count("<figure>") == 0


def test_drafts_are_named_with_their_training_tokens() -> None:
    assert draft_of("small=some/path@2.5e6") == DraftOf("small", "some/path", 2.5e6)
    assert draft_of("small=bundled") == DraftOf("small", "bundled", None)
    for wrong in ("path", "=path@1", "a=@5", "a=path@many", "a=path@-1", "a=path@nan", "a=path@inf"):
        with pytest.raises(SpecDecError, match="NAME=PATH@TOKENS"):
            draft_of(wrong)


@pytest.mark.slow
def test_a_study_is_measured_fitted_drawn_and_gone_on_with(tmp_path: Path) -> None:
    asked = ["--out", str(tmp_path), "--draft", "one=bundled@1e6", "--draft", f"two={bundled_path('target')}@1e6"]
    more = ["--batch", "1", "--batch", "2", "--new", "6", "--repeats", "1", "--dtype", "float32"]
    done = CliRunner().invoke(APP, [*asked, *more], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    trials = (tmp_path / "trials.jsonl").read_text()
    study = json.loads((tmp_path / "scaling.json").read_text())
    assert [(p["draft"], p["batch"]) for p in study["points"]] == [(d, b) for b in (1, 2) for d in ("one", "two")]
    # The target drafts for itself, so all its tokens are accepted.
    one, two = (p["tokens_a_round"] for p in study["points"][:2])
    assert 1 <= one < two
    assert {f["figure"] for f in study["fits"]} == {"tokens_a_round", "speedup"}
    assert all(Fit(**f).axes == ["parameters", "batch"] for f in study["fits"])  # type: ignore[comparison-overlap]  # a list in JSON
    assert "<svg" in (tmp_path / "scaling.html").read_text()
    assert "R²" in (tmp_path / "scaling.md").read_text()
    results = read_results(tmp_path / "results.json")
    assert results.settings.target == "bundled"
    assert [info.drafter for info in results.methods if info.name.startswith("one")] == ["bundled:draft"] * 2
    CliRunner().invoke(APP, [*asked, *more], catch_exceptions=False)
    assert (tmp_path / "trials.jsonl").read_text() == trials
    with pytest.raises(SpecDecError, match="one name"):
        CliRunner().invoke(APP, [*asked, "--draft", "one=bundled"], catch_exceptions=False)
