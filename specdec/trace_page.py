"""The page of a trace: the text by where its tokens came from, each round's tree, times, and forecasts beside what came of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from specdec.bench.svg import COLOURS, Column, Line, columns, document, escape, figure, legend, lines, number, stacked, table
from specdec.trace import PHASES, Trace, TracedRound

# Token ids to text; one token alone may be part of a character.
Decode = Callable[[Sequence[int]], str]
# Tokens before one that may change how it is spelled.
_CONTEXT = 8
# Of a tree's drawing, in pixels: a node, the distance between nodes, and letters that fit a node.
_WIDE, _HIGH, _RIGHT, _DOWN, _LETTERS = 88, 24, 104, 32, 11
# Rounds that a point of the goodput chart is over.
_WINDOW = 8
# The colour of recovered, bonus and plain tokens in charts; drafters have the others.
_GREY = 6
_UNKNOWN = "�"
_VISIBLE = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}
_ABOUT = {
    "accepted": "accepted draft token",
    "recovered": "recovered token, where the target chose another than the draft",
    "bonus": "bonus token, behind a draft accepted to its end",
    "plain": "plain token, of a round without a draft",
}


def write_trace(trace: Trace, decode: Decode, path: Path, *, about: str = "") -> None:
    """Write one self-contained HTML file, readable without scripts. decode: the tokenizer's.  about: which models, for the top."""
    path.write_text(trace_page(trace, decode, about=about), encoding="utf-8")


def trace_page(trace: Trace, decode: Decode, *, about: str = "") -> str:
    """The page as text."""
    texts = _Texts(trace, decode)
    parts = [
        "<h1>A generation, round by round</h1>",
        _summary(trace, about),
        "<h2>The text</h2>",
        "<p>Point at a round, or move to it with the tab key, to see its tree; follow the link to find it in the list below.</p>",
        _legend(trace),
        f'<div class="sides"><div class="text">{_text(trace, texts)}</div>',
        '<aside id="panel" aria-label="The round pointed at" hidden></aside></div>',
        "<h2>The rounds</h2>",
        _strip(trace),
        f'<div class="grid2 wide">{_times(trace)}{_forecasts(trace)}</div>',
        "<h2>Every round</h2>",
        f'<div class="grid2 wide">{"".join(_article(trace, texts, i) for i in range(len(trace.rounds)))}</div>',
    ]
    return document("specdec trace", "".join(parts), style=_RULES, script=_SCRIPT)


class _Texts:
    """What tokens look like where they stand."""

    def __init__(self, trace: Trace, decode: Decode) -> None:
        self._decode = decode
        self.every = (*trace.prompt, *trace.tokens)
        self.ends: list[int] = []
        at = len(trace.prompt)
        for one in trace.rounds:
            self.ends.append(at)
            at += len(one.added)

    def piece(self, before: Sequence[int], token: int) -> str:
        """The text that a token adds; empty where it is only a part of a character."""
        context = list(before[-_CONTEXT:])
        old = self._decode(context).rstrip(_UNKNOWN) if context else ""
        return self._decode([*context, token]).rstrip(_UNKNOWN)[len(old) :]

    def pieces(self, start: int, count: int) -> list[str]:
        """Of tokens of the text."""
        return [self.piece(self.every[max(0, at - _CONTEXT) : at], self.every[at]) for at in range(start, start + count)]

    def nodes(self, one: TracedRound, index: int) -> list[str]:
        """Of every node of a round's tree, the root included, behind the path that it stands on."""
        end = self.ends[index]
        paths: list[tuple[int, ...]] = [self.every[max(0, end - 1 - _CONTEXT) : end - 1]]
        found = [self.piece(paths[0], one.tokens[0])]
        paths[0] = (*paths[0], one.tokens[0])
        for token, parent in zip(one.tokens[1:], one.parents[1:], strict=True):
            found.append(self.piece(paths[parent], token))
            paths.append((*paths[parent], token))
        return found


