"""The command `specdec`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from specdec import __version__
from specdec.errors import SpecDecError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
datastore = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Texts that drafts are retrieved from.")
app.add_typer(datastore, name="datastore")
training = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Drafters for a target of your own.")
app.add_typer(training, name="train")
benchmark = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Speed on this machine, with every output checked.")
app.add_typer(benchmark, name="bench")
# Settings are the fields of dataclasses, which check them; typer hands them on.
_FREE = {"allow_extra_args": True, "ignore_unknown_options": True}
Recipe = Annotated[str | None, typer.Option(help="a recipe of specdec's or a YAML file; by default the method's own")]
Settings = Annotated[str | None, typer.Option("--config", help="a YAML file of settings, over the recipe")]
ListFlags = Annotated[bool, typer.Option("--flags", help="list every setting, its default and what is allowed")]

Target = Annotated[str | None, typer.Option(help="checkpoint folder or hub name; the bundled model by default")]
DraftOption = Annotated[
    str | None,
    typer.Option(help="'prompt-lookup', 'suffix', 'retrieval', 'recycling', 'none', or a checkpoint; default: the bundled draft"),
]


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    """Speculative decoding for Hugging Face causal LMs: faster, and the text never changes."""
    if show:
        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    target: Target = None,
    draft: Annotated[str | None, typer.Option(help="draft checkpoint; the bundled draft by default")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="tokens for each prompt")] = 64,
    nodes: Annotated[int | None, typer.Option(min=1, help="tokens to draft each round; by default the planner decides")] = None,
    quick: Annotated[bool, typer.Option(help="two prompts, timed once")] = False,
    color: Annotated[bool, typer.Option(help="colour the accepted draft tokens")] = True,
) -> None:
    """Decode real prompts plainly and speculatively, side by side, and show that the text is the same."""
    from specdec.demo import run_demo

    run_demo(target, draft, max_new_tokens, nodes, quick, Console(no_color=not color))


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="the prompt; without one it is read from --file or standard input")] = None,
    file: Annotated[Path | None, typer.Option(help="read the prompt from this file")] = None,
    chat: Annotated[bool, typer.Option(help="use the chat template; without a prompt, talk until an empty line")] = False,
    target: Target = None,
    drafter: DraftOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeat")] = None,
    verifier: Annotated[str, typer.Option(help="auto, or a rule's name; README.md lists them")] = "auto",
    nodes: Annotated[int | None, typer.Option(min=0, help="tokens to draft each round; by default the planner decides")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON document instead of streaming")] = False,
) -> None:
    """Generate text; it streams as it is verified."""
    from specdec.generate_command import GenerateOptions, run_generate

    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature > 0 else {}
    options = GenerateOptions(target, drafter, max_new_tokens, sampling, seed, verifier, nodes, chat, json_output)
    run_generate(prompt, file, options, Console())


@app.command()
def trace(
    prompt: Annotated[str, typer.Argument(help="the prompt")],
    target: Target = None,
    drafter: Annotated[
        list[str] | None, typer.Option(help="as in generate, or 'bundled'; repeated, the planner chooses between them")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="makes sampling repeat")] = None,
    verifier: Annotated[str, typer.Option(help="auto, or a rule's name; README.md lists them")] = "auto",
    nodes: Annotated[int | None, typer.Option(min=0, help="tokens to draft each round; by default the planner decides")] = None,
    output: Annotated[Path, typer.Option(help="the HTML file to write")] = Path("trace.html"),
) -> None:
    """Draw one generation as a page: where each token came from, and every round's tree."""
    from specdec.trace_command import TraceOptions, run_trace

    sampling = {"temperature": temperature} if temperature > 0 else {}
    names = tuple(drafter or ())
    run_trace(prompt, TraceOptions(target, names, max_new_tokens, sampling, seed, verifier, nodes, output), Console())


