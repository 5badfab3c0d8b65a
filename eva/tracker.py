"""Where rows, pictures and files of a run go: W&B, memory, or nowhere. Only this module logs to wandb."""

import html
import netrc
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from eva.config import RunConfig, UserError

Picture = NDArray[np.uint8]
Names = Sequence[str]
Lines = Mapping[str, Sequence[float]]

# What W&B shows of the pictures under one key, and of the rows of a logged table.
MAX_IMAGES = 108
MAX_ROWS = 10_000


@dataclass(frozen=True)
class Table:
    """Rows of plain values and pictures (uint8 RGB arrays), under the same columns in every run."""

    columns: tuple[str, ...]
    rows: Sequence[Sequence[Any]]


class Tracker:
    """What a run tells about itself. This one is silent; it is entered before training and left after it."""

    mode = "disabled"
    folder: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes the run, as failed if an exception passes through."""

    def configure(self, values: Mapping[str, Any]) -> None:
        """Changes values of the run's configuration that were found only now."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs one row of numbers. Its axes are its own `trainer/step` and `epoch`, never W&B's step."""

    def log_image(self, key: str, path: Path) -> None:
        """Logs a picture file under a key."""

    def log_text(self, key: str, text: str) -> None:
        """Logs preformatted text under a key."""

    def log_images(self, key: str, images: Sequence[tuple[Picture, str]]) -> None:
        """Logs pictures with their captions under one key, if there are any; W&B shows the first 108."""

    def log_table(self, key: str, table: Table) -> None:
        """Logs a table under a key."""

    def log_confusion_matrix(self, key: str, labels: Sequence[int], predicted: Sequence[int], classes: Names) -> None:
        """Logs W&B's own chart of a confusion matrix, from the class indices of every image."""

    def log_lines(
        self, key: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, of: str
    ) -> None:
        """Logs W&B's own chart of named lines over the same x, whose axis is called `of`."""

    def log_bars(self, key: str, bars: Mapping[str, float], title: str, of: Names) -> None:
        """Logs W&B's own chart of named bars; `of` names what the bars are and what their length is."""

    def log_artifact(
        self,
        name: str,
        kind: str,
        paths: Sequence[Path],
        metadata: Mapping[str, Any],
        aliases: Sequence[str],
        tables: Mapping[str, Table] | None = None,
    ) -> None:
        """Logs files, and tables by name, as a versioned artifact of type `kind`, with `aliases`."""

    def use_artifact(self, name: str) -> bool:
        """Tells W&B that this run builds on an artifact (NAME:ALIAS); returns whether it could be told.

        Offline there is no way to tell.
        """
        return False

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Sets values of the run's summary."""


class RecordingTracker(Tracker):
    """Keeps rows, summary and the keys of everything else in memory."""

    mode = "memory"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.keys: list[str] = []
        self.tables: dict[str, Table] = {}

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def log_image(self, key: str, path: Path) -> None:
        self.keys.append(key)

    def log_text(self, key: str, text: str) -> None:
        self.keys.append(key)

    def log_images(self, key: str, images: Sequence[tuple[Picture, str]]) -> None:
        self.keys.append(key)

    def log_table(self, key: str, table: Table) -> None:
        self.keys.append(key)
        self.tables[key] = table

    def log_confusion_matrix(self, key: str, labels: Sequence[int], predicted: Sequence[int], classes: Names) -> None:
        self.keys.append(key)

    def log_lines(
        self, key: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, of: str
    ) -> None:
        self.keys.append(key)

    def log_bars(self, key: str, bars: Mapping[str, float], title: str, of: Names) -> None:
        self.keys.append(key)

    def log_artifact(
        self,
        name: str,
        kind: str,
        paths: Sequence[Path],
        metadata: Mapping[str, Any],
        aliases: Sequence[str],
        tables: Mapping[str, Table] | None = None,
    ) -> None:
        self.keys.append(name)

    def summarize(self, values: Mapping[str, Any]) -> None:
        self.summary.update(values)


# Axes of the charts: a row a batch goes by trainer/step, a row an epoch by epoch.
STEP_METRICS = ("train/loss", "train/accuracy", "lr", "momentum", "images_per_second", "seconds")
EPOCH_METRICS = ("train_epoch/*", "val/*", "test/*")