def visible(text: str) -> str:
    """Text whose blanks and control characters can be seen; a ring stands for a part of a character."""
    if not text:
        return "◌"
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def _summary(trace: Trace, about: str) -> str:
    rate = f", {number(len(trace.tokens) / trace.total_s, 1)} a second" if trace.total_s else ""
    share = f" ({trace.accepted / trace.drafted:.0%})" if trace.drafted else ""
    facts = {
        "models": about,
        "drafter": ", ".join(trace.drafters) or "none",
        "planner": trace.planner,
        "verifier": trace.verifier,
        "text": f"{len(trace.tokens)} tokens in {len(trace.rounds)} rounds{rate}",
        "mean acceptance length": f"{trace.mean_acceptance_length:.2f} tokens a round",
        "accepted": f"{trace.accepted} of {trace.drafted} drafted tokens{share}",
        "prompt": f"{len(trace.prompt)} tokens, read in {trace.prefill_s * 1e3:.1f} ms",
    }
    return '<dl class="facts">' + "".join(f"<dt>{k}</dt><dd>{escape(v)}</dd>" for k, v in facts.items() if v) + "</dl>"


def _colour(trace: Trace, one: TracedRound) -> int:
    """Of the drafter; the grey is kept for tokens that nobody drafted."""
    place = trace.drafters.index(one.drafter) if one.drafter in trace.drafters else 0
    return place + (place >= _GREY)


def _legend(trace: Trace) -> str:
    colours = {one.drafter: _colour(trace, one) for one in trace.rounds if one.drafted}
    items = ['<li><span class="prompt">prompt</span></li>']
    for name, colour in colours.items():
        items.append(
            f'<li><span class="token accepted" {_tint(colour)}>{_ABOUT["accepted"]}, {escape(name or "the drafter")}</span></li>'
        )
    kinds = dict.fromkeys(one.next_kind for one in trace.rounds)
    items += [f'<li><span class="token {kind}">{_ABOUT[kind]}</span></li>' for kind in _ABOUT if kind in kinds]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _tint(colour: int) -> str:
    return f'style="--own:var(--c{colour % COLOURS});--tint:var(--t{colour % COLOURS})"'


def _text(trace: Trace, texts: _Texts) -> str:
    parts = [f'<span class="prompt">{"".join(map(_shown, texts.pieces(0, len(trace.prompt))))}</span>']
    for index, one in enumerate(trace.rounds):
        tokens = []
        for i, piece in enumerate(texts.pieces(texts.ends[index], len(one.added))):
            kind = "accepted" if i < one.accepted else one.next_kind
            tokens.append(f'<span class="token {kind}">{_shown(piece)}</span>')
        parts.append(
            f'<a class="round" href="#round-{index + 1}" data-round="{index + 1}" aria-describedby="about-{index + 1}" '
            f"{_tint(_colour(trace, one))}>{''.join(tokens)}</a>"
        )
    return "".join(parts)


def _shown(piece: str) -> str:
    """A piece in running text: as it is where there is something to see, else made visible, with its line breaks kept."""
    if piece.strip() and all(c.isprintable() or c in "\n\t" for c in piece):
        return escape(piece)
    return f'<span class="blank">{escape(visible(piece))}</span>' + "\n" * piece.count("\n")


def _strip(trace: Trace) -> str:
    items = []
    for index, one in enumerate(trace.rounds):
        accepted = min(one.accepted, len(one.added))
        parts = (float(accepted), _colour(trace, one)), (float(len(one.added) - accepted), _GREY)
        items.append(Column(parts, f"round {index + 1}: {_outcome(one)}", f"#round-{index + 1}"))
    used = {one.drafter: _colour(trace, one) for one in trace.rounds if one.drafted}
    names = [f"accepted, {name or 'the drafter'}" for name in used]
    key = legend([*names, "recovered, bonus or plain"], [*used.values(), _GREY], shapes=False)
    return figure("Tokens of each round", key + columns("Tokens of each round", items, y="tokens"))


def _outcome(one: TracedRound) -> str:
    if not one.drafted:
        return "no draft, one plain token"
    last = f"one {one.next_kind} token" if one.next_token is not None else "and the text ended"
    return f"{one.drafted} drafted, {one.accepted} accepted, {last}"


def _times(trace: Trace) -> str:
    kinds = {"with a draft": [r for r in trace.rounds if r.drafted], "without a draft": [r for r in trace.rounds if not r.drafted]}
    rows = []
    for name, rounds in kinds.items():
        if rounds:
            means = [1e3 * sum(r.seconds[i] for r in rounds) / len(rounds) for i in range(len(PHASES))]
            rows.append((f"{name}, {len(rounds)} rounds", means))
    by_round = [
        Column(
            tuple([(1e3 * s, i) for i, s in enumerate(one.seconds)]),
            f"round {index + 1}: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in zip(PHASES, one.seconds, strict=True)),
        )
        for index, one in enumerate(trace.rounds)
    ]
    numbers = table("Mean time of a round, ms", ("rounds", *PHASES), [(name, *map(_ms, means)) for name, means in rows])
    chart = stacked("Mean time of a round by phase", rows, PHASES, unit=" ms", digits=2)
    return figure("Time of a round by phase", chart + columns("Time of every round", by_round, y="ms a round"), numbers=numbers)


