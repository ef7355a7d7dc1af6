"""The command line: picks a recipe by name, hands it its settings, prints what came out. It decides nothing itself.

Each command is a frozen dataclass of flags with a `run`. A mistake of the user's is one sentence and exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

USER_ERROR, FAILED = 2, 1


@dataclass(frozen=True)
class Demo:
    """Draw a stability map on the embedded corpus: loss against learning rate for two sizes, with and without qk-layernorm."""

    out: Path = Path("out/demo")
    """Study folder; run the demo again to finish an interrupted one."""
    processes: int = 0
    """Worker processes of one thread each; 0 takes one a core."""

    def run(self) -> int:
        from aftershock.lab.presets import demo

        return _sweep_and_report(demo(), self.out, self.processes, report=True)


@dataclass(frozen=True)
class Sweep:
    """Train a grid of sizes, rates, seeds and interventions. Resumable: the same command again trains only what is missing."""

    out: Path = Path("out/sweep")
    """Study folder."""
    from_: Annotated[Path | None, arg(name="from")] = None
    """YAML file with the grid (see sweep.yaml in any study folder); flags override it."""
    name: str | None = None
    """Name of the study."""
    sizes: tuple[str, ...] | None = None
    """WIDTHxDEPTH, WIDTHxDEPTHxHEADS, or a name of the paper's family (2.4M ... 4.8B)."""
    arms: tuple[str, ...] | None = None
    """Interventions, joined by + within an arm: baseline no_qk_norm warmup:100+no_z_loss optim.beta2=0.99."""
    lrs: tuple[float, ...] | None = None
    """Peak learning rates; the paper's 7-rate ladder by default."""
    seeds: tuple[int, ...] | None = None
    """Seeds; each draws weights and batches."""
    set: UseAppendAction[tuple[str, ...]] = ()
    """Any setting of every run, by its path: --set steps=500 --set data.source=book.txt."""
    processes: int = 0
    """Worker processes of one thread each; 0 takes one a core."""
    dry_run: bool = False
    """Only print the runs that would be trained."""
    report: bool = True
    """Write the HTML report at the end."""

    def run(self) -> int:
        import dataclasses

        from aftershock.config import override
        from aftershock.lab.presets import tiny_run
        from aftershock.lab.sweep import SweepSpec, expand, load_spec

        spec = load_spec(self.from_) if self.from_ else SweepSpec(base=tiny_run(), sizes=("32x2", "64x3"))
        given = {name: getattr(self, name) for name in ("name", "sizes", "arms", "lrs", "seeds")}
        changes = dict(_assignment(text) for text in self.set)
        base = override(spec.base, changes, where="--set")
        spec = dataclasses.replace(spec, base=base, **{k: v for k, v in given.items() if v is not None})
        if self.dry_run:
            for planned in expand(spec):
                ref = planned.ref
                print(f"{ref.run_id}  {ref.size:>8}  {ref.arm}  lr {ref.lr:g}  seed {ref.seed}")
            return 0
        return _sweep_and_report(spec, self.out, self.processes, report=self.report)


