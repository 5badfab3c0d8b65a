"""Weights evaluated after their training: those of a run folder, of a lone checkpoint or of a W&B artifact."""

import contextlib
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from eva import data, inspection, loaders, wandb_runs
from eva.checkpoints import load_weights, read_facts
from eva.config import EVALUATION_SETTINGS, FIELDS, Layer, RunConfig, UserError, collected, resolve, to_dict
from eva.data import Dataset, Split
from eva.experiment import EVAL_BATCH_SIZE, Result, build_model
from eva.files import write_json
from eva.hardware import choose_hardware, describe
from eva.policies import Policy, build_policy
from eva.run_folder import git_commit, held, make_run_folder, new_run_id, read_summary, write_config
from eva.tracker import Tracker, WandbTracker, choose_mode


@dataclass(frozen=True)
class Checkpoint:
    """Weights to evaluate.

    Attributes:
        path: Their file.
        facts: What they say about themselves (`checkpoint_facts`, and the metrics they were chosen by).
        origin: What the user calls them.
        artifact: The W&B artifact, NAME:ALIAS, that they are or that their run may have logged; None for a lone file.
        folder: The run folder that they lie in, which then takes the evaluation; None for others.
    """

    path: Path
    facts: Mapping[str, Any]
    origin: str
    artifact: str | None
    folder: Path | None


@contextlib.contextmanager
def open_checkpoint(target: str) -> Iterator[Checkpoint]:
    """Finds the weights of a run folder, a checkpoint file or a W&B artifact (ENTITY/PROJECT/NAME:ALIAS).

    What was downloaded is removed in the end.

    Raises:
        UserError: It is none of these, or the weights don't say which network they belong to.
    """
    path = Path(target)
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:  # the name is too long, or lies where one may not look
        raise UserError(f"cannot look for {target!r}: {error.strerror}") from None
    with contextlib.ExitStack() as stack:
        artifact: str | None = None
        folder: Path | None = None
        if is_folder:
            folder, artifact = path, f"model-{read_summary(path)['wandb_id']}:best"
            path = path / "best.safetensors"
            if not path.exists():
                raise UserError(f"the run in {target!r} has no best.safetensors: no epoch of a training ended in it")
        elif not exists and wandb_runs.names_artifact(target):
            artifact = target
            downloads = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            path = wandb_runs.download_checkpoint(target, downloads)
        elif not exists:
            raise UserError(f"{target!r} is no run folder, no checkpoint and no W&B artifact (E/PROJECT/NAME:ALIAS)")
        check_readable(path)
        facts = read_facts(path)
        if wrong := wrong_facts(facts):
            raise UserError(f"checkpoint {str(path)!r} is of another version of eva: it lacks {', '.join(wrong)}")
        yield Checkpoint(path, facts, target, artifact, folder)