@app.command()
def doctor(
    target: Annotated[str | None, typer.Option(help="also say whether this checkpoint can be a target; or 'bundled'")] = None,
    drafter: Annotated[
        str | None, typer.Option(help="also say whether it fits the target: a checkpoint, 'bundled', or a name as in generate")
    ] = None,
) -> None:
    """Say what this machine has, what specdec makes of it, and whether a target and a drafter fit; exit code 1 if they do not."""
    from specdec.doctor import show_doctor

    if not show_doctor(Console(), target, drafter):
        raise typer.Exit(1)


@app.command("certify")
def certify_pair(
    target: Annotated[str, typer.Option(help="checkpoint folder, hub name, or 'bundled'")] = "bundled",
    drafter: Annotated[
        str | None, typer.Option(help="a checkpoint, 'bundled', or a name as in generate; default: the bundled draft")
    ] = None,
    verifier: Annotated[str, typer.Option(help="auto, or a rule's name")] = "auto",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 checks greedy decoding only")] = 1.0,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    samples: Annotated[int, typer.Option(min=100, help="of the sampled law; 4 times as many find half the distance")] = 2000,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="of each compared text")] = 48,
    nodes: Annotated[int | None, typer.Option(min=1, help="tokens to draft each round; by default 3, or 8 of a tree")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the checkpoint's own")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a prompt a line, or .jsonl; the demo's built-in file by default")] = None,
    check: Annotated[
        list[str] | None, typer.Option(help="greedy, coupled, law, draft-law or state; may be repeated; all by default")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON document instead of a table")] = False,
) -> None:
    """Check that the output is the target's own with this drafter, rule and sampling; exit code 1 if that is not certified."""
    from specdec.certify_command import CertifyOptions, run_certify

    sampling = verifier, temperature, top_k, top_p, samples, seed
    options = CertifyOptions(target, drafter, *sampling, max_new_tokens, nodes, dtype, prompts, tuple(check or ()), json_output)
    if not run_certify(options, Console()).certified:
        raise typer.Exit(1)


@app.command("tune")
def tune_pair(
    target: Annotated[str, typer.Option(help="checkpoint folder, hub name, or 'bundled'")] = "bundled",
    drafter: Annotated[
        str | None, typer.Option(help="a checkpoint, 'bundled', or a name as in generate; default: the bundled draft")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="chain or tree, for drafters that draw both")] = None,
    prompts: Annotated[Path | None, typer.Option(help="a prompt a line, or .jsonl; the demo's built-in file by default")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="requests at once; may be repeated; 1 and 4 by default")] = None,
    nodes: Annotated[list[int] | None, typer.Option(min=0, help="tokens to draft; may be repeated; 0 to 8 by default")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="rounds to measure of each size")] = 24,
    seconds: Annotated[float, typer.Option(min=1.0, help="most time to measure")] = 60.0,
    out: Annotated[Path | None, typer.Option(help="file to write; one in the user's cache by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from what the file holds")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="print one JSON document instead of tables")] = False,
) -> None:
    """Measure times and acceptance of a pair on this machine, and recommend how much to draft."""
    from specdec.tune import BATCHES, NODES
    from specdec.tune_command import TuneOptions, run_tune

    sizes = tuple(batch or BATCHES), tuple(nodes or NODES)
    run_tune(TuneOptions(target, drafter, shape, prompts, *sizes, rounds, seconds, out, resume, json_output), Console())


