"""The training loop: batches, steps, figures, evaluation and checkpoints. What is trained is an `Objective`'s business."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from rich.console import Console
from torch import Tensor

from specdec.bundled import checkpoint
from specdec.training.data import DataReport, Examples, data_tokenizer, load_examples
from specdec.training.evaluate import decode, held_out_loss, nodes_of, prompts_of
from specdec.training.hub import push
from specdec.training.objectives import Figures, Micro
from specdec.training.optimiser import make_optimiser, set_rates
from specdec.training.packing import PackedRows, batches, num_batches, pack
from specdec.training.progress import ProgressLine
from specdec.training.saving import load_checkpoint, load_sharded, newest, save_checkpoint, save_sharded
from specdec.training.settings import ConfigError, save_resolved

# (configuration, tokenizer, device) to an Objective.
MakeObjective = Callable[[Any, Any, torch.device], Any]

_DECODED_PROMPTS, _DECODED_TOKENS = 8, 64


@dataclass(frozen=True, slots=True)
class TrainReport:
    """steps: those of earlier runs included.  loss: of the last log line.  held_out: the last evaluation.  folder: the result."""

    steps: int
    loss: float
    held_out: dict[str, float]
    folder: Path
    data: DataReport


def train(config: Any, make: MakeObjective, command: Sequence[str], console: Console | None = None) -> TrainReport:
    """Train to the end and write `<run.output>/final`. A run that was stopped goes on from its newest checkpoint.

    The same configuration gives the same weights (fp32, CPU), whether it was stopped in between or not. Raises what data,
    configuration and models raise; KeyboardInterrupt after a checkpoint was saved.
    """
    run = Run(config, make, console or Console(stderr=True))
    if run.main:
        save_resolved(config, command, run.folder)
    try:
        run.steps_from(run.resume())
        return run.finish()
    except KeyboardInterrupt:
        run.save()
        run.console.print(f"stopped at step {run.step}; the same command goes on from there")
        raise
    finally:
        run.accelerator.end_training()


@dataclass
class _Window:
    """Sums since the last log line, on the device."""

    slots: int
    device: torch.device
    sums: Tensor = field(init=False)
    loss: Tensor = field(init=False)
    tokens: Tensor = field(init=False)
    steps: int = 0
    began: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.sums = torch.zeros(2, self.slots, device=self.device)
        self.loss = torch.zeros((), device=self.device)
        self.tokens = torch.zeros((), device=self.device)

    def add(self, figures: Sequence[Figures], micros: Sequence[Micro]) -> None:
        for one in figures:
            self.sums += torch.stack((one.per_slot, one.counts))
            self.loss += one.loss.detach()
        for micro in micros:
            self.tokens += (micro.rows.documents != 0).sum()
        self.steps += 1


class Run:
    """One process's part of a run."""

    def __init__(self, config: Any, make: MakeObjective, console: Console) -> None:
        """Reads the data and builds the model; nothing is written yet."""
        self.config, self.console, optim = config, console, config.optim
        mixed = "bf16" if optim.precision == "bf16" else "no"
        tracker = None if config.run.tracker == "none" else config.run.tracker
        self.folder = Path(config.run.output).expanduser()
        self.accelerator = Accelerator(mixed_precision=mixed, log_with=tracker, project_dir=str(self.folder))
        if self.accelerator.distributed_type is DistributedType.DEEPSPEED:
            raise ConfigError(
                "accelerate is set to DeepSpeed, whose engine steps by itself within the backward pass; choose FSDP in "
                "`accelerate config`, which shards the same things"
            )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        tokenizer = data_tokenizer(config.data, checkpoint(config.run.target, "target"))
        self.examples: Examples = load_examples(config.data, tokenizer)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.rows = pack(self.examples.train, config.data.max_length, pad=pad, together=config.data.pack)
        held_out = self.examples.held_out
        self.held_out = pack(held_out, config.data.max_length, pad=pad, together=config.data.pack) if held_out else None
        self._make = partial(make, config, tokenizer)
        self.objective = self._make(self.device)
        optimiser = make_optimiser(self.objective, optim)
        self.model, self.optimiser = self.accelerator.prepare(self.objective, optimiser)
        self.sharded = self.accelerator.distributed_type is DistributedType.FSDP
        if tracker is not None:
            self.accelerator.init_trackers("specdec")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.step_rows = optim.batch_rows * optim.accumulate * self.world
        self.per_epoch = num_batches(len(self.rows), self.step_rows)
        whole = self.per_epoch * optim.epochs
        self.steps = min(whole, optim.max_steps or whole)
        self.step, self.loss = 0, float("nan")
        self.last_held_out: dict[str, float] = {}

    def resume(self) -> int:
        """The step to begin with."""
        place = newest(self.folder) if self.config.run.resume else None
        if place is None:
            if self.main and not self.config.run.resume:
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            return 0
        if self.sharded:
            state = load_sharded(place, self.accelerator)
        else:
            state = load_checkpoint(place, self.objective, self.optimiser.optimizer)
        self.console.print(f"going on from step {state['step']}")
        return int(state["step"])

    def steps_from(self, first: int) -> None:
        """All steps from this one on."""
        self.step, every = first, self.config.run
        window = _Window(len(self.objective.slots), self.device)
        with ProgressLine(self.console, self.steps, first, shown=self.main) as line:
            while self.step < self.steps:
                window.add(*self._step(self.step))
                self.step += 1
                if self.step % every.log_every == 0 or self.step == self.steps:
                    line.update(self.step, self._log(window))
                    window = _Window(len(self.objective.slots), self.device)
                if every.eval_every and self.step % every.eval_every == 0 and self.step < self.steps:
                    self.evaluate()
                if every.save_every and self.step % every.save_every == 0:
                    self.save()

    def _step(self, step: int) -> tuple[list[Figures], list[Micro]]:
        """One optimiser step over `accumulate` batches in every process."""
        optim = self.config.optim
        micros = self._micros(step)
        weight = self.accelerator.reduce(torch.stack([m.weight for m in micros]).sum(), "sum").clamp(min=1e-9)
        figures = []
        for micro in micros[:-1]:
            with self.accelerator.no_sync(self.model):
                figures.append(self._backward(micro, weight))
        figures.append(self._backward(micros[-1], weight))
        set_rates(self.optimiser, self.objective, step, self.steps, optim)
        if optim.grad_clip:
            self.accelerator.clip_grad_norm_(self.model.parameters(), optim.grad_clip)
        self.optimiser.step()
        self.optimiser.zero_grad()
        return figures, micros

    def _backward(self, micro: Micro, weight: Tensor) -> Figures:
        figures: Figures = self.model(micro, weight)
        # Gradients are averaged over processes, and the loss is a sum over them.
        self.accelerator.backward(figures.loss * self.world)
        return figures

    def _micros(self, step: int) -> list[Micro]:
        """This process's batches of a step: parts of the step's rows, which are the same however they are shared out."""
        optim = self.config.optim
        epoch, place = divmod(step, self.per_epoch)
        rows = next(batches(self.rows, self.step_rows, epoch=epoch, seed=optim.seed, skip=place))
        micros = []
        for i in range(optim.accumulate):
            part = i * self.world + self.rank
            seed = ((optim.seed * 1_000_003 + step) * 1_000_003 + part) % (1 << 62)
            generator = torch.Generator(self.device).manual_seed(seed)
            own = rows.take(slice(part * optim.batch_rows, (part + 1) * optim.batch_rows))
            micros.append(self.objective.prepare(own.to(self.device), generator))
        return micros

    def _log(self, window: _Window) -> dict[str, float]:
        """Figures since the last line, over all processes; into the log file and the tracker."""
        sums = self.accelerator.reduce(window.sums, "sum")
        self.loss = float(self.accelerator.reduce(window.loss, "sum")) / window.steps
        means = (sums[0] / sums[1].clamp(min=1)).tolist()
        rate = float(window.tokens) * self.world / (time.perf_counter() - window.began)
        figures = {"loss": self.loss, "tokens_per_s": rate, "rate": self.optimiser.param_groups[0]["lr"]}
        figures |= dict(zip(self.objective.slots, means, strict=True))
        self._write("train", figures)
        return figures

    def _write(self, kind: str, figures: dict[str, float]) -> None:
        if not self.main:
            return
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "step": self.step, **figures}) + "\n")
        self.accelerator.log({f"{kind}/{name}": value for name, value in figures.items()}, step=self.step)

    def evaluate(self) -> None:
        """Held-out loss, and tokens a round of the real decoder on held-out prompts; by the main process."""
        objective = self._whole()
        if objective is None or self.held_out is None:
            return
        optim = self.config.optim
        loss, means = held_out_loss(objective, self.held_out, optim.batch_rows, optim.seed, self.device)
        figures = {"loss": loss, **dict(zip(objective.slots, means, strict=True))}
        prompts = prompts_of(self.examples.held_out, _DECODED_PROMPTS)
        if prompts:
            nodes = nodes_of(objective)
            found = decode(objective.target(), objective.drafter(), prompts, new_tokens=_DECODED_TOKENS, nodes=nodes)
            figures |= {"acceptance_length": found.acceptance_length, "acceptance_rate": found.acceptance_rate}
        self._write("held_out", figures)
        self.last_held_out = figures
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        self.console.print(f"step {self.step}, held out: {shown}")

    def _whole(self) -> Any:
        """The objective with all of its weights, in the main process; None in the others. All processes call it."""
        if not self.sharded:
            return self.objective if self.main else None
        weights = self.accelerator.get_state_dict(self.model)
        if not self.main:
            return None
        whole = self._make(self.device)
        whole.load_state_dict(weights)
        return whole

    def save(self) -> None:
        """A checkpoint of this step."""
        keep, state = self.config.run.keep, {"loss": self.loss}
        if self.sharded:
            save_sharded(self.folder, self.accelerator, self.step, keep, state)
        elif self.main:
            save_checkpoint(self.folder, self.objective, self.optimiser.optimizer, self.step, keep, state)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainReport:
        """The last evaluation, and the result."""
        self.evaluate()
        final, objective = self.folder / "final", self._whole()
        if objective is not None:
            held_out = self.held_out.take(slice(0, 64)).to(self.device) if self.held_out is not None else None
            self.save_final(objective, final, held_out)
            data = self.examples.report
            read = f"read {data.rows:,} rows, {data.tokens:,} tokens: {data.truncated} cut, {data.dropped} left out for length"
            self.console.print(f"{read}\n{self.step} steps, loss {self.loss:.3f}; the drafter is in {final}", highlight=False)
        self.accelerator.wait_for_everyone()
        return TrainReport(self.step, self.loss, self.last_held_out, final, self.examples.report)

    def save_final(self, objective: Any, final: Path, held_out: PackedRows | None) -> None:
        """What users load, and the settings it was made with; uploaded where the settings ask for it."""
        final.mkdir(parents=True, exist_ok=True)
        objective.save(final, held_out)
        (final / "training.json").write_bytes((self.folder / "training.json").read_bytes())
        if self.config.run.push_to_hub is not None:
            self.console.print(f"uploaded: {push(final, self.config.run.push_to_hub)}", highlight=False)