def check_readable(path: Path) -> None:
    """Checks that a file of weights may be read, and is one: safetensors says of all others that they don't exist.

    Raises:
        UserError: It may not be, or is none.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except OSError as error:
        raise UserError(f"{str(path)!r} is not a readable checkpoint: {error.strerror}") from None


def wrong_facts(facts: Mapping[str, Any]) -> list[str]:
    """Returns the names of the facts that an evaluation needs and that are missing or are no such thing."""
    kinds = {"config": dict, "run": str, "classes": list, "mean": list, "std": list, "data_fingerprint": str}
    inner = {"classes": str, "mean": float, "std": float}
    wrong = [name for name, kind in kinds.items() if not isinstance(facts.get(name), kind)]
    wrong += [name for name in inner.keys() - wrong if {type(each) for each in facts[name]} != {inner[name]}]
    for name, least in (("mean", -math.inf), ("std", 0.0)):
        if name not in wrong and not (len(facts[name]) == 3 and all(least < value < math.inf for value in facts[name])):
            wrong.append(name)
    return [name for name in kinds if name in wrong]


def configure_evaluation(checkpoint: Checkpoint, layer: Layer) -> tuple[RunConfig, dict[str, str]]:
    """Returns the settings that the weights were trained with, changed as `layer` says, and where each came from.

    Raises:
        UserError: A setting is unknown or impossible, or none that an evaluation can change; all problems at once.
    """
    problems = []
    names = [name for name in layer.values if name.partition(".")[0] in FIELDS]
    if fixed := [name for name in names if name not in EVALUATION_SETTINGS]:
        known = ", ".join(EVALUATION_SETTINGS)
        problems.append(f"an evaluation can change {known}, but got {', '.join(fixed)}")
    trained = {name: value for name, value in checkpoint.facts["config"].items() if name not in ("out", "name")}
    changes = {name: value for name, value in layer.values.items() if name not in fixed}
    with collected(problems):
        config, sources = resolve([Layer(f"checkpoint {checkpoint.origin}", trained), Layer(layer.source, changes)])
    if problems:
        raise UserError("\n".join(problems))
    return config, sources


def evaluate(checkpoint: Checkpoint, config: RunConfig) -> Result:
    """Evaluates weights on `config.split`, and leaves predictions, figures and tables in a run folder and in W&B.

    The run folder is that of the weights, whose earlier evaluation is replaced, unless `config.out` names a new one
    or the weights lie in none. Images are normalized with the statistics that the network was trained with.

    Raises:
        UserError: The data don't fit the weights, or the folder can't be written.
    """
    mode, remark = choose_mode(config.tracking)
    chosen = choose_hardware(config)
    facts = checkpoint.facts
    dataset = data.load_dataset(config.data, Path(config.data_dir), progress=True)
    if list(dataset.classes) != facts["classes"]:
        raise UserError(
            f"{config.data!r} has the classes {', '.join(dataset.classes)}, but the network was trained on "
            f"{', '.join(map(str, facts['classes']))}"
        )
    split = choose_split(dataset, config)
    model, plain = trained_model(checkpoint, config)
    model = model.to(chosen.device, memory_format=chosen.memory_format)  # type: ignore[call-overload]
    workers = 0 if config.workers is None and chosen.device.type == "cpu" else config.workers
    batches = loaders.eval_loader(split, plain, EVAL_BATCH_SIZE, workers, chosen.device)
    if remark:
        print(remark)
    if dataset.fingerprint != facts["data_fingerprint"]:
        print("note: these are not the data that the network was trained on (their fingerprints differ)")

    in_place = checkpoint.folder is not None and config.out is None
    run_id, folder = make_run_folder(config) if checkpoint.folder is None or config.out else (None, checkpoint.folder)
    with held(folder):  # a training in it would write the same files
        if run_id is None:
            run_id, summary = new_run_id(), read_summary(folder)
        else:
            summary = {"status": "finished", "job": "evaluate", "wandb_id": run_id}
            summary |= {"wandb_mode": mode, "wandb_folders": []}
        source = {"checkpoint": checkpoint.origin, "checkpoint_of": facts["run"], "into": summary["wandb_id"]}
        about = {**to_dict(config), **source, "hardware": describe(chosen), "git_commit": git_commit()}
        name = config.name or f"evaluate-{facts['run']}"
        tracker = Tracker()
        if mode != "disabled":
            tracker = WandbTracker(replace(config, name=name), about, "evaluate", folder, run_id, mode)
        found = inspection.inspect(model, split, batches, config, chosen, dataset.classes, dataset.fingerprint)
        with tracker:
            if checkpoint.artifact and not tracker.use_artifact(checkpoint.artifact) and mode == "online":
                print(f"W&B has no artifact {checkpoint.artifact}: the evaluation is logged without it")
            if not in_place:
                shutil.copyfile(checkpoint.path, folder / "best.safetensors")
                write_config(folder, config)
            summary.update(inspection.write(found, folder))
            write_json(folder / "summary.json", summary)
            inspection.log(found, folder, tracker, summary["wandb_id"], source)
            tracker.summarize({"status": "finished", **{name: summary[name] for name in ("evaluation",)}})
        tracked = {"wandb_mode": tracker.mode, "wandb_folders": [str(tracker.folder)] if tracker.folder else []}
        summary.update({**({} if in_place else tracked), "evaluation": {**summary["evaluation"], **tracked}})
        write_json(folder / "summary.json", summary)
    return Result(summary["status"], folder, summary)


def trained_model(checkpoint: Checkpoint, config: RunConfig) -> tuple[nn.Module, Policy]:
    """Returns the network with its weights, on the CPU in eval mode, and the policy that its images need.

    Raises:
        UserError: The weights are not those of the network that they say they belong to.
    """
    facts = checkpoint.facts
    model = build_model(config, len(facts["classes"]))
    load_weights(checkpoint.path, model)
    return model.eval(), build_policy("test", tuple(facts["mean"]), tuple(facts["std"]))


def choose_split(dataset: Dataset, config: RunConfig) -> Split:
    """Returns the split that `config` evaluates; train as it is trained on, without val and with `train_limit`.

    Raises:
        UserError: Some class is too small to hold out val.
    """
    if config.split == "test":
        return dataset.test
    train, val = data.hold_out(dataset.train, config.val_fraction, len(dataset.classes))
    if config.split == "val":
        return val
    if config.train_limit is None:
        return train
    return data.limit(train, min(config.train_limit, len(train)), len(dataset.classes))  # other data may be fewer