@datastore.command()
def build(
    out: Annotated[Path, typer.Argument(help="the folder to write")],
    files: Annotated[list[Path], typer.Argument(help="texts, .jsonl with 'text' or 'messages', either .xz, and folders of them")],
    tokenizer: Annotated[str | None, typer.Option(help="the target's checkpoint folder; the bundled target by default")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace an older datastore")] = False,
) -> None:
    """Build a datastore: it appears complete or not at all."""
    from specdec.datastore_command import run_build

    run_build(out, files, tokenizer, overwrite, Console())


@datastore.command()
def info(path: Annotated[Path, typer.Argument(help="a datastore's folder")]) -> None:
    """Say what a datastore holds."""
    from specdec.datastore_command import show_info

    show_info(path, Console())


def _train(method: str, context: typer.Context, recipe: str | None, config: str | None, flags: bool) -> None:
    from specdec.train_command import run_train, show_flags

    console = Console()
    if flags:
        show_flags(method, console)
    else:
        run_train(method, recipe, config, context.args, console)


@training.command(context_settings=_FREE)
def medusa(context: typer.Context, recipe: Recipe = None, config: Settings = None, flags: ListFlags = False) -> None:
    """Train Medusa heads; settings as --section.name value, listed by --flags."""
    _train("medusa", context, recipe, config, flags)


@training.command(context_settings=_FREE)
def pard(context: typer.Context, recipe: Recipe = None, config: Settings = None, flags: ListFlags = False) -> None:
    """Train a draft that proposes several tokens in one forward; settings as --section.name value, listed by --flags."""
    _train("pard", context, recipe, config, flags)


@training.command("draft-model", context_settings=_FREE)
def draft_model(context: typer.Context, recipe: Recipe = None, config: Settings = None, flags: ListFlags = False) -> None:
    """Distil a small LM from the target; settings as --section.name value, listed by --flags."""
    _train("draft-model", context, recipe, config, flags)


@training.command(context_settings=_FREE)
def regenerate(context: typer.Context, config: Settings = None, flags: ListFlags = False) -> None:
    """Have the target answer the prompts of a data set; settings as --name value, listed by --flags."""
    _train("regenerate", context, None, config, flags)


@training.command()
def report(
    runs: Annotated[list[str], typer.Argument(help="folders that --run.output named")],
    out: Annotated[str, typer.Option(help="the folder to write report.md and curves.svg into")] = "report",
) -> None:
    """Compare training runs: curves, where they ended, and their commands."""
    from specdec.training.report import write_report

    Console().print(f"wrote {write_report(runs, out)}", highlight=False)


@benchmark.command("run")
def bench_run(
    quick: Annotated[bool, typer.Option("--quick", help="five built-in prompts, under three minutes on two cores")] = False,
    target: Annotated[str, typer.Option(help="checkpoint folder, hub name, or 'bundled'")] = "bundled",
    drafter: Annotated[
        list[str] | None,
        typer.Option(help="draft, medusa, pard (bundled), a name as in generate, a path, or NAME=any of these; may be repeated"),
    ] = None,
    prompts: Annotated[
        list[Path] | None,
        typer.Option(help=".jsonl, .tsv, or a hub set, OWNER/NAME[/CONFIG]@COMMIT[:SPLIT]; may be repeated; built-in by default"),
    ] = None,
    workload: Annotated[list[str] | None, typer.Option(help="only prompts of this task; may be repeated")] = None,
    per_task: Annotated[int | None, typer.Option(min=1, help="most prompts of a task, evenly from it")] = None,
    longest: Annotated[int | None, typer.Option(min=1, help="refuse prompts of more tokens than this")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="requests at once; may be repeated; 1 by default")] = None,
    temperature: Annotated[list[float] | None, typer.Option(min=0.0, help="0 decodes greedily; may be repeated")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="128 by default, 48 with --quick")] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="runs of each method on each prompt, 3 by default")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="of the target, as float32; may be repeated; its own")] = None,
    planner: Annotated[str | None, typer.Option(help="a planner's name; the default one by default")] = None,
    verifier: Annotated[str, typer.Option(help="a rule's name; one that changes the output is refused")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="of sampling, and of the intervals")] = 0,
    trained_length: Annotated[int | None, typer.Option(min=1, help="tokens the target was trained on; splits the results")] = None,
    output: Annotated[Path | None, typer.Option(help="folder to write; a new one by default")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --output")] = False,
    compiled: Annotated[bool | None, typer.Option(help="generate by torch.compile; not with --quick by default")] = None,
    synthetic: Annotated[list[float] | None, typer.Option(help="cost alone, at this acceptance rate; may be repeated")] = None,
    peer: Annotated[list[str] | None, typer.Option(help="vllm, sglang, llama.cpp=MODEL.gguf; may be repeated")] = None,
) -> None:
    """Measure every drafter beside plain decoding and transformers' own; exit code 1 when an output is not the target's."""
    from specdec.bench_command import BenchOptions, command_line, run_bench

    lists = (tuple(drafter or ()), tuple(prompts or ()), tuple(workload or ()), tuple(batch or (1,)), tuple(temperature or (0.0,)))
    sizes = (max_new_tokens, repeats, per_task, longest, trained_length)
    typed = command_line(sys.argv[1:])
    more = (compiled, tuple(synthetic or ()), tuple(peer or ()))
    options = BenchOptions(quick, target, *lists, *sizes, tuple(dtype or ()), planner, verifier, seed, output, resume, typed, *more)
    if not run_bench(options, Console()):
        raise typer.Exit(1)


