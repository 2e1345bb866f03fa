"""The command `specdec`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from specdec import __version__
from specdec.errors import SpecDecError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
datastore = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Texts that drafts are retrieved from.")
app.add_typer(datastore, name="datastore")
training = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Drafters for a target of your own.")
app.add_typer(training, name="train")
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
    nodes: Annotated[int, typer.Option(min=1, help="tokens to draft each round")] = 2,
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
def doctor() -> None:
    """Say what this machine has and what specdec makes of it."""
    from specdec.demo import show_doctor

    show_doctor(Console())


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
        Console(stderr=True).print(f"[bold red]error:[/] {error}", highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped")
        sys.exit(130)


if __name__ == "__main__":
    main()
