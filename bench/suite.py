"""The benchmark's run: every method on every prompt, interleaved; outputs are judged before their times count."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

import specdec
from specdec.bench.machine import machine
from specdec.bench.margin import Divergence, Margins, first_difference
from specdec.bench.measuring import disturbed_by
from specdec.bench.methods import Answer, Ask, Method
from specdec.bench.records import HF, PLAIN, Gate, Machine, MethodInfo, Results, Settings, Status, Trial, from_json
from specdec.bench.statistics import Cell, summarise, sums
from specdec.bench.timing import loaded_aside, rotation
from specdec.bench.workloads import Item, Prompts, items
from specdec.errors import SpecDecError

Tokens = tuple[tuple[int, ...], ...]


def run_suite(
    target: Any,
    methods: Sequence[Method],
    prompts: Prompts,
    settings: Settings,
    machine: Machine,
    *,
    store: Path,
    resume: bool,
    console: Console,
) -> Results:
    """Measure what the settings ask for, and report only methods whose outputs are right.

    store: JSONL that every timed call is added to as soon as it ends; with resume, what it holds is not measured again, except
    disturbed calls. Of several calls for one thing the least disturbed counts. A method whose output differs is refused: it has a
    gate with the reason, and neither rows nor trials. Raises SpecDecError.
    """
    kept = Store(store, _header(methods, prompts, settings, machine), resume=resume)
    run = _Run(target, methods, prompts, settings, kept)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("warm-up and gate", total=run.turns + len(run.cells))
        run.open(lambda: progress.advance(task))
        progress.update(task, description="decoding")
        run.measure(lambda: progress.advance(task))
    return run.results(machine)


def this_machine(command: str) -> Machine:
    """What the numbers are measured on. command: as the user typed it."""
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    return Machine(
        **machine(),
        memory_mib=page * pages / 2**20,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        specdec=specdec.__version__,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _header(methods: Sequence[Method], prompts: Prompts, settings: Settings, machine: Machine) -> dict[str, Any]:
    """What has to be the same for two parts of a run to be one run."""
    ids = json.dumps([(prompt.task, prompt.ids) for prompt in prompts.prompts])
    same = {name: getattr(machine, name) for name in ("cpu", "gpu", "threads", "torch", "transformers", "specdec", "commit")}
    chosen = {"methods": [asdict(method.info) for method in methods], "prompts": hashlib.sha256(ids.encode()).hexdigest()}
    found: dict[str, Any] = json.loads(json.dumps({"settings": asdict(settings), **chosen, **same}))
    return found


class Store:
    """Trials, their outputs and why these differ, in a JSONL file; its first line says what run they are of."""

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool) -> None:
        """Raises SpecDecError for a file that is there without resume, or is of another run."""
        self.path = path
        self.kept: list[tuple[Trial, Tokens]] = []
        self._explained: dict[str, Divergence | None] = {}
        if path.exists() and not resume:
            raise SpecDecError(f"{path} holds a run already; go on with it by --resume, or name another --output")
        if path.exists() and path.stat().st_size:
            self._read(header)
        else:
            path.write_text(json.dumps(header) + "\n", encoding="utf-8")

    def add(self, trial: Trial, tokens: Tokens) -> None:
        """Keep a trial; it is on disk when this returns."""
        self.kept.append((trial, tokens))
        self._write({"trial": asdict(trial), "tokens": tokens})

    def explained(self, margins: Margins, prompt: Sequence[int], ours: Sequence[int], theirs: Sequence[int]) -> Divergence | None:
        """What `Margins.explain` says; that of an earlier part of the run is kept, for it takes as long as the call did."""
        key = hashlib.sha256(json.dumps([prompt, ours, theirs]).encode()).hexdigest()[:32]
        if key not in self._explained:
            found = self._explained[key] = margins.explain(prompt, ours, theirs)
            self._write({"explained": key, "divergence": None if found is None else asdict(found)})
        return self._explained[key]

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _read(self, header: dict[str, Any]) -> None:
        text = self.path.read_text(encoding="utf-8")
        whole, _, torn = text.rpartition("\n")
        first, *lines = whole.split("\n")
        found = _parsed(first, self.path, 1)
        differs = sorted(name for name in header.keys() | found.keys() if header.get(name) != found.get(name))
        if differs:
            raise SpecDecError(f"{self.path} is of another run: {', '.join(differs)} differ; name another --output")
        for number, line in enumerate(lines, 2):
            entry, where = _parsed(line, self.path, number), f"{self.path}, line {number}"
            if "explained" in entry:
                self._explained[entry["explained"]] = from_json(Divergence | None, entry.get("divergence"), where)
                continue
            trial = from_json(Trial, entry.get("trial"), where)
            self.kept.append((trial, tuple(map(tuple, entry.get("tokens", ())))))
        if torn:
            # The line that an interruption cut short was of a call that is measured again.
            self.path.write_text(whole + "\n", encoding="utf-8")


def _parsed(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise SpecDecError(f"{path}, line {number}, is not JSON ({error}); name another --output") from error
    if not isinstance(found, dict):
        raise SpecDecError(f"{path}, line {number}, is no object; name another --output")
    return found


@dataclass
class _Tally:
    """What the gate has seen of a method in a cell."""

    checked: int = 0
    exact: int = 0
    within: int = 0
    refused: str = ""
    note: str = ""
    places: dict[tuple[int, Tokens], tuple[int, int, str]] = field(default_factory=dict)

    @property
    def status(self) -> Status:
        if self.refused:
            return "refused"
        if not self.checked:
            return "unchecked"
        return "within" if self.within else "exact"


def _speculates(info: MethodInfo) -> bool:
    """In our own runtime."""
    return info.family in ("drafter", "synthetic")


class _Judge:
    """Compares outputs: plain decoding and other runtimes with `model.generate`, drafters with plain decoding."""

    def __init__(self, target: Any, infos: Sequence[MethodInfo], store: Store) -> None:
        self._margins, self._store, self._infos = Margins(target), store, {info.name: info for info in infos}
        self._half = target.dtype in (torch.bfloat16, torch.float16)
        self._references: dict[tuple[Cell, int, str], Tokens] = {}
        self.tallies: dict[tuple[str, Cell], _Tally] = {}

    def tally(self, name: str, cell: Cell) -> _Tally:
        return self.tallies.setdefault((name, cell), _Tally())

    def judge(self, cell: Cell, item: Item, outputs: dict[str, Tokens]) -> None:
        """Take in what methods said to one item."""
        for base in (HF, PLAIN):
            if base in outputs:
                self._references.setdefault((cell, item.number, base), outputs[base])
        for name in sorted(outputs, key=lambda n: _speculates(self._infos[n])):
            self._one(name, cell, item, outputs[name])

    def _one(self, name: str, cell: Cell, item: Item, said: Tokens) -> None:
        info, tally = self._infos[name], self.tally(name, cell)
        base = PLAIN if _speculates(info) else HF
        if cell[1] and base == HF:
            tally.note = "sampled by another stream of random numbers, so there is nothing to compare with"
            return
        reference = self._references.get((cell, item.number, base))
        if reference is None or (name != base and self.tally(base, cell).refused):
            tally.refused = tally.refused or f"{base}, which it is compared with, did not pass"
            return
        if (item.number, said) not in tally.places:
            tally.places[item.number, said] = self._compared(info, cell, item, said, reference)
        exact, within, refused = tally.places[item.number, said]
        tally.checked, tally.exact, tally.within = tally.checked + len(said), tally.exact + exact, tally.within + within
        tally.refused = tally.refused or refused

    def _compared(self, info: MethodInfo, cell: Cell, item: Item, said: Tokens, reference: Tokens) -> tuple[int, int, str]:
        """How many requests are the same, how many differ by rounding, and the first other difference in words."""
        exact, within, refused = 0, 0, ""
        # The same runtime adds in the same order in fp32; transformers' own kernels do not.
        excusable = not cell[1] and (self._half or not _speculates(info))
        for prompt, ours, theirs in zip(item.prompts, said, reference, strict=True):
            if ours == theirs:
                exact += 1
                continue
            found = self._store.explained(self._margins, prompt.ids, ours, theirs) if excusable else None
            if found is not None and found.within:
                within += 1
                continue
            place = first_difference(ours, theirs)
            where = f"{prompt.task}, line {prompt.line} of {prompt.source}"
            what = f"{len(ours)} tokens, not {len(theirs)}" if place is None else f"another token at place {place + 1}"
            gap = "" if found is None else f"; the logits are {found.gap:.3g} apart, rounding explains {found.noise:.3g}"
            refused = refused or f"{where}: {what}{gap}"
        return exact, within, refused


class _Run:
    """The state of a run."""

    def __init__(self, target: Any, methods: Sequence[Method], prompts: Prompts, settings: Settings, store: Store) -> None:
        self.methods = {method.info.name: method for method in methods}
        self.prompts, self.settings, self.store = prompts, settings, store
        self.cells = [(batch, temperature) for batch in settings.batches for temperature in settings.temperatures]
        self.items = {batch: items(prompts.prompts, batch) for batch in settings.batches}
        self.judge = _Judge(target, [method.info for method in methods], store)
        self.turns = settings.repeats * sum(len(self.items[batch]) for batch, _ in self.cells)

    def open(self, advance: Callable[[], None]) -> None:
        """Warm every method up on the first prompts of each cell, and refuse those that say something else already."""
        for cell in self.cells:
            item = self.items[cell[0]][0]
            outputs = {name: self._asked(name, cell, item).tokens for name in self._active(cell)}
            self.judge.judge(cell, item, outputs)
            advance()

    def measure(self, advance: Callable[[], None]) -> None:
        """Time every method on every item, all methods on an item before the next, in rotating order."""
        done = {_key(trial): (trial, tokens) for trial, tokens in self.store.kept}
        turn = 0
        with loaded_aside():
            for repeat, cell in product(range(self.settings.repeats), self.cells):
                for item in self.items[cell[0]]:
                    self._turn(cell, item, repeat, turn, done)
                    turn += 1
                    advance()

    def _turn(self, cell: Cell, item: Item, repeat: int, turn: int, done: dict[Any, tuple[Trial, Tokens]]) -> None:
        """What an earlier part of the run measured is judged here too, and so are calls whose times do not count."""
        outputs: dict[str, Tokens] = {}
        others: list[tuple[str, Tokens]] = []
        for name in rotation(self._active(cell), turn):
            trial, tokens = done.get((name, *cell, item.number, repeat), (None, ()))
            if trial is not None and not disturbed_by(trial.stolen):
                outputs[name] = tokens
                continue
            others += [(name, tokens)] if trial is not None else []
            answer, *rest = self._timed(name, cell, item)
            self.store.add(trial_of(name, cell, item, repeat, answer), answer.tokens)
            outputs[name] = answer.tokens
            others += [(name, other.tokens) for other in rest]
        self.judge.judge(cell, item, outputs)
        for name, tokens in others:
            self.judge.judge(cell, item, {name: tokens})

    def _active(self, cell: Cell) -> list[str]:
        """Methods that can run there and were not refused."""
        able = [name for name, method in self.methods.items() if not method.why_not(*cell)]
        return [name for name in able if not self.judge.tally(name, cell).refused]

    def _timed(self, name: str, cell: Cell, item: Item) -> list[Answer]:
        """A call, and once more if it was disturbed; the one that lost less to others is first, whichever was faster."""
        answers = [self._asked(name, cell, item)]
        if disturbed_by(answers[0].stolen):
            answers.append(self._asked(name, cell, item))
        return sorted(answers, key=lambda answer: answer.stolen or 0.0)

    def _asked(self, name: str, cell: Cell, item: Item) -> Answer:
        return self.methods[name].run(Ask(item.ids, self.settings.max_new_tokens, cell[1], self.settings.seed + item.number))

    def results(self, machine: Machine) -> Results:
        """Everything that was measured; refused methods without their times."""
        gates = tuple(self._gate(name, cell) for cell in self.cells for name in self.methods)
        passed = {(gate.method, gate.batch, gate.temperature) for gate in gates if gate.counts}
        best: dict[Any, Trial] = {}
        for trial, _ in self.store.kept:
            found = best.get(_key(trial))
            best[_key(trial)] = trial if found is None or (trial.stolen or 0.0) < (found.stolen or 0.0) else found
        trials = tuple(t for t in best.values() if (t.method, t.batch, t.temperature) in passed)
        infos = tuple(method.info for method in self.methods.values())
        rows = summarise(trials, gates, self.settings)
        return Results(machine, self.settings, self.prompts.workloads, self.prompts.refused, infos, gates, rows, trials)

    def _gate(self, name: str, cell: Cell) -> Gate:
        unable = self.methods[name].why_not(*cell)
        if unable:
            return Gate(name, *cell, "unavailable", 0, 0, 0, unable)
        tally = self.judge.tally(name, cell)
        note = "differs only where rounding explains it" if tally.status == "within" else tally.note
        return Gate(name, *cell, tally.status, tally.checked, tally.exact, tally.within, tally.refused or note)


def _key(trial: Trial) -> tuple[Any, ...]:
    """What one call is of."""
    return trial.method, trial.batch, trial.temperature, trial.item, trial.repeat


def trial_of(name: str, cell: Cell, item: Item, repeat: int, answer: Answer) -> Trial:
    """A trial from what a method answered."""
    return Trial(
        method=name,
        task=item.task,
        item=item.number,
        batch=cell[0],
        temperature=cell[1],
        repeat=repeat,
        prompt_tokens=tuple(map(len, item.ids)),
        num_tokens=sum(map(len, answer.tokens)),
        decode_tokens=answer.decode_tokens,
        seconds=answer.seconds,
        prefill_s=answer.prefill_s,
        forwards=answer.forwards,
        peak_mib=answer.peak_mib,
        energy_j=answer.energy_j,
        stolen=answer.stolen,
        **({} if answer.stats is None else _told(answer.stats)),
    )


def _told(stats: Any) -> dict[str, Any]:
    """What speculation did, for a `Trial`. stats: of the call."""
    known = [r for r in stats.history if r.forecast is not None and r.forecast.seconds < float("inf")]
    return {
        "request_rounds": sum(own.rounds for own in stats.requests),
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "lengths": tuple(own.mean_acceptance_length for own in stats.requests),
        "accepted_at": sums([own.accepted_at for own in stats.requests]),
        "reached_at": sums([own.reached_at for own in stats.requests]),
        "draft_s": stats.draft_s,
        "target_s": stats.target_s,
        "verify_s": stats.verify_s,
        "other_s": stats.other_s,
        "forward_s": stats.forward_s,
        "expected_tokens": sum(r.forecast.tokens for r in known),
        "expected_s": sum(r.forecast.seconds for r in known),
        "realised_tokens": float(sum(len(r.requests) + sum(r.accepted) for r in known)),
        "realised_s": sum(r.seconds for r in known),
    }
