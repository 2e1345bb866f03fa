"""The two pages: whole, without the network, readable, and honest about what has no number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from specdec.bench.page import page, write_page
from specdec.bench.records import (
    Gate,
    Interval,
    Machine,
    MethodInfo,
    RefusedPrompt,
    Results,
    Row,
    Settings,
    Workload,
)
from specdec.bench.svg import Bar, Column, Line, bars, columns, lines, number, stacked, table
from specdec.trace import Trace, TracedRound
from specdec.trace_page import trace_page, visible, write_trace
from specdec.types import Forecast

VOID = {"meta", "link", "br", "img", "input", "hr"}
NASTY = '<b onclick="x">&amp;'


class _Page(HTMLParser):
    """What is in a page; fails on tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.seen: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            if name == "href":
                self.links.append(str(value))
            assert not name.startswith("on")
            assert name != "src"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def _row(method: str, batch: int = 1, scope: str = "all", name: str = "all", speed: float = 1.5) -> Row:
    ratio = Interval(speed, speed - 0.1, speed + 0.1)
    row = Row(scope, name, method, batch, 0.0, 4, Interval(40 * speed, 30.0, 80.0), ratio, ratio, ratio, 0.1, 50.0, 1.9)
    if method in ("plain", "HF generate"):
        return row
    return replace(
        row,
        acceptance_length=2.25,
        acceptance_length_by_request=2.5,
        acceptance_rate=0.5,
        per_position=(0.75, 0.5),
        draft_share=0.2,
        overhead_share=0.05,
        draft_ms=4.0,
        target_ms=11.5,
        verify_ms=0.5,
        other_ms=0.25,
        expected_tokens_per_s=88.0,
        realised_tokens_per_s=80.0,
        peak_mib=900.0,
    )


def _results() -> Results:
    names = ("HF generate", "plain", "suffix", "wrong")
    methods = tuple(MethodInfo(name, "drafter", f"about {name} {NASTY}", weights_mib=4.0 * i) for i, name in enumerate(names))
    rows = [_row(name, batch, speed=1.0 + i / 4) for i, name in enumerate(names[:3]) for batch in (1, 4)]
    rows += [_row(name, 1, "task", "story", 1.0 + i / 2) for i, name in enumerate(names[:3])]
    return Results(
        Machine(
            "a cpu",
            2,
            2,
            8192.0,
            None,
            "Linux",
            "3.11",
            "2.13",
            "5.23",
            "0.1.0",
            "abc1234",
            "specdec bench run --quick",
            "2026-01-01",
        ),
        Settings("bundled", "float32", (1, 4), (0.0,), 48, 3, 0, trained_length=None),
        (Workload("story", "built-in", "Apache-2.0", 4, 1, 321),),
        (RefusedPrompt("story", "built-in", 7, 4096, "longer than the model"),),
        methods,
        (Gate("suffix", 1, 0.0, "exact", 4, 4, 0), Gate("wrong", 1, 0.0, "refused", 4, 1, 0, "differs at token 7")),
        tuple(rows),
        (),
    )


def _trace() -> Trace:
    forecast = Forecast("plan", 2.0, 0.01)
    first = Forecast("first", 1.0, float("inf"))
    times = (0.002, 0.006, 0.001, 0.0005)
    rounds = (
        TracedRound((3,), (-1,), (), (4,), "suffix", first, times),
        TracedRound((4, 5, 6, 7), (-1, 0, 0, 2), (2, 3), (6, 7, 0), "suffix", forecast, times),
        TracedRound((0, 8, 9), (-1, 0, 1), (1,), (8, 1), "model", forecast, times),
        TracedRound((1, 2, 3), (-1, 0, 1), (1, 2), (2,), "model", forecast, times),
    )
    return Trace((2, 3), (4, 6, 7, 0, 8, 1, 2), rounds, 0.01, ("suffix", "model"), "GoodputPlanner", "auto")


WORDS = ("\n", " ", " two", " three", f" {NASTY}", " five", " six", "\t", " eight", " nine")


def _decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


PAGES = {"benchmark": lambda: page(_results()), "trace": lambda: trace_page(_trace(), _decode, about=NASTY)}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_asks_for_nothing_from_outside(name: str) -> None:
    text = PAGES[name]()
    found = _Page(text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert "default-src 'none'" in text
    assert all(link == "data:," or (link.startswith("#") and link[1:] in found.ids) for link in found.links)
    assert {"main", "h1", "h2", "svg"} <= set(found.seen)


@pytest.mark.parametrize("name", PAGES)
def test_text_of_others_is_escaped(name: str) -> None:
    assert "b" not in _Page(PAGES[name]()).seen
    assert NASTY in _Page(PAGES[name]()).text


def _luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(d * 2 for d in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_contrast(theme: int) -> None:
    """WCAG 2: text 4.5, marks 3."""
    block = re.findall(r":root\{(.*?)\}", page(_results()))[theme]
    colours = dict(re.findall(r"--(\w+):#(\w+)", block))
    tints = [colours[name] for name in colours if re.fullmatch(r"t\d", name)]
    marks = [colours[name] for name in colours if re.fullmatch(r"c\d", name)]
    assert len(tints) == len(marks) == 8
    for back in (colours["bg"], colours["panel"]):
        assert min(_contrast(colours[text], back) for text in ("fg", "muted", "link")) >= 4.5
        assert min(_contrast(mark, back) for mark in marks) >= 3
    assert min(_contrast(colours[text], tint) for tint in tints for text in ("fg", "muted")) >= 4.5


def test_the_benchmark_page_tells_all_of_a_run(tmp_path: Path) -> None:
    write_page(_results(), tmp_path / "report.html")
    text = _Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    for part in ("a cpu", "abc1234", "specdec bench run --quick", "torch 2.13", "Apache-2.0", "longer than the model", "4096"):
        assert part in text
    for heading in (
        "Speedup against batch size",
        "Acceptance by position",
        "Time of a round by phase",
        "Goodput",
        "Memory against speed",
    ):
        assert heading in text
    assert "1.50× (1.40 to 1.60)" in text
    assert "suffix is fastest" in text


def test_a_refused_method_has_its_reason_and_no_number() -> None:
    found = _Page(page(_results())).text
    assert "wrong, batch 1, temperature 0 was refused: differs at token 7" in found
    assert not re.search(r"wrong[^a-z]*×", found)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(1.1, 1.3, "suffix is fastest"), (0.9, 1.3, "no method is clearly faster"), (0.8, 0.9, "no method is faster than plain")],
)
def test_the_verdict_goes_no_further_than_the_interval(low: float, high: float, said: str) -> None:
    row = replace(_row("suffix"), vs_plain=Interval((low + high) / 2, low, high))
    results = replace(_results(), rows=(row,), settings=replace(_results().settings, batches=(1,)))
    assert said in _Page(page(results)).text