def _ms(value: float) -> str:
    return number(value, 2)


def _forecasts(trace: Trace) -> str:
    """Goodput over trailing windows of rounds whose time was forecast."""
    known = [
        (i + 1, r, r.forecast) for i, r in enumerate(trace.rounds) if r.forecast is not None and math.isfinite(r.forecast.seconds)
    ]
    expected, realised = [], []
    for end in range(min(_WINDOW, len(known)), len(known) + 1):
        part = known[max(0, end - _WINDOW) : end]
        if not part:
            break
        at = float(part[-1][0])
        seconds = sum(forecast.seconds for _, _, forecast in part)
        if seconds > 0:
            expected.append((at, sum(forecast.tokens for _, _, forecast in part) / seconds))
            realised.append((at, sum(r.accepted + 1 for _, r, _ in part) / max(sum(r.total_s for _, r, _ in part), 1e-12)))
    title = "Goodput: what the planner expected and what came of it"
    if not expected:
        return figure(title, "<p>The planner made no forecasts.</p>")
    series = (Line("expected", tuple(expected), 0), Line("realised", tuple(realised), 1))
    rows = [(int(x), _ms(e), _ms(r)) for (x, e), (_, r) in zip(expected, realised, strict=True)]
    note = f"Tokens a second over {_WINDOW} rounds, of the rounds whose time was forecast."
    numbers = table("Tokens a second", ("up to round", "expected", "realised"), rows)
    return figure(title, lines(title, series, x="round", y="tokens a second"), note=note, numbers=numbers)


def _article(trace: Trace, texts: _Texts, index: int) -> str:
    """A round in the list. A script shows a copy of it beside the text."""
    one = trace.rounds[index]
    nodes = texts.nodes(one, index)
    added = texts.pieces(texts.ends[index], len(one.added))
    following = added[-1] if one.next_token is not None else None
    times = ", ".join(f"{name} {1e3 * s:.1f}" for name, s in zip(PHASES, one.seconds, strict=True))
    about = f"{one.drafter}: {_outcome(one)}" if one.drafter and one.drafted else _outcome(one)
    facts = [f"{1e3 * one.total_s:.1f} ms: {times}"]
    if one.forecast is not None and math.isfinite(one.forecast.seconds):
        expected = f"expected {one.forecast.tokens:.2f} tokens in {1e3 * one.forecast.seconds:.1f} ms ({one.forecast.why})"
        facts.append(f"{expected}, came {one.accepted + 1} in {1e3 * one.total_s:.1f} ms")
    said = "".join(f"<p>{escape(fact)}</p>" for fact in facts)
    return (
        f'<article id="round-{index + 1}" {_tint(_colour(trace, one))}><h3>Round {index + 1}</h3>'
        f'<p id="about-{index + 1}">{escape(about)}</p>{_tree(one, nodes, following)}{said}</article>'
    )


def _tree(one: TracedRound, nodes: list[str], following: str | None) -> str:
    """The tree from left to right, the accepted path first, and the next token where it joined. nodes: texts, root included."""
    texts, parents = list(nodes), list(one.parents)
    if following is not None:
        texts.append(following)
        parents.append(one.path[-1] if one.path else 0)
    extra = len(one.tokens)
    kept = {0, *one.path}
    children: list[list[int]] = [[] for _ in texts]
    for node, parent in enumerate(parents[1:], 1):
        children[parent].append(node)
    depth, row, rows = [0] * len(texts), [0] * len(texts), 0
    waiting = [(0, 0)]
    while waiting:
        node, level = waiting.pop()
        depth[node], row[node] = level, rows
        rows += not children[node]
        # Popped from the end: the accepted child first, the next token behind what was drafted.
        order = sorted(children[node], key=lambda child: (child not in kept, child == extra, child), reverse=True)
        waiting.extend((child, level + 1) for child in order)
    drawn = [_edge(depth[p], row[p], row[n], n in kept or n == extra) for n, p in enumerate(parents) if p >= 0]
    for node, text in enumerate(texts):
        kind = "root" if node == 0 else one.next_kind if node == extra else "accepted" if node in kept else "rejected"
        drawn.append(_node(depth[node], row[node], text, kind))
    width, height = max(depth) * _RIGHT + _WIDE + 4, (rows - 1) * _DOWN + _HIGH + 4
    label = f"Tree of {one.drafted} drafted tokens. Path: {', '.join(visible(texts[n]) for n in (0, *one.path))}" + (
        f". Then the {one.next_kind} token {visible(following)}" if following is not None else ""
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="tree"><svg class="tree" width="{width}" height="{height}" '
        f'viewBox="-2 -2 {width} {height}" role="img" aria-label="{escape(label)}">{"".join(drawn)}</svg></div>'
    )


