"""The planner on recorded rounds: a recording is read as it was written, and no cell of the grid is slower than plain decoding."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from specdec.bench.never_slower import BATCHES, _agreed
from specdec.bench.opponents import Adversary, Watched
from specdec.bench.replay import LENGTHS, Recording, Times, fixed, played, replay
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.generator import SpeculativeGenerator
from specdec.goodput import GoodputPlanner
from specdec.planner import FixedPlanner
from tests.support_models import left_padded, noised, prompts, tiny_model
from tests.support_replay import text


def _recording(rates: dict[str, float]) -> Recording:
    """A machine on which rows cost, and texts that are accepted so often at each token."""
    rng = random.Random(0)
    times = tuple(
        Times(batch, tuple((1 + 0.08 * batch) * (1 + 0.05 * n) for n in LENGTHS), tuple(0.15 * n for n in LENGTHS))
        for batch in BATCHES
    )
    return Recording(times, {name: tuple(text(rng, rate) for _ in range(16)) for name, rate in rates.items()})


RECORDING = _recording({"good": 0.9, "fair": 0.6, "poor": 0.2, "none": 0.0})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", list(RECORDING.texts))
def test_no_cell_is_slower_than_plain_decoding(name: str, batch: int) -> None:
    lengths = fixed(RECORDING, name, batch, turns=2)
    ours = replay(RECORDING, name, batch, GoodputPlanner(), turns=2)
    assert ours.tokens == 2 * 16 * 128
    assert ours.goodput >= 0.97 * lengths[0]
    assert ours.goodput >= 0.85 * max(lengths.values())


def test_a_batch_that_waits_for_one_text_is_judged_by_that_text() -> None:
    """Rounds take about as long for one request as for eight; seven of eight texts are always accepted, and one never is."""
    times = tuple(Times(b, tuple(1 + 0.01 * b * (n + 1) for n in LENGTHS), tuple(0.1 * n for n in LENGTHS)) for b in (1, 8))
    texts = ("0" * 128, *("".join(str(min(8, 127 - place)) for place in range(128)) for _ in range(7)))
    recording = Recording(times, {"one lags": texts})
    lengths = fixed(recording, "one lags", 8, turns=12)
    assert max(lengths.values()) == lengths[0]
    assert lengths[2] < 0.9 * lengths[0]
    assert replay(recording, "one lags", 8, GoodputPlanner(), turns=12).goodput >= 0.95 * lengths[0]


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
def test_no_cell_recorded_on_a_real_machine_is_slower(batch: int) -> None:
    """Four drafters, two temperatures and three kinds of text with the bundled target on two cores."""
    recorded = Recording.read(Path(__file__).parent.parent / "bench" / "results" / "cpu" / "recorded.json")
    cells = {key: played(recorded, key, batch, 1024) for key in recorded.texts}
    assert len(cells) == 24
    assert not {key: cell for key, cell in cells.items() if cell["vs_plain"] < 0.97}
    assert sum(cell["vs_best_fixed"] for cell in cells.values()) / len(cells) >= 0.95


def test_a_replay_repeats_itself() -> None:
    runs = [replay(RECORDING, "fair", 4, GoodputPlanner()) for _ in range(2)]
    assert runs[0].rounds == runs[1].rounds


def test_plain_decoding_takes_what_was_recorded() -> None:
    plain = replay(RECORDING, "good", 4, FixedPlanner(nodes=0))
    assert plain.seconds == pytest.approx(4 * 128 * RECORDING.times[1].target[0])


def test_a_recording_is_read_as_it_was_written(tmp_path: Path) -> None:
    RECORDING.write(tmp_path / "rec.json")
    assert Recording.read(tmp_path / "rec.json") == RECORDING


def test_what_is_noted_is_what_a_fixed_length_accepts() -> None:
    target = tiny_model()
    drafter = DraftModelDrafter(noised(target, 0.05))
    inputs, new = left_padded(prompts((5, 9))), 40
    watched = Watched(drafter, 8)
    noting = SpeculativeGenerator(target, watched, planner=1)
    said = noting.generate(**inputs, max_new_tokens=new, do_sample=False)[:, -new:].tolist()
    texts = tuple(_agreed(tokens, length, own) for tokens, length, own in zip(said, (5, 9), watched.drafts, strict=True))
    real = SpeculativeGenerator(target, drafter, planner=3)
    assert real.generate(**inputs, max_new_tokens=new, do_sample=False)[:, -new:].tolist() == said
    times = (Times(2, tuple(1.0 + n for n in LENGTHS), tuple(map(float, LENGTHS))),)
    played = replay(Recording(times, {"x": texts}), "x", 2, FixedPlanner(nodes=3, depth=3))
    assert real.stats is not None
    assert [stats.accepted for stats in played.rounds] == [stats.accepted for stats in real.stats.history]
    assert 0 < real.stats.acceptance_rate < 1


def test_the_adversary_is_right_and_wrong_by_stretches_and_lossless() -> None:
    target = tiny_model()
    drafter = Adversary(DraftModelDrafter(target))
    inputs = left_padded(prompts((4,)))
    plain = SpeculativeGenerator(target).generate(**inputs, max_new_tokens=120, do_sample=False)
    generator = SpeculativeGenerator(target, drafter, planner=2)
    assert torch.equal(generator.generate(**inputs, max_new_tokens=120, do_sample=False), plain)
    assert generator.stats is not None
    accepted = [stats.accepted[0] for stats in generator.stats.history]
    assert accepted[:8] == [2] * 8
    assert accepted[12:60] == [0] * 48
