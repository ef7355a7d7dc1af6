"""The command line: picks a recipe by name, hands it its settings, prints what came out. It decides nothing itself.

Each command is a frozen dataclass of flags with a `run`. A mistake of the user's is one sentence and exit status 2.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg

from aftershock.bench.command import Bench
from aftershock.forecast.command import Fit
from aftershock.forecast.console import Forecast, Plan
from aftershock.replay.command import Chosen, Replay
from aftershock.signals.detect.command import Detect

if TYPE_CHECKING:
    from aftershock.forecast.outlook import Outlook
    from aftershock.lab.sweep import SweepSpec
    from aftershock.replay.explain import Explanation
    from aftershock.replay.rerun import Rerun

USER_ERROR, FAILED = 2, 1
DEMO_SPIKE = "lag_99"
"""The specimen whose spike the demo explains: seconds to train, and spontaneous."""


@dataclass(frozen=True)
class Demo:
    """Draw a stability map on the embedded corpus (loss against rate, two sizes, with and without qk-layernorm), then
    train a net until it spikes by itself, replay the spike with one thing changed at a time, and say what made it."""

    out: Path = Path("out/demo")
    """Study folder; run the demo again to finish an interrupted one."""
    processes: int = 0
    """Worker processes of one thread each; 0 takes one a core."""

    def run(self) -> int:
        from aftershock.lab.presets import demo

        status = _sweep_and_report(demo(), self.out, self.processes, report=True)
        print(f"\nA run that spikes by itself ({DEMO_SPIKE}), and why:", flush=True)
        explained = Replay(f"zoo:{DEMO_SPIKE}", out=self.out / "replay", processes=self.processes or 2)
        return explained.run(_replay_page, _specimen) or status


@dataclass(frozen=True)
class Sweep:
    """Train a grid of sizes, rates, seeds and interventions; the same command again trains only what is missing."""

    out: Path = Path("out/sweep")
    """Study folder."""
    from_: Annotated[Path | None, arg(name="from", metavar="FILE")] = None
    """YAML file with the grid (see sweep.yaml in any study folder); flags override it."""
    name: Annotated[str, arg(metavar="NAME")] = ""
    """Name of the study."""
    sizes: Annotated[tuple[str, ...], arg(metavar="SIZE ...")] = ()
    """WIDTHxDEPTH[xHEADS], or 2.4M ... 4.8B of the paper's family; 32x2 and 64x3 unless --set chooses the model."""
    arms: Annotated[tuple[str, ...], arg(metavar="ARM ...")] = ()
    """Interventions, joined by + within an arm: baseline no_qk_norm warmup:100+no_z_loss optim.beta2=0.99."""
    lrs: Annotated[tuple[float, ...], arg(metavar="RATE ...")] = ()
    """Peak learning rates; the paper's 7-rate ladder if neither here nor in the file."""
    seeds: Annotated[tuple[int, ...], arg(metavar="SEED ...")] = ()
    """Seeds; each draws weights and batches."""
    set: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="PATH=VALUE")] = ()
    """Any setting of every run, by its path: --set steps=500 --set data.source=book.txt."""
    processes: int = 0
    """Worker processes of one thread each; 0 takes one a core."""
    sinks: Annotated[tuple[str, ...], arg(metavar="TRACKER:WHERE ...")] = ()
    """Trackers to mirror every run to: tensorboard:DIR, wandb:PROJECT, mlflow:URI, trackio:PROJECT."""
    mirror: Annotated[str | None, arg(metavar="URL")] = None
    """fsspec URL to copy every run folder to as it grows."""
    dry_run: bool = False
    """Only print the runs that would be trained."""
    report: bool = True
    """Write the HTML report at the end."""

    def run(self) -> int:
        import dataclasses

        from aftershock.config import override
        from aftershock.lab.presets import tiny_run
        from aftershock.lab.sweep import SweepSpec, expand, load_spec

        # Who sets the model means that model: the usual two sizes would override it.
        sizes = () if any(text.startswith("model.") for text in self.set) else ("32x2", "64x3")
        spec = load_spec(self.from_) if self.from_ else SweepSpec(base=tiny_run(), sizes=sizes)
        given = {name: getattr(self, name) for name in ("name", "sizes", "arms", "lrs", "seeds")}
        changes = dict(_assignment(text) for text in self.set)
        base = override(spec.base, changes, where="--set")
        spec = dataclasses.replace(spec, base=base, **{k: v for k, v in given.items() if v})
        if self.dry_run:
            for planned in expand(spec):
                ref = planned.ref
                print(f"{ref.run_id}  {ref.size:>8}  {ref.arm}  lr {ref.lr:g}  seed {ref.seed}")
            return 0
        return _sweep_and_report(
            spec, self.out, self.processes, report=self.report, sinks=self.sinks, mirror=self.mirror
        )