def _edge(depth: int, top: int, bottom: int, kept: bool) -> str:
    x1, y1 = depth * _RIGHT + _WIDE, top * _DOWN + _HIGH / 2
    x2, y2 = (depth + 1) * _RIGHT, bottom * _DOWN + _HIGH / 2
    middle = (x1 + x2) / 2
    return f'<path class="edge{" kept" if kept else ""}" d="M{x1},{y1:g}C{middle:g},{y1:g} {middle:g},{y2:g} {x2},{y2:g}"/>'


def _node(depth: int, row: int, text: str, kind: str) -> str:
    full = visible(text)
    short = full if len(full) <= _LETTERS else full[: _LETTERS - 1] + "…"
    x, y, title = depth * _RIGHT, row * _DOWN, escape(f"{full} ({kind})")
    return (
        f'<g class="node {kind}"><title>{title}</title><rect x="{x}" y="{y}" width="{_WIDE}" height="{_HIGH}" rx="5"/>'
        f'<text text-anchor="middle" x="{x + _WIDE // 2}" y="{y + 16}">{escape(short)}</text></g>'
    )


_SCRIPT = """
const panel = document.getElementById("panel");
let now = "";
function show(round) {
  if (round === now) return;
  now = round;
  const article = document.getElementById("round-" + round);
  const copy = article.cloneNode(true);
  copy.removeAttribute("id");
  for (const part of copy.querySelectorAll("[id]")) part.removeAttribute("id");
  panel.replaceChildren(copy);
  panel.hidden = false;
  for (const link of document.querySelectorAll("a.round")) link.classList.toggle("on", link.dataset.round === round);
}
function point(event) {
  const link = event.target.closest("a[data-round]");
  if (link) show(link.dataset.round);
}
document.addEventListener("mouseover", point);
document.addEventListener("focusin", point);
if (document.getElementById("round-1")) show("1");
"""

_RULES = """
.text{white-space:pre-wrap;overflow-wrap:anywhere;font:15px/2 ui-monospace,Menlo,Consolas,monospace;min-width:0}
.prompt,.blank{color:var(--muted)}
a.round{color:inherit;text-decoration:none;border-radius:4px}
a.round.on{outline:2px solid var(--link);outline-offset:1px}
.token{padding:2px 0;border-bottom:2px solid transparent}
.token.accepted{background:var(--tint);border-bottom-color:var(--own)}
.token.recovered{border-bottom:2px dashed var(--c6)}
.token.bonus{border-bottom:3px double var(--c6)}
.sides{display:grid;grid-template-columns:minmax(0,1fr);gap:16px}
#panel{position:sticky;bottom:0;align-self:start;max-height:45vh;overflow:auto;background:var(--panel);border-radius:8px}
#panel[hidden]{display:none}
article{border:1px solid var(--line);border-radius:8px;padding:12px;margin-bottom:16px;min-width:0;font-size:.875rem}
#panel article{margin:0}
article:target{outline:2px solid var(--link)}
article p{margin:2px 0 6px}
.tree{display:block;margin:6px 0}
.tree text{font:12px ui-monospace,Menlo,Consolas,monospace}
.node rect{fill:var(--bg);stroke:var(--line);stroke-width:1.5}
.node.root rect{fill:var(--panel)}
.node.accepted rect{fill:var(--tint);stroke:var(--own);stroke-width:2}
.node.rejected rect{stroke:var(--muted);stroke-dasharray:2 3}
.node.rejected text{fill:var(--muted)}
.node.recovered rect,.node.bonus rect,.node.plain rect{stroke:var(--c6);stroke-width:2}
.node.recovered rect{stroke-dasharray:6 3}
.edge{fill:none;stroke:var(--line);stroke-width:1.5}
.edge.kept{stroke:var(--fg)}
@media(min-width:960px){.sides{grid-template-columns:minmax(0,1fr) 400px}#panel{top:12px;bottom:auto;max-height:90vh}}
"""
