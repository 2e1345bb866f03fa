"""`specdec bench`: measure drafters on a machine, compare two runs, advise, and write the reports."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from specdec.bench.advise import Advice, advise
from specdec.bench.against import Judged, Plan, Side, checkout, run_against, working_tree
from specdec.bench.compare import MARGIN, Report, Verdict, compare, whole
from specdec.bench.markdown import markdown
from specdec.bench.methods import ASSISTED, COMPILED, LOOKUP, STATIC, Method, NamedDrafter, Selection, make_methods
from specdec.bench.page import write_page
from specdec.bench.peers import ENGINES, peer
from specdec.bench.records import ALL, HF, PLAIN, Interval, Results, Settings, read_results, write_results
from specdec.bench.suite import run_suite, this_machine
from specdec.bench.synthetic import synthetic_methods
from specdec.bench.workloads import QUICK, Choice, Prompts, load_prompts
from specdec.bundled import BUNDLED, Role, bundled_path, checkpoint
from specdec.drafters.draft_model import DraftModelDrafter
from specdec.drafters.registry import FACTORIES, load_drafter
from specdec.errors import SpecDecError
from specdec.loading import load_model, need_tokenizer

_LABELS: dict[Role, str] = {"draft": "draft model", "medusa": "Medusa", "pard": "PARD"}
# What is tried where nobody says: those that fit any target, and those made for the bundled one.
_ANYWHERE, _BUNDLED = ("suffix", "prompt-lookup"), ("draft", "medusa", "pard", "suffix")
# The bundled target's model card names the length that it was trained at.
_BUNDLED_LENGTH = 256


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """The command's options; None is what `run_bench` says. drafters: names, paths, or NAME=PATH.  output: a folder.

    dtypes: of the target; with several, a run of each in a folder of its own.  prompts: files, or hub datasets at a commit.
    compiled: the baseline that takes a minute to compile.  synthetic: acceptance rates to imitate.  peers: engines, NAME=MODEL.
    """

    quick: bool = False
    target: str = BUNDLED
    drafters: tuple[str, ...] = ()
    prompts: tuple[Path, ...] = ()
    workloads: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1,)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int | None = None
    repeats: int | None = None
    per_task: int | None = None
    longest: int | None = None
    trained_length: int | None = None
    dtypes: tuple[str, ...] = ()
    planner: str | None = None
    verifier: str = "auto"
    seed: int = 0
    output: Path | None = None
    resume: bool = False
    command: str = ""
    compiled: bool | None = None
    synthetic: tuple[float, ...] = ()
    peers: tuple[str, ...] = ()


def run_bench(options: BenchOptions, console: Console) -> bool:
    """Measure, write results.json, report.md and report.html, and show the table; False when a method was refused.

    128 new tokens and 3 repeats by default, 48 and 3 with quick, which takes five built-in prompts. With several dtypes each has
    its own folder in the output. Raises SpecDecError.
    """
    if options.resume and options.output is None:
        raise SpecDecError("--resume needs --output, the folder of the run to go on with")
    folder = options.output or Path(f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}")
    dtypes = tuple(dict.fromkeys(options.dtypes)) or (None,)
    several = len(dtypes) > 1
    try:
        passed = [_run_one(options, dtype, folder / str(dtype) if several else folder, console) for dtype in dtypes]
    except KeyboardInterrupt:
        console.print(f"nothing measured is lost: go on with --output {escape(str(folder))} --resume", highlight=False)
        raise
    return all(passed)


def _run_one(options: BenchOptions, dtype: str | None, folder: Path, console: Console) -> bool:
    path = checkpoint(options.target, "target")
    target, tokenizer = _loaded(path, dtype)
    prompts = _prompts(options, target, tokenizer)
    methods = _methods(options, target, path)
    folder.mkdir(parents=True, exist_ok=True)
    settings, here, store = _settings(options, target), this_machine(options.command), folder / "trials.jsonl"
    results = run_suite(target, methods, prompts, settings, here, store=store, resume=options.resume, console=console)
    write_results(results, folder / "results.json")
    _show(results, console)
    write_reports(results, folder, console)
    return not any(gate.status == "refused" for gate in results.gates)


def write_reports(results: Results, folder: Path, console: Console) -> None:
    """report.md and report.html."""
    (folder / "report.md").write_text(markdown(results), encoding="utf-8")
    write_page(results, folder / "report.html")
    console.print(f"in {escape(str(folder))}: report.md, report.html", highlight=False)


def run_compare(before: Path, after: Path, margin: float, console: Console) -> Report:
    """Compare two runs and show the verdict of each method. Raises SpecDecError."""
    report = compare(read_results(_file(before)), read_results(_file(after)), margin=margin)
    for note in (*report.notes, *report.missing):
        console.print(f"note: {escape(note)}", highlight=False)
    table = Table(title=f"{after} against {before}, by the ratio to plain decoding", title_justify="left")
    for heading in ("method", "batch", "temperature", "before", "after", "change", "verdict", "would find", "prompts"):
        table.add_column(heading, justify="left" if heading in ("method", "verdict") else "right")
    for own in report.comparisons:
        seen = "" if own.resolution is None else f"{own.resolution - 1:.1%}"
        cells = (str(own.batch), f"{own.temperature:g}", f"{own.before:.3f}", f"{own.after:.3f}", _interval(own.ratio, 3))
        table.add_row(own.method, *cells, own.verdict, seen, str(own.items))
    console.print(table)
    console.print(f"verdict: {report.verdict}", highlight=False)
    return report


@dataclass(frozen=True, slots=True)
class AgainstOptions:
    """Of `compare --against`. reference: a commit, tag or branch.  drafters: as in `BenchOptions`, beside plain decoding.

    threads: of each side; with several, any other work on the machine stalls them all.
    """

    reference: str
    target: str = BUNDLED
    drafters: tuple[str, ...] = ("draft",)
    margin: float = MARGIN
    seconds: float = 120.0
    max_new_tokens: int = 24
    starts: int = 2
    dtype: str | None = None
    planner: str | None = None
    threads: int = 1


def run_compare_against(options: AgainstOptions, console: Console) -> Verdict:
    """Compare the working tree with another commit, interleaved, and show the verdict of each method. Raises SpecDecError."""
    root = working_tree()
    methods: dict[str, str | None] = {PLAIN: None}
    for text in options.drafters:
        named = _named(text)
        _check_free(text, named.label, named.source, methods)
        methods[named.label] = named.said
    plan = Plan(
        target=checkpoint(options.target, "target"),
        methods=methods,
        prompts=_short_prompts(options),
        new=options.max_new_tokens,
        seconds=options.seconds,
        starts=options.starts,
        dtype=options.dtype,
        planner=options.planner,
        threads=options.threads,
    )
    with checkout(root, options.reference) as folder, Progress(console=console, transient=True) as progress:
        task = progress.add_task("both in turns", total=1.0)
        sides = Side(options.reference, folder), Side("working tree", root)
        found = run_against(*sides, plan, margin=options.margin, advance=lambda part: progress.update(task, completed=part))
    _show_against(options.reference, found, console)
    return whole([own.verdict for own in found])


def compare_command(
    before: Path | None, after: Path | None, against: AgainstOptions | None, margin: float, console: Console
) -> Verdict:
    """Compare two runs, or the working tree with a commit. Raises SpecDecError for both and for neither."""
    if against is not None and before is None:
        return run_compare_against(against, console)
    if against is not None or before is None or after is None:
        raise SpecDecError("give two runs to compare, or --against and a commit without any")
    return run_compare(before, after, margin, console).verdict


def _short_prompts(options: AgainstOptions) -> tuple[tuple[int, ...], ...]:
    tokenizer = need_tokenizer(checkpoint(options.target, "target"))
    return tuple(prompt.ids for prompt in load_prompts(QUICK, tokenizer, None, options.max_new_tokens).prompts)


@dataclass(frozen=True, slots=True)
class _Named:
    """One --drafter. label: of its rows.  source: a name, a role of the bundled models, or a path.  role: None where it is none."""

    label: str
    source: str
    role: Role | None

    @property
    def said(self) -> str:
        """What a report calls it, and each of two checkouts loads: its own bundled one, or the same name or path."""
        return self.source if self.role is None else f"{BUNDLED}:{self.role}"


def _named(text: str) -> _Named:
    """What was asked for as SOURCE or NAME=SOURCE."""
    name, named, source = text.partition("=")
    source = source if named else name
    role = next((role for role in _LABELS if role == source), None)
    own = Path(source).name if role is None else _LABELS[role]
    return _Named(name if named else own, source, role)


def _show_against(reference: str, found: Sequence[Judged], console: Console) -> None:
    table = Table(title=f"working tree against {reference}, in turns", title_justify="left")
    for heading in ("method", "before, tokens/s", "after", "change", "verdict", "would find", "pairs"):
        table.add_column(heading, justify="left" if heading in ("method", "verdict") else "right")
    for own in found:
        seen = "" if own.resolution is None else f"{own.resolution - 1:.1%}"
        cells = f"{own.before:.1f}", f"{own.after:.1f}", _interval(own.ratio, 3), own.verdict, seen, str(own.pairs)
        table.add_row(escape(own.method), *cells)
    console.print(table)
    for own in found:
        if own.reason:
            console.print(f"[bold red]refused[/]: {escape(own.method)}: {escape(own.reason)}", highlight=False)
    if any(own.clock == "processor" for own in found):
        console.print(
            "the host gave much to other guests, so processor time was compared, which does not see waiting", highlight=False
        )
    console.print(f"verdict: {whole([own.verdict for own in found])}", highlight=False)


def run_advise(path: Path, console: Console) -> tuple[Advice, ...]:
    """Say which drafter to use. Raises SpecDecError."""
    results = read_results(_file(path))
    found = advise(results)
    for own in found:
        console.print(f"batch {own.batch}, temperature {own.temperature:g}: use [bold]{escape(own.method)}[/]", highlight=False)
        if own.vs_plain is not None:
            ratios = f"{_interval(own.vs_plain)} of plain decoding, {_interval(own.vs_generate)} of model.generate"
            console.print(f"  expected: {ratios}", highlight=False)
        elif own.vs_generate is not None:
            console.print(f"  expected: {_interval(own.vs_generate)} of model.generate", highlight=False)
        console.print(f"  {escape(own.use)}", highlight=False)
        for sentence in own.why:
            console.print(f"  {escape(sentence)}", highlight=False)
        for sentence in own.by_task:
            console.print(f"  better for {escape(sentence)}", highlight=False)
    return found


def run_report(path: Path, output: Path | None, console: Console) -> None:
    """Write the reports of a finished run, beside it by default. Raises SpecDecError."""
    file = _file(path)
    folder = output or file.parent
    results = read_results(file)
    folder.mkdir(parents=True, exist_ok=True)
    write_reports(results, folder, console)


def _file(path: Path) -> Path:
    return path / "results.json" if path.is_dir() else path


def _loaded(path: str, dtype: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    target = load_model(path, dtype=dtype)
    return target, need_tokenizer(path)


def _new(options: BenchOptions) -> int:
    return options.max_new_tokens or (48 if options.quick else 128)


def _prompts(options: BenchOptions, target: Any, tokenizer: PreTrainedTokenizerBase) -> Prompts:
    if options.quick and options.prompts:
        raise SpecDecError("--quick measures the built-in prompts; leave it out to measure those of --prompts")
    tasks = options.workloads or (QUICK.tasks if options.quick else ())
    per_task = options.per_task or (QUICK.per_task if options.quick else None)
    positions = getattr(target.config.get_text_config(), "max_position_embeddings", None)
    return load_prompts(Choice(options.prompts, tasks, per_task, options.longest), tokenizer, positions, _new(options))


def _settings(options: BenchOptions, target: Any) -> Settings:
    bundled = options.target == BUNDLED
    return Settings(
        target=options.target,
        dtype=str(target.dtype).removeprefix("torch."),
        batches=tuple(dict.fromkeys(options.batches)),
        temperatures=tuple(dict.fromkeys(options.temperatures)),
        max_new_tokens=_new(options),
        repeats=options.repeats or 3,
        seed=options.seed,
        quick=options.quick,
        trained_length=options.trained_length or (_BUNDLED_LENGTH if bundled else None),
    )


def _methods(options: BenchOptions, target: PreTrainedModel, path: str) -> tuple[Method, ...]:
    """Compiling takes a minute a size, so --quick leaves it out unless it is asked for."""
    drafters = _drafters(options, target)
    compiled = not options.quick if options.compiled is None else options.compiled
    selection = Selection(options.planner, options.verifier, static=True, compiled=compiled)
    peers = [peer(text, target, path) for text in options.peers]
    imitations = synthetic_methods(target, drafters, options.synthetic, selection)
    return (*make_methods(target, drafters, selection), *peers, *imitations)


def _drafters(options: BenchOptions, target: PreTrainedModel) -> list[NamedDrafter]:
    asked = options.drafters or (_BUNDLED if options.target == BUNDLED else _ANYWHERE)
    found: list[NamedDrafter] = []
    for text in asked:
        own = _drafter(text, target)
        taken = {HF, PLAIN, LOOKUP, ASSISTED, STATIC, COMPILED, *ENGINES, *(other.name for other in found)}
        _check_free(text, own.name, own.source, taken)
        found.append(own)
    return found


def _check_free(text: str, name: str, source: str, taken: Collection[str]) -> None:
    if name in taken:
        raise SpecDecError(f"--drafter {text}: the name {name!r} is taken; give another as NAME={source}")


def _drafter(text: str, target: PreTrainedModel) -> NamedDrafter:
    """A drafter by name, role of the bundled models, or path; each may be written NAME=..."""
    named = _named(text)
    if named.source in FACTORIES:
        return NamedDrafter(named.label, named.said, named.source)
    path = named.source if named.role is None else str(bundled_path(named.role))
    drafter = load_drafter(path, target)
    if not isinstance(drafter, DraftModelDrafter):
        return NamedDrafter(named.label, named.said, drafter)
    model = load_model(path, device=target.device)
    return NamedDrafter(named.label, named.said, DraftModelDrafter(model), model)


def _interval(interval: Interval | None, digits: int = 2) -> str:
    if interval is None:
        return ""
    return f"{interval.value:.{digits}f}x ({interval.low:.{digits}f} to {interval.high:.{digits}f})"


def _show(results: Results, console: Console) -> None:
    cells = dict.fromkeys((row.batch, row.temperature) for row in results.rows)
    synthetic = [info.name for info in results.methods if info.family == "synthetic"]
    real = [info.name for info in results.methods if info.family != "synthetic"]
    for batch, temperature in cells:
        _show_rows(results, batch, temperature, real, "", console)
    for batch, temperature in cells if synthetic else ():
        _show_rows(results, batch, temperature, synthetic, "SYNTHETIC acceptance, cost alone: ", console)
    _show_left_out(results, console)


def _show_rows(results: Results, batch: int, temperature: float, names: Sequence[str], head: str, console: Console) -> None:
    table = Table(title=f"{head}batch {batch}, temperature {temperature:g}, {results.settings.dtype}", title_justify="left")
    for heading in ("method", "tokens/s", "over generate", "over plain", "tokens a round", "drafting", "outside forwards"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    own = [r for r in results.rows if (r.batch, r.temperature, r.scope) == (batch, temperature, ALL) and r.method in names]
    for row in own:
        told = (row.acceptance_length, ".2f"), (row.draft_share, ".0%"), (row.overhead_share, ".0%")
        numbers = ["" if value is None else format(value, form) for value, form in told]
        ratios = _interval(row.vs_generate), _interval(row.vs_plain)
        table.add_row(row.method, f"{row.tokens_per_s.value:.1f}", *ratios, *numbers)
    console.print(table)


def _show_left_out(results: Results, console: Console) -> None:
    for gate in results.gates:
        if gate.status in ("refused", "unavailable"):
            colour = "bold red" if gate.status == "refused" else "yellow"
            where = f"at batch {gate.batch}, temperature {gate.temperature:g}"
            console.print(f"[{colour}]{gate.status}[/]: {escape(gate.method)} {where}: {escape(gate.reason)}", highlight=False)
    left_out: dict[str, int] = {}
    for prompt in results.refused_prompts:
        left_out[prompt.task] = left_out.get(prompt.task, 0) + 1
    if left_out:
        said = ", ".join(f"{count} of {task}" for task, count in left_out.items())
        console.print(f"prompts refused, never cut: {escape(said)}; the report lists each", highlight=False)


def command_line(arguments: Sequence[str]) -> str:
    """The command as it may be typed again."""
    return shlex.join(["specdec", *arguments])