@dataclass(frozen=True)
class Run:
    """Train the runs of these folders (each with its config.yaml) in this process: what a sweep's jobs call."""

    folders: Positional[Annotated[tuple[Path, ...], arg(metavar="FOLDER ...")]]
    """Run folders whose configs may share a fleet."""
    fleet_size: int = 0
    """Runs trained at a time; 0 takes all at once."""
    device: str = "cpu"
    """cpu, cuda, cuda:1, ..."""
    sinks: Annotated[tuple[str, ...], arg(metavar="TRACKER:WHERE ...")] = ()
    """Trackers to mirror to: tensorboard:DIR, wandb:PROJECT, mlflow:URI, trackio:PROJECT."""
    mirror: Annotated[str | None, arg(metavar="URL")] = None
    """fsspec URL to copy the run folders to as they grow."""
    lifeline: bool = False
    """End when standard input ends."""

    def run(self) -> int:
        from aftershock.lab.job import run_folders, watch_lifeline

        if self.lifeline:
            watch_lifeline()
        summaries = run_folders(
            self.folders, fleet_size=self.fleet_size, device=self.device, sinks=self.sinks, mirror=self.mirror
        )
        for folder, summary in zip(self.folders, summaries, strict=True):
            died = summary["diverged_step"]
            print(
                f"{folder.name}: "
                + (f"diverged at step {died}" if died is not None else f"loss {summary['final_loss']:.4f}")
            )
        return 0


@dataclass(frozen=True)
class Report:
    """Write the HTML page, its numbers as JSON, and publication figures of a study."""

    study: Positional[str]
    """Study folder, or the fsspec URL of one."""
    out: Path | None = None
    """Folder to write into; report/ in the study folder by default."""
    figures: bool = True
    """Also draw the publication figures, PNG and SVG (needs the extra `plots`)."""

    def run(self) -> int:
        return _report(self.study, self.out, figures=self.figures)


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
    """Claims to run again, such as P1 P7; `all` for every one that has a study, E1 to E4 only with `--scores`."""
    scores: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Folder with the tables of benchmark scores that E1 to E4 are judged on."""
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
            from aftershock.report.progress import progress_bar

            judge_all(self.run_, self.out, processes=self.processes, on_progress=progress_bar, scores=self.scores)
        if self.json:
            print(scoreboard_json(self.out / "records"))
        else:
            print_scoreboard(self.out / "records")
        return 0


COMMANDS = {
    "demo": Demo,
    "sweep": Sweep,
    "run": Run,
    "report": Report,
    "sensitivity": Sensitivity,
    "detect": Detect,
    "claims": Claims,
    "bench": Bench,
    "replay": Replay,
    "forecast": Forecast,
    "plan": Plan,
    "fit": Fit,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 when something failed to train, 2 for a mistake in the call."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS, prog="aftershock", description="A laboratory and a safety net for training instability.", args=argv
    )
    try:
        if isinstance(command, Bench):
            from aftershock.report.detectors import write_detectors_page
            from aftershock.report.survival import write_survival_page

            return command.run(write_detectors_page, write_survival_page)
        if isinstance(command, Replay):
            return command.run(_replay_page, _specimen, _lab_run)
        if isinstance(command, Forecast):
            return command.run(_forecast_page)
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


def _replay_page(explanation: Explanation, folder: Path) -> Path:
    """Imports the page only when there is something to write."""
    from aftershock.report.replay import write_replay_page

    return write_replay_page(explanation, folder)


def _forecast_page(outlook: Outlook, folder: Path) -> Path:
    """Imports the page only when there is something to write."""
    from aftershock.report.forecast import write_forecast_page

    return write_forecast_page(outlook, folder)


def _specimen(name: str, seed: int) -> Chosen:
    """The first spike of a specimen of the zoo, for a replay."""
    import torch

    from aftershock.bench.diagnosis import capture
    from aftershock.lab.zoo.registry import specimen

    chosen = specimen(name)
    if chosen.kind == "healthy":
        raise ValueError(f"{name} is a healthy specimen: it has no spike to explain")
    torch.set_num_threads(1)  # as in the replays: the last bits of a sum may depend on it
    subject = capture(chosen, seed)
    if subject is None:
        raise ValueError(f"{name} does not spike with seed {seed}; try another --seed")
    return Chosen(subject, None, f"{name}: {chosen.about} Known cause: {chosen.cause}.")


def _lab_run(folder: Path, anyway: bool) -> Rerun | None:
    """The lab's run in a folder, for a replay."""
    import torch

    from aftershock.lab.replaying import find_run
    from aftershock.lab.zoo.labels import label
    from aftershock.replay.rerun import Rerun

    torch.set_num_threads(1)  # as the lab trains, and the replays
    run = find_run(folder, anyway=anyway)
    if run is None:
        return None
    return Rerun(str(folder), run.losses, run.steps, run.build, label, run.notes)


def _sweep_and_report(
    spec: SweepSpec,
    folder: Path,
    processes: int,
    *,
    report: bool,
    sinks: Sequence[str] = (),
    mirror: str | None = None,
) -> int:
    from aftershock.lab.launch import LocalLauncher
    from aftershock.lab.sweep import run_sweep
    from aftershock.report.progress import clock, progress_bar

    started = time.monotonic()
    with progress_bar(spec.name) as on_progress:
        launcher = LocalLauncher(num_processes=processes)
        result = run_sweep(spec, folder, launcher=launcher, on_progress=on_progress, sinks=sinks, mirror=mirror)
    print(
        f"{result.num_trained} runs trained, {result.num_kept} kept, in {clock(time.monotonic() - started)}: {folder}"
    )
    if report:
        _report(folder, None, figures=False)
    for failure in result.failures:
        print(f"aftershock: {failure}", file=sys.stderr)
    return FAILED if result.failures else 0


def _report(study: str | Path, out: Path | None, *, figures: bool) -> int:
    from aftershock.report.page import write_report
    from aftershock.report.terminal import print_result

    paths = write_report(study, out=out, figures="on" if figures else "off")
    print_result(study)
    print(f"\nreport: {paths.html}")
    if paths.figures:
        print(f"figures: {paths.figures[0].parent}")
    return 0