@benchmark.command("compare")
def bench_compare(
    before: Annotated[Path | None, typer.Argument(help="results.json of a run, or its folder")] = None,
    after: Annotated[Path | None, typer.Argument(help="of the run to judge")] = None,
    against: Annotated[str | None, typer.Option(help="instead of two runs: this commit and the working tree in turns")] = None,
    drafter: Annotated[list[str] | None, typer.Option(help="with --against: as in run; may be repeated; draft by default")] = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="with --against: of measuring, starts apart")] = 120.0,
    planner: Annotated[str | None, typer.Option(help="with --against: a planner's name")] = None,
    dtype: Annotated[str | None, typer.Option(help="with --against: of the target")] = None,
    threads: Annotated[int, typer.Option(min=1, help="with --against: of each side")] = 1,
    margin: Annotated[float, typer.Option(min=0.0, help="smaller changes than this part are no difference")] = 0.02,
    fail_if_slower: Annotated[bool, typer.Option("--fail-if-slower", help="exit code 1 when the verdict is slower")] = False,
) -> None:
    """Say whether one run is faster than another by ratios to plain decoding, or the working tree than a commit."""
    from specdec.bench_command import AgainstOptions, compare_command

    asked = None
    if against:
        chosen = tuple(drafter or ("draft",))
        asked = AgainstOptions(
            against, drafters=chosen, margin=margin, seconds=seconds, dtype=dtype, planner=planner, threads=threads
        )
    verdict = compare_command(before, after, asked, margin, Console())
    if verdict == "outputs differ" or (fail_if_slower and verdict == "slower"):
        raise typer.Exit(1)


@benchmark.command("advise")
def bench_advise(results: Annotated[Path, typer.Argument(help="results.json of a run, or its folder")]) -> None:
    """Say which drafter to use, what to expect, and why."""
    from specdec.bench_command import run_advise

    run_advise(results, Console())


@benchmark.command("report")
def bench_report(
    results: Annotated[Path, typer.Argument(help="results.json of a run, or its folder")],
    output: Annotated[Path | None, typer.Option(help="folder to write; the run's own by default")] = None,
) -> None:
    """Write a run's reports again: report.md and report.html."""
    from specdec.bench_command import run_report

    run_report(results, output, Console())


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="a drafter's folder, as `specdec train` wrote it")],
    out: Annotated[str, typer.Argument(help="the folder to write")],
    to: Annotated[str, typer.Option(help="medusa, vllm-medusa, pard or hf-assistant")],
    target: Target = None,
    push_to_hub: Annotated[str | None, typer.Option(help="hub repository to upload it to, as name/repository")] = None,
) -> None:
    """Write a drafter as others read it, and read it back to compare."""
    from specdec.train_command import run_export

    run_export(source, to, out, target, push_to_hub, Console())


def main() -> None:
    """Run the command; an error that the user can mend is one line and exit code 2."""
    try:
        app()
    except SpecDecError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