class WandbTracker(Tracker):
    """A run of W&B, online or offline, whose files all lie below the run folder."""

    def __init__(
        self, config: RunConfig, facts: Mapping[str, Any], job: str, run_folder: Path, run_id: str, mode: str
    ) -> None:
        self.mode = mode
        self._config, self._facts, self._job = config, facts, job
        self._run_folder, self.run_id = run_folder, run_id

    def __enter__(self) -> Self:
        # Payloads of artifacts wait in the data folder until they are uploaded: an offline run must carry them along.
        below = self._run_folder.absolute() / "wandb"
        folders = {f"WANDB_{name.upper()}_DIR": str(below / name) for name in ("data", "cache", "artifact")}
        self._set_here = [variable for variable in folders if variable not in os.environ]
        os.environ.update({variable: folders[variable] for variable in self._set_here})
        if self.mode == "offline":  # or wandb looks up where it would send reports of its crashes
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=self._config.project or os.environ.get("WANDB_PROJECT") or "eva",
                entity=self._config.entity,
                group=self._config.group,
                job_type=self._job,
                # A folder that somebody named is a better name than the two words that W&B would draw.
                name=self._config.name or (Path(self._config.out).name if self._config.out else None),
                tags=list(self._config.tags) or None,
                id=self.run_id,
                resume="allow" if self.mode == "online" else None,
                dir=str(self._run_folder),
                mode=self.mode,  # type: ignore[arg-type]
                config=dict(self._facts),
                settings=wandb.Settings(
                    silent=self.mode == "offline", quiet=True, stop_fn=_end_trial if under_agent() else None
                ),
            )
        except wandb.errors.Error as error:
            self._forget_folders()
            reason = " ".join(str(error).split())
            raise UserError(f"W&B did not begin the run ({reason}); --tracking=offline needs no account") from None
        self.run_id = self._run.id  # within a sweep wandb has the last word
        self.folder = Path(self._run.settings.sync_dir)
        self._run.define_metric("trainer/step", hidden=True)
        self._run.define_metric("epoch", hidden=True)
        for metric in STEP_METRICS:
            self._run.define_metric(metric, step_metric="trainer/step")
        for metric in EPOCH_METRICS:
            self._run.define_metric(metric, step_metric="epoch")
        self._run.define_metric("lr_range/lr", hidden=True)
        self._run.define_metric("lr_range/*", step_metric="lr_range/lr")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)
        self._forget_folders()

    def _forget_folders(self) -> None:
        for variable in self._set_here:  # the next run of this process has folders of its own
            os.environ.pop(variable, None)

    def configure(self, values: Mapping[str, Any]) -> None:
        self._run.config.update(dict(values), allow_val_change=True)  # type: ignore[no-untyped-call]

    def log(self, row: Mapping[str, Any]) -> None:
        self._run.log(dict(row))

    def log_image(self, key: str, path: Path) -> None:
        self._run.log({key: self._wandb.Image(str(path))})

    def log_text(self, key: str, text: str) -> None:
        # Escaped, so that no markup in it is executed.
        self._run.log({key: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def log_images(self, key: str, images: Sequence[tuple[Picture, str]]) -> None:
        if images:  # an empty list would be logged as a value of another kind
            shown = [self._wandb.Image(picture, caption=caption) for picture, caption in images[:MAX_IMAGES]]
            self._run.log({key: shown})

    def log_table(self, key: str, table: Table) -> None:
        self._run.log({key: self._table(table)})

    def _table(self, table: Table) -> Any:
        # One file a picture: JPEG for those that are larger than an image of the data, lossless for these.
        def cell(value: Any) -> Any:
            if not isinstance(value, np.ndarray):
                return value
            return self._wandb.Image(value, file_type="png" if len(value) <= 32 else "jpg")

        return self._wandb.Table(
            columns=list(table.columns), data=[[cell(value) for value in row] for row in table.rows]
        )

    def log_confusion_matrix(self, key: str, labels: Sequence[int], predicted: Sequence[int], classes: Names) -> None:
        chart = self._wandb.plot.confusion_matrix(
            y_true=list(labels), preds=list(predicted), class_names=list(classes), title="confusion matrix"
        )
        self._run.log({key: chart})

    def log_lines(
        self, key: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, of: str
    ) -> None:
        # wandb would take one empty list of x for no list at all.
        xs, ys = [list(x) for _ in lines], [list(line) for line in lines.values()]
        chart = self._wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname=of)
        self._run.log({key: chart})

    def log_bars(self, key: str, bars: Mapping[str, float], title: str, of: Names) -> None:
        table = self._wandb.Table(columns=list(of), data=[[name, value] for name, value in bars.items()])
        self._run.log({key: self._wandb.plot.bar(table, of[0], of[1], title=title)})

    def log_artifact(
        self,
        name: str,
        kind: str,
        paths: Sequence[Path],
        metadata: Mapping[str, Any],
        aliases: Sequence[str],
        tables: Mapping[str, Table] | None = None,
    ) -> None:
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
        for path in paths:
            artifact.add_file(str(path))
        for key, table in (tables or {}).items():
            artifact.add(self._table(table), key)
        self._run.log_artifact(artifact, aliases=list(aliases))

    def use_artifact(self, name: str) -> bool:
        if self.mode != "online":
            return False
        try:
            self._run.use_artifact(name)
        except (self._wandb.errors.Error, ValueError):  # there is none of this name
            return False
        return True

    def summarize(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))


def under_agent() -> bool:
    """Tells whether `wandb agent` started this process, as a trial of its sweep."""
    return "WANDB_SWEEP_ID" in os.environ


def _end_trial() -> None:
    """Ends this run as its agent does, when W&B's server says so before the agent has heard of it."""
    os.kill(os.getpid(), signal.SIGTERM)


def choose_mode(tracking: str) -> tuple[str, str]:
    """Returns the W&B mode of a run (online, offline or disabled), and one line saying why, or nothing to say.

    "auto" follows WANDB_MODE where it is set; otherwise it is online if this machine knows an account's key.

    Raises:
        UserError: Online was asked for by name, but there is no account: wandb would ask for one.
    """
    mode, remark = tracking, ""
    if tracking == "auto":
        wish = os.environ.get("WANDB_MODE", "").lower()
        mode = {"dryrun": "offline", "run": "online"}.get(wish, wish)
        if mode not in ("online", "offline", "disabled"):
            if _has_account():
                return "online", ""
            return "offline", "W&B: offline, as no account is set up here (`wandb login` sets one up)"
        remark = f"W&B: {mode}, as WANDB_MODE says"
    if mode == "online" and not _has_account():
        raise UserError("W&B online needs an account: run `wandb login`, or choose --tracking=offline")
    return mode, remark


def _has_account() -> bool:
    """Tells whether wandb would find credentials, without asking anybody: its environment, settings, or netrc."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    import wandb

    settings = wandb.setup().settings
    if settings.api_key:
        return True
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    server = urlsplit(settings.base_url).netloc
    try:
        # wandb takes an entry for the old name of its public server for the new one too.
        names = (server, "api.wandb.ai") if server == "api.forge.coreweave.com" else (server,)
        return any(netrc.netrc(path).authenticators(name) for name in names)
    except (OSError, netrc.NetrcParseError):
        return False
