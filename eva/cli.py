"""The command line: flags into settings, settings into a run, mistakes into one line and exit code 2."""

import argparse
import contextlib
import errno
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eva import __version__, recipes
from eva.config import (
    EVALUATION_SETTINGS,
    EXIT_FAILURE,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    FIELDS,
    Failure,
    Layer,
    RunConfig,
    Terminated,
    UserError,
    collected,
    default_of,
    resolve,
)
from eva.files import finite
from eva.flags import Parser, add_settings, given_settings, loose_settings
from eva.recipes import RECIPES, recipe_layer
from eva.run_folder import read_config

TTA_TOLD = {"flip": ", with flips", "flip_shift": ", with flips and shifts"}
if TYPE_CHECKING:
    from eva.distributed import World

EXIT_BROKEN_PIPE = 141  # as shells report a program that SIGPIPE ended

# What may differ when a run goes on: nothing that changes what it computes.
RESUME_SETTINGS = ("data", "data_dir", "workers", "tracking", "tracking_timeout", "save_steps")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command of eva. Of torchrun's processes the first one does, and the others help it to train.

    Args:
        argv: The arguments after the program's name; those of the process if not given.

    Returns:
        The exit code: 0 also for a run that diverged, 2 for a mistake of the user's, 130 for an interrupted run.
    """
    if "LOCAL_RANK" not in os.environ:
        return run_command(argv)
    from eva import wandb_client
    from eva.distributed import find_world
    from eva.trial import follow_parent

    world = find_world()
    if world.size == 1:
        return run_command(argv)
    follow_parent()  # torchrun may be killed, and nobody else would end its processes
    code = EXIT_USER_ERROR  # as argparse ends the process
    try:
        code = run_command(argv) if world.rank == 0 else help_first(world)
    finally:
        wandb_client.end()  # once one has ended torchrun ends the others: the first must have nothing left to do
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if world.rank == 0:
            world.tell_end(code)
    return code


def help_first(world: "World") -> int:
    """Helps the first process of several, in silence, and returns its exit code."""
    from eva.experiment import help_train

    try:
        with interruptible(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            return help_train(world)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def run_command(argv: Sequence[str] | None) -> int:
    """Runs one command of eva, and returns its exit code."""
    parser = build_parser()
    arguments, unknown = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    try:
        with interruptible():
            return int(COMMANDS[arguments.command](arguments, unknown))
    except UserError as error:
        for line in str(error).splitlines():
            print(f"eva {arguments.command}: error: {line}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"eva {arguments.command}: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Failure as error:
        print(f"eva {arguments.command}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    except BrokenPipeError:  # who read the output, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" for {error.filename2 or error.filename!r}" if error.filename else ""
        print(
            f"eva {arguments.command}: error: {error.strerror}{where}: make room and do it once more", file=sys.stderr
        )
        return EXIT_USER_ERROR


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is, so that a run that an agent or a batch system ends is closed in order.

    Once either came, whatever goes wrong is its doing, and is taken for it: an interrupted import leaves modules
    half made, and Python and libraries replace the exception by others (`__set_name__`, for one). Outside the main
    thread, and where a signal means something already, nothing is changed.
    """
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    ours = {number: handler for number, handler in usual.items() if signal.getsignal(number) == handler}
    if threading.current_thread() is not threading.main_thread():
        ours = {}
    came: list[type[KeyboardInterrupt]] = []

    def end(number: int, frame: object) -> None:
        came.append(Terminated if number == signal.SIGTERM else KeyboardInterrupt)
        raise came[-1]

    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception:
        if came:
            raise came[-1] from None
        raise
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def build_parser() -> Parser:
    """Returns the parser and those of the commands. Values stay text: `config.resolve` gives them their types."""
    parser = Parser(
        prog="eva", allow_abbrev=False, description="Train small image classifiers, tracked batch by batch."
    )
    parser.add_argument("--version", action="version", version=f"eva {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    train = commands.add_parser("train", help="train a recipe", allow_abbrev=False)
    train.add_argument("--list", action="store_true", help="show the recipes")
    train.add_argument("--show_policy", action="store_true", help="draw samples of the policy instead")
    train.add_argument("--resume", metavar="RUN_FOLDER", help="go on with an interrupted run")
    find_lr = commands.add_parser("find_lr", help="find the range of learning rates", allow_abbrev=False)
    find_lr.add_argument("--show_schedule", action="store_true", help="draw the schedule instead")
    sync = commands.add_parser("sync", help="send W&B what it lacks of a run", allow_abbrev=False)
    sync.add_argument("folders", metavar="RUN_FOLDER", nargs="+", help="run folder, of whatever state")
    evaluate = commands.add_parser("evaluate", help="see what a trained model gets wrong", allow_abbrev=False)
    evaluate.add_argument(
        "target", metavar="TARGET", help="run folder, checkpoint file, or W&B artifact ENTITY/PROJECT/NAME:ALIAS"
    )
    compare = commands.add_parser("compare", help="compare runs in a table and a page", allow_abbrev=False)
    compare.add_argument("targets", metavar="TARGET", nargs="+", help="run folder, folder of runs, or ENTITY/PROJECT")
    compare.add_argument("--metric", help="what the runs are sorted by (default: the best accuracy that most have)")
    compare.add_argument("--out", metavar="FOLDER", default="comparison", help="where the page goes (comparison)")
    compare.add_argument("--publish", action="store_true", help="also make a W&B workspace view and a report")
    compare.add_argument("--project", metavar="ENTITY/PROJECT", help="where to publish (that of the first such TARGET)")
    compare.add_argument("--dry_run", action="store_true", help="write what --publish would make, and send nothing")
    sweep = commands.add_parser("sweep", help="search settings offline, by a W&B sweep YAML", allow_abbrev=False)
    _add_sweep_arguments(sweep)
    doctor = commands.add_parser("doctor", help="check machine, data and configuration", allow_abbrev=False)
    doctor.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    doctor.add_argument("--disk", metavar="PATH", nargs="*", help="instead tell what uses the disk, and what can go")
    agent = commands.add_parser("agent", help="run wandb agents, one for each GPU", allow_abbrev=False)
    agent.add_argument("sweep", metavar="ENTITY/PROJECT/SWEEP", help="the sweep, as `wandb sweep` told it")
    agent.add_argument("--gpus", metavar="0,1", required=True, help="GPUs; each gets an agent")
    agent.add_argument("--count", metavar="N", help="trials of each agent; default: no bound")
    for command in (train, find_lr, doctor):
        command.add_argument("--config", metavar="FILE.yaml", help="settings in a YAML file")
    find_lr.add_argument("--write_sweep", metavar="FILE.yaml", help="also write a sweep around what was found")
    for command in (train, find_lr, evaluate, doctor):
        known = EVALUATION_SETTINGS if command is evaluate else FIELDS
        order = "others are those of the training" if command is evaluate else "--recipe, --config, flags: later wins"
        add_settings(command, known, order)
    return parser


def _add_sweep_arguments(sweep: argparse.ArgumentParser) -> None:
    sweep.description = (
        "Runs a W&B sweep without W&B's server: the same YAML, searched by Optuna, on one machine or on many that "
        "share a disk or a database. Settings of `eva train` that are given too (--data=folder:PATH) hold for all "
        "trials; but --seed, --workers, --out, --name and --project are those of the sweep, as told below."
    )
    sweep.add_argument("file", metavar="FILE.yaml", nargs="?", help="the sweep")
    sweep.add_argument("--check", action="store_true", help="only tell what is wrong, and what the sweep would take")
    sweep.add_argument("--skip_check", action="store_true", help="begin without the trial runs of the check")
    sweep.add_argument("--out", metavar="FOLDER", help="the sweep's folder; default: sweeps-out/NAME")
    sweep.add_argument("--resume", metavar="FOLDER", help="go on with a sweep, or help with one that is running")
    sweep.add_argument("--count", metavar="N", help="trials; default: run_cap, or the whole grid")
    sweep.add_argument("--workers", metavar="K", help="trials that run at the same time (1)")
    sweep.add_argument("--gpus", metavar="0,1", help="GPUs for the workers; by default one worker each")
    sweep.add_argument("--seed", metavar="S", help="seed of the search: the same one proposes the same (0)")
    sweep.add_argument("--storage", metavar="URL", help="journal file or database; default: a journal in the folder")
    sweep.add_argument("--name", help="what the storage calls the sweep; the same name joins it")
    sweep.add_argument("--isolate", action="store_true", help="a process for each trial, by the YAML's own command")
    sweep.add_argument("--retries", metavar="N", help="deaths of its process that a trial survives (3)")
    sweep.add_argument("--retry_failed", action="store_true", help="with --resume: run failed trials once more")
    sweep.add_argument("--repeat_best", metavar="K", help="afterwards repeat the best K configurations with new seeds")
    sweep.add_argument("--seeds", metavar="N", help="seeds of each repeated configuration (3)")
    sweep.add_argument("--repeat_median", action="store_true", help="repeat the median configuration with them")
    sweep.add_argument("--publish", metavar="FOLDER", help="send a sweep's runs to W&B, make a sweep there")
    sweep.add_argument("--project", metavar="[ENTITY/]PROJECT", help="W&B project of the runs, from the beginning on")


def configure(arguments: argparse.Namespace, unknown: Sequence[str]) -> tuple[RunConfig, dict[str, str]]:
    """Returns the configuration that recipe, file and flags make, and the source of each setting that they gave.

    Raises:
        UserError: All problems at once, a line each.
    """
    problems: list[str] = []
    given = given_settings(arguments, unknown, problems)
    with collected(problems):
        config, sources = recipes.configure(Layer("command line", given), arguments.config)
    if problems:
        raise UserError("\n".join(problems))
    return config, sources


def print_settings(config: RunConfig, sources: dict[str, str]) -> None:
    """Prints each setting that differs from its default, with where it came from."""
    for name, field in FIELDS.items():
        value = getattr(config, name)
        if value != default_of(field):
            print(f"{name} = {list(value) if isinstance(value, tuple) else value}  ({sources[name]})")


def run_train(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva train`."""
    if arguments.resume is not None:
        folder = Path(arguments.resume)
        config, sources = configure_again(folder, arguments, unknown)
    else:
        folder = None
        config, sources = configure(arguments, unknown)
    if arguments.list:
        print_recipes()
        return 0
    print_settings(config, sources)
    from eva import experiment
    from eva.distributed import find_world

    if arguments.show_policy:
        result = experiment.show_policy(config)
    else:
        result = experiment.train(config, resume=folder, world=find_world())
    print_result(result)
    return exit_code(result.status)


def exit_code(status: str) -> int:
    """Returns the exit code of a training. Under `wandb agent` want of memory is no failure, or it would give up."""
    if status == "oom":
        return 0 if "WANDB_SWEEP_ID" in os.environ else EXIT_USER_ERROR
    return EXIT_INTERRUPTED if status == "interrupted" else 0


def run_sync(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva sync`."""
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; eva sync --help lists all")
    from eva import experiment

    code = 0
    for folder in arguments.folders:
        result = experiment.sync(Path(folder))
        if result.summary["wandb_lost"]:  # which the tracker has told
            code = EXIT_FAILURE
        else:
            print(f"sent: {folder} (status {result.status})")
    return code


def configure_again(
    folder: Path, arguments: argparse.Namespace, unknown: Sequence[str]
) -> tuple[RunConfig, dict[str, str]]:
    """Returns what `configure` does, for going on with the run of a folder.

    Raises:
        UserError: It is no run folder, or a flag would change what the run computes.
    """
    problems: list[str] = []
    given = given_settings(arguments, unknown, problems)
    changed = [name for name in given if name not in RESUME_SETTINGS] + ["config"] * (arguments.config is not None)
    if changed:
        known = ", ".join(RESUME_SETTINGS)
        problems.append(f"--resume goes on as the run began: only {known} may differ, but got {', '.join(changed)}")
    if problems:
        raise UserError("\n".join(problems))
    return read_config(folder, Layer("command line", given))


def run_find_lr(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva find_lr`."""
    config, sources = configure(arguments, unknown)
    print_settings(config, sources)
    from eva import experiment

    if arguments.show_schedule:
        print(f"schedule: {experiment.show_schedule(config)}")
        return 0
    if arguments.write_sweep is not None:  # told before the test, not after
        if os.path.lexists(arguments.write_sweep):
            raise UserError(f"{arguments.write_sweep!r} is there already; choose another --write_sweep")
        if not os.access(parent := Path(arguments.write_sweep).absolute().parent, os.W_OK | os.X_OK):
            raise UserError(f"cannot write {arguments.write_sweep!r}: there is no folder {str(parent)!r} to write in")
    result = experiment.find_lr(config)
    print_result(result)
    if arguments.write_sweep is not None:
        write_lr_sweep(config, result.summary, Path(arguments.write_sweep))
    return 0


def write_lr_sweep(config: RunConfig, summary: Mapping[str, Any], path: Path) -> None:
    """Writes a sweep YAML whose learning rates lie around those that a range test found.

    Raises:
        UserError: The file can't be written.
    """
    from eva.sweep_file import lr_range_sweep

    source = f"recipe {config.recipe}" if config.recipe else f"{config.model} on {config.data}"
    text = lr_range_sweep(config, summary["lr_min"], summary["lr_max"], source)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"cannot write {str(path)!r}: {error.strerror}") from None
    print(f"sweep: {path}")


def run_evaluate(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva evaluate`."""
    from eva.checkpoint_evaluation import configure_evaluation, evaluate, open_checkpoint

    problems: list[str] = []
    given = given_settings(arguments, unknown, problems)
    with open_checkpoint(arguments.target) as checkpoint:
        with collected(problems):
            config, sources = configure_evaluation(checkpoint, Layer("command line", given))
        if problems:
            raise UserError("\n".join(problems))
        print_settings(config, sources)
        print_result(evaluate(checkpoint, config))
    return 0


def run_compare(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva compare`."""
    if unknown:
        raise UserError(f"unknown argument {unknown[0]!r}; eva compare --help lists all")
    if arguments.dry_run and not arguments.publish:
        raise UserError("--dry_run goes with --publish")
    from eva import api, wandb_runs
    from eva.comparison import table

    named = [target for target in arguments.targets if wandb_runs.names_project(target) and not os.path.exists(target)]
    project = arguments.project or (named[0] if named else None)
    if arguments.project is not None and not wandb_runs.names_project(arguments.project):
        raise UserError(f"project must be ENTITY/PROJECT, but got {arguments.project!r}")
    if arguments.publish and project is None:
        raise UserError("--publish needs a project to publish in: --project=ENTITY/PROJECT")
    comparison = api.compare(*arguments.targets, metric=arguments.metric, out=arguments.out)
    print(table(comparison))
    print(f"data: {Path(arguments.out) / 'compare.json'}")
    print(f"page: {Path(arguments.out) / 'compare.html'}")
    if project is not None and arguments.publish:
        from eva.publish import publish

        for line in publish(comparison, project, Path(arguments.out), dry_run=arguments.dry_run):
            print(line)
    return 0


def run_sweep(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva sweep`."""
    from eva import sweep_command

    return sweep_command.run(arguments, loose_settings(unknown))


def run_agent(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva agent`."""
    from eva.agents import run_agents
    from eva.sweep_command import whole_number

    count = None if arguments.count is None else whole_number("count", arguments.count)
    return run_agents(arguments.sweep, arguments.gpus.split(","), count, unknown)


def run_doctor(arguments: argparse.Namespace, unknown: Sequence[str]) -> int:
    """`eva doctor`."""
    config, _ = configure(arguments, unknown)
    if arguments.disk is not None:
        from eva import disk

        report = disk.report([Path(path) for path in arguments.disk], Path(config.data_dir))
        print(json.dumps(report.to_dict(), indent=2) if arguments.json else disk.table(report), end="")
        return 0
    from eva import doctor

    checks = []
    # What the data's loading has to say is no part of the object.
    with contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext():
        for check in doctor.examine(config):
            checks.append(check)
            if not arguments.json:
                print(doctor.told(check), flush=True)
    healthy = all(check.status != doctor.FAILED for check in checks)
    if arguments.json:
        told = {"healthy": healthy, "checks": [check.to_dict() for check in checks]}
        print(json.dumps(finite(told), indent=2, allow_nan=False))
    else:
        print(doctor.concluded(checks))
    return 0 if healthy else EXIT_FAILURE


COMMANDS: dict[str, Callable[[argparse.Namespace, Sequence[str]], int]] = {
    "train": run_train,
    "find_lr": run_find_lr,
    "sync": run_sync,
    "evaluate": run_evaluate,
    "compare": run_compare,
    "sweep": run_sweep,
    "agent": run_agent,
    "doctor": run_doctor,
}


def print_result(result: Any) -> None:
    """Prints what a run came to, where its files are and how to look at them."""
    summary = result.summary
    print(f"status: {result.status}")
    for split in ("val", "test"):
        last, best = (summary.get(f"{split}_accuracy_{which}") for which in ("last", "best"))
        if last is not None:
            chosen = f"selected on {summary['selected_on']}, epoch {summary['best_epoch']}"
            told = "none, as no loss was finite" if best is None else f"{100 * best:.2f} %, {chosen}"
            print(f"{split} accuracy: last {100 * last:.2f} %, best: {told}")
    evaluation = summary.get("evaluation", {})
    if evaluation:
        tops = ", ".join(f"top-{k} {100 * share:.2f} %" for k, share in evaluation["top_k"].items() if k != "1")
        wrong = evaluation["count"] - round(evaluation["accuracy"] * evaluation["count"])
        # Of logits that are not finite there are none.
        loss, ece = ("none" if evaluation[name] is None else f"{evaluation[name]:.4f}" for name in ("loss", "ece"))
        print(
            f"evaluated on {evaluation['split']}: accuracy {100 * evaluation['accuracy']:.2f} % "
            f"({wrong:,} of {evaluation['count']:,} wrong), {tops}{', ' if tops else ''}loss {loss}, "
            f"ECE {ece}{TTA_TOLD.get(evaluation['tta'], '')}"
        )
    print(f"run folder: {result.folder}")
    for path in sorted((result.folder / "figures").glob("*.png")):
        print(f"figure: {path}")
    if result.status == "stopped":
        print("stopped early by its sweep: what it has counts as its result")
    if result.status == "interrupted":
        print(f"go on with: eva train --resume {result.folder}")
    tracked = evaluation if "wandb_folders" in evaluation else summary
    for folder in tracked["wandb_folders"]:  # a resumed run has one for each part
        print(f"W&B run ({tracked['wandb_mode']}): {folder}")
        print(f"  look at it: wandb leet {folder}")
        if tracked["wandb_mode"] == "offline" and not summary.get("wandb_lost"):
            print(f"  upload it:  wandb sync {folder}")
    if summary.get("wandb_lost"):
        print(f"W&B lacks a part of this run; once it is there: eva sync {result.folder}")


def print_recipes() -> None:
    """Prints a line a recipe: parameters (of ten classes), batch, epochs, schedule and the report's accuracy."""
    from eva.experiment import build_model
    from eva.models import count_parameters

    print(f"{'recipe':24}{'parameters':>12}{'batch':>7}{'epochs':>8}  {'schedule':17}{'report':>8}")
    for name, recipe in RECIPES.items():
        config, _ = resolve([recipe_layer(name)])
        model = build_model(config, num_classes=10)
        report = "-" if recipe.report_accuracy is None else f"{100 * recipe.report_accuracy:.2f} %"
        print(
            f"{name:24}{count_parameters(model):>12,}{config.batch_size:>7}{config.epochs:>8}  "
            f"{config.schedule:17}{report:>8}"
        )


if __name__ == "__main__":
    sys.exit(main())