@dataclass(frozen=True)
class Run:
    """Train the runs of these folders (each with its config.yaml) as one fleet, in this process: what a sweep's jobs call."""

    folders: Positional[tuple[Path, ...]]
    """Run folders whose configs may share a fleet."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    sinks: tuple[str, ...] = ()
    """Trackers to mirror to, such as tensorboard:DIR, wandb:PROJECT, mlflow:URI, trackio:PROJECT."""
    mirror: str | None = None
    """fsspec URL to copy the run folders to as they grow."""
    lifeline: bool = False
    """End when standard input ends."""

    def run(self) -> int:
        from aftershock.lab.job import run_folders, watch_lifeline

        if self.lifeline:
            watch_lifeline()
        for folder, summary in zip(
            self.folders, run_folders(self.folders, device=self.device, sinks=self.sinks, mirror=self.mirror), strict=True
        ):
            end = f"diverged at step {summary['diverged_step']}" if summary["final_loss"] is None else f"loss {summary['final_loss']:.4f}"
            print(f"{folder.name}: {end}")
        return 0


@dataclass(frozen=True)
class Report:
    """Write the HTML page, its numbers as JSON, and publication figures of a study."""

    study: Positional[Path]
    """Study folder, or the fsspec URL of one."""
    out: Path | None = None
    """Where to write; the study folder by default."""

    def run(self) -> int:
        return _report(self.study, self.out)


@dataclass(frozen=True)
class Sensitivity:
    """LR sensitivity of anyone's losses: a CSV with the columns group,lr,loss; an empty or nan loss means diverged."""

    file: Positional[Path]
    """The CSV file."""
    l0: float
    """Loss at initialisation, in nats: what a diverged run counts as."""
    json: bool = False
    """Print a JSON list of {group, lr_sensitivity, best_lr, best_loss}."""

    def run(self) -> int:
        from aftershock.forecast.sensitivity import read_losses_csv, sensitivity_table

        table = sensitivity_table(read_losses_csv(self.file), self.l0)
        if self.json:
            print(json.dumps([row._asdict() for row in table], indent=1))
            return 0
        width = max(len("group"), *(len(row.group) for row in table))
        print(f"{'group':<{width}}  lr_sensitivity  best_lr  best_loss")
        for row in table:
            print(f"{row.group:<{width}}  {row.lr_sensitivity:>14.4f}  {row.best_lr:>7g}  {row.best_loss:>9.4f}")
        return 0


@dataclass(frozen=True)
class Claims:
    """The scoreboard of published claims, from recorded evidence; or judge some again with `--run`."""

    run_: Annotated[tuple[str, ...], arg(name="run")] = ()
    """Claims to run again, such as P1 P7; `all` for every one that has a study."""
    out: Path = Path("out/claims")
    """Where the studies' runs go; claims share them."""
    processes: int = 0
    """Worker processes of one thread each; 0 takes one a core."""
    json: bool = False
    """Print the scoreboard as JSON."""

    def run(self) -> int:
        from aftershock.claims.scoreboard import print_scoreboard, scoreboard_json
        from aftershock.claims.study import judge_all

        if self.run_:
            judge_all(self.run_, self.out, processes=self.processes, on_progress=_progress_bar)
        if self.json:
            print(scoreboard_json())
        else:
            print_scoreboard()
        return 0


COMMANDS = {"demo": Demo, "sweep": Sweep, "run": Run, "report": Report, "sensitivity": Sensitivity, "claims": Claims}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 when something failed to train, 2 for a mistake in the call."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="aftershock", description="A laboratory and a safety net for training instability.", args=argv
    )
    try:
        return command.run()
    except (ValueError, OSError) as error:
        print(f"aftershock: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("aftershock: stopped; the same command goes on from here", file=sys.stderr)
        return 130


def _assignment(text: str) -> tuple[str, str]:
    path, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes path=value, got {text!r}")
    return path, value


def _sweep_and_report(spec, folder: Path, processes: int, *, report: bool) -> int:  # noqa: ANN001
    from aftershock.console import clock, progress_bar
    from aftershock.lab.launch import LocalLauncher
    from aftershock.lab.sweep import run_sweep

    import time

    started = time.monotonic()
    with progress_bar(spec.name) as on_progress:
        result = run_sweep(spec, folder, launcher=LocalLauncher(num_processes=processes), on_progress=on_progress)
    print(f"{result.num_trained} runs trained, {result.num_kept} kept, in {clock(time.monotonic() - started)}: {folder}")
    if report:
        _report(folder, None)
    for failure in result.failures:
        print(f"aftershock: {failure}", file=sys.stderr)
    return FAILED if result.failures else 0


def _report(study: Path, out: Path | None) -> int:
    from aftershock.report.page import write_report
    from aftershock.report.terminal import print_study

    paths = write_report(study, out=out)
    print_study(study)
    print(f"report: {paths.html}")
    return 0