def test_a_run_without_any_row_still_has_a_page() -> None:
    empty = replace(_results(), rows=(), workloads=(), refused_prompts=(), complete=False)
    text = _Page(page(empty)).text
    assert "no method besides the bases has a speed" in text
    assert "not complete" in text


def test_the_trace_page_shows_every_round_and_token(tmp_path: Path) -> None:
    write_trace(_trace(), _decode, tmp_path / "trace.html")
    source = (tmp_path / "trace.html").read_text(encoding="utf-8")
    found = _Page(source)
    assert {f"round-{i}" for i in range(1, 5)} <= set(found.ids)
    assert {f"#round-{i}" for i in range(1, 5)} <= set(found.links)
    for part in (
        "accepted draft token, suffix",
        "accepted draft token, model",
        "recovered",
        "bonus",
        "plain token",
        "expected 2.00 tokens in 10.0 ms",
    ):
        assert part in found.text
    assert source.count('class="token accepted"') == 4 + 2
    assert "2 drafted, 2 accepted, and the text ended" in found.text
    assert "inf" not in found.text


def test_pieces_are_the_text_and_blanks_are_seen() -> None:
    source = trace_page(_trace(), _decode)
    body = re.sub(r"<[^>]+>", "", source[source.index('<div class="text">') : source.index("<aside")])
    assert "two three" in body
    assert "↵\n" in body
    assert "·" in body
    assert visible(" a\n\t\x07") == "·a↵⇥\\x07"
    assert visible("") == "◌"


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    parts = "aé".encode()

    def decode(tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")

    rounds = tuple(TracedRound((last,), (-1,), (), (new,), "", None, (0.0, 0.0, 0.0, 0.0)) for last, new in pairwise(parts))
    source = trace_page(Trace((parts[0],), tuple(parts[1:]), rounds, 0.0, (), "FixedPlanner", "auto"), decode)
    body = re.sub(r"<[^>]+>", "", source[source.index('<div class="text">') : source.index("<aside")])
    assert body == "a◌é"


def test_a_trace_without_rounds_has_a_page() -> None:
    assert "0 tokens in 0 rounds" in _Page(trace_page(Trace((2,), (), (), 0.0, (), "FixedPlanner", "auto"), _decode)).text


def test_bars_end_where_their_values_say() -> None:
    text = bars("t", [Bar("one", 2.0, 1.0, 4.0), Bar("two", 1.0), Bar("none", None, note="refused")], reference=1.0)
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)%"', text)]
    assert widths[0] == pytest.approx(2 * widths[1], rel=1e-3)
    assert "refused" in text
    assert "2.00 (1.00 to 4.00)" in text
    assert len(widths) == 2


def test_stacked_parts_add_up_and_columns_lead_somewhere() -> None:
    text = stacked("t", [("a", (1.0, 3.0)), ("b", (2.0, 0.0))], ("x", "y"), unit=" ms")
    widths = [float(w) for w in re.findall(r'<rect[^>]* width="([\d.]+)%"', text)]
    assert widths[0] + widths[1] == pytest.approx(2 * (widths[2] + widths[3]), rel=1e-3)
    assert "4.0 ms" in text
    assert 'href="#a"' in columns("t", [Column(((1.0, 0),), "tip", "#a")], y="tokens")


def test_points_stand_at_their_values() -> None:
    text = lines("t", [Line("a", ((1.0, 1.0), (2.0, 3.0))), Line("b", ((4.0, 2.0),), 1)], x="x", y="y")
    places = [(float(x), float(y)) for x, y in re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)" class="mark"', text)]
    (x1, y1), (x2, y2), (x3, y3) = places
    assert x1 < x2 < x3
    assert y2 < y3 < y1
    assert y1 - y3 == pytest.approx(y3 - y2, abs=0.2)


def test_numbers_and_tables() -> None:
    assert [number(12345.678, 1), number(-0.001), number(-1.5)] == ["12,345.7", "0.00", "-1.50"]
    text = table("title", ("name", "value", "why"), [(NASTY, 3, "because")], words=(2,))
    assert '<td class="n">3</td>' in text
    assert '<td class="w">because</td>' in text
    assert NASTY not in text
