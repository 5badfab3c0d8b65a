"""Where rows, pictures and files of a run go: W&B, memory, or nowhere. Only this module logs to wandb."""

import contextlib
import glob
import html
import logging
import netrc
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from eva import wandb_client
from eva.config import RunConfig, UserError
from eva.wandb_log import holding, mend

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
    lost = False  # whether W&B lacks something of the run that it was to get

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

    def preempted(self) -> None:
        """Says that the machine is being taken away: the run goes on later, and there are seconds left to close it."""


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


# Seconds that W&B may take to close a run after a Ctrl-C, and when the machine is taken away.
CTRL_C_SECONDS = 2.0
PREEMPTED_SECONDS = 5.0
# Seconds that one call may take while the run goes on: a client that needs more takes nothing at all.
STUCK_SECONDS = 60.0
# How much of the time that W&B has its client may take to try and to give up by itself, with the better message.
SHARE = 0.8


class WandbTracker(Tracker):
    """A run of W&B, online or offline, whose files all lie below the run folder, or below `wandb_dir`.

    A run that goes on after its process died is told everything once more, and sends what W&B lacks: what is logged
    comes in the same order every time, so its number, which is W&B's step, tells whether W&B has it.

    W&B's failures are told on stderr and never raised. What can't begin online begins offline, or else not at all, and
    once something was not taken nothing more is sent: W&B has the first rows of the run, without a gap.
    """

    def __init__(
        self,
        config: RunConfig,
        facts: Mapping[str, Any],
        job: str,
        run_folder: Path,
        run_id: str,
        mode: str,
        falls_back: bool = True,
    ) -> None:
        """Takes what the run is; W&B is asked when it is entered.

        Args:
            config: The run's settings.
            facts: The values of W&B's config.
            job: W&B's job type.
            run_folder: eva's folder of the run.
            run_id: W&B's id of it.
            mode: online or offline; once it is entered `mode` says what came of it, perhaps disabled.
            falls_back: Whether a run that can't begin online begins otherwise; if not, a UserError says so.
        """
        self.mode = mode
        self._config, self._facts, self._job = config, facts, job
        self._run_folder, self._root, self.run_id = run_folder, wandb_root(config, run_folder), run_id
        self._run: Any = None
        self._step = self._known = self._offline_steps = 0
        self._warnings: list[str] = []
        self._artifacts: list[tuple[Any, list[str]]] = []
        self._falls_back, self._preempted = falls_back, False
        self._seconds = config.tracking_timeout

    def __enter__(self) -> Self:
        self._set_folders()
        earlier = mended_parts(self._root, self.run_id)
        self._offline_steps = max(earlier.values(), default=0)
        sent = len(parts_of(self._root, self.run_id)) > len(earlier)
        if self.mode == "online":
            self._begin_online(sent)
        elif sent:  # nobody here knows how far W&B got with it
            self._leave_out("a part of this run was sent to W&B, and an offline part can't go on there")
        if self.mode == "offline":
            self._begin_offline()
        return self

    def _begin_online(self, sent: bool) -> None:
        """Begins online; where that fails the run becomes an offline one, unless a part of it was sent already.

        Raises:
            UserError: That fails, and nothing else was wanted.
        """
        try:
            self._begin()
            self._known = self._run.starting_step
        except Exception as error:
            reason = f"W&B did not begin the run ({_reason(error)})"
            if not self._falls_back:
                self._forget_folders()
                raise UserError(f"{reason}: nothing was sent") from None
            if sent:
                self._leave_out(reason)
            else:
                self.mode = "offline"
                _tell(f"{reason}: it is tracked offline")

    def _begin_offline(self) -> None:
        """Begins offline.

        Raises:
            UserError: wandb does not take the settings.
        """
        try:
            self._begin()
            self._known = self._offline_steps
        except self._wandb.errors.UsageError as error:
            self._forget_folders()
            raise UserError(f"W&B does not take the run: {_reason(error)}") from None
        except Exception as error:
            self._leave_out(f"W&B did not begin the run ({_reason(error)})")

    def _set_folders(self) -> None:
        """Tells wandb its folders, by its environment.

        Raises:
            UserError: That which was asked for can't be written: wandb would take another.
        """
        if self._config.wandb_dir is not None:
            try:
                self._root.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"wandb_dir {str(self._root)!r} can't be made: {error.strerror}") from None
            if not os.access(self._root, os.W_OK | os.X_OK):
                raise UserError(f"wandb_dir {str(self._root)!r} must be a folder that can be written")
        # Payloads of artifacts wait in the data folder until they are uploaded: an offline run must carry them along.
        below = self._root.absolute() / "wandb"
        folders = {f"WANDB_{name.upper()}_DIR": str(below / name) for name in ("data", "cache", "artifact")}
        self._set_here = [variable for variable in folders if variable not in os.environ]
        os.environ.update({variable: folders[variable] for variable in self._set_here})
        if self.mode == "offline":  # or wandb looks up where it would send reports of its crashes
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        self._wandb = wandb

    def _forget_folders(self) -> None:
        for variable in self._set_here:  # the next run of this process has folders of its own
            os.environ.pop(variable, None)

    def _begin(self) -> None:
        """Begins the run in W&B in the time that there is; of a failure nothing is left, neither client nor folder."""
        before = parts_of(self._root, self.run_id)
        try:
            with wandb_client.at_most(self._seconds), _silent_logging():
                wandb_client.setup()
                # What wandb would print comes with advice that does not fit here.
                self._wandb.termsetup(self._wandb.Settings(silent=True), _Notes(self._warnings))
                self._run = self._wandb.init(
                    project=self._config.project or os.environ.get("WANDB_PROJECT") or "eva",
                    entity=self._config.entity,
                    group=self._config.group,
                    job_type=self._job,
                    # A folder that somebody named is a better name than the two words that W&B would draw.
                    name=self._config.name or (Path(self._config.out).absolute().name if self._config.out else None),
                    tags=list(self._config.tags) or None,
                    id=self.run_id,
                    resume="allow" if self.mode == "online" else None,
                    dir=str(self._root),
                    mode=self.mode,  # type: ignore[arg-type]
                    config=dict(self._facts),
                    settings=self._wandb.Settings(
                        silent=True,
                        quiet=True,
                        init_timeout=SHARE * self._seconds,
                        finish_timeout=SHARE * self._seconds,
                        finish_timeout_raises=True,
                        stop_fn=_end_trial if under_agent() else None,
                    ),
                )
                wandb_client.end_at_exit()
                for handler in logging.getLogger("wandb").handlers:  # on a full disk each line would be a traceback
                    handler.handleError = lambda record: None  # type: ignore[method-assign]
                self._define_axes()
        except BaseException as error:
            self._run = None
            wandb_client.end(0.0)
            for part in parts_of(self._root, self.run_id):
                if part not in before:
                    shutil.rmtree(part, ignore_errors=True)
            if not isinstance(error, Exception):
                self._forget_folders()
            raise
        self.run_id = self._run.id  # within a sweep wandb has the last word
        self.folder = Path(self._run.settings.sync_dir)
        if self.mode == "online":
            print(f"W&B: {self._run.url}")

    def _define_axes(self) -> None:
        self._run.define_metric("trainer/step", hidden=True)
        self._run.define_metric("epoch", hidden=True)
        for metric in STEP_METRICS:
            self._run.define_metric(metric, step_metric="trainer/step")
        for metric in EPOCH_METRICS:
            self._run.define_metric(metric, step_metric="epoch")
        self._run.define_metric("lr_range/lr", hidden=True)
        self._run.define_metric("lr_range/*", step_metric="lr_range/lr")

    def _leave_out(self, reason: str) -> None:
        """Goes on without W&B."""
        self.mode, self.lost = "disabled", True
        _tell(f"{reason}: it goes on without W&B; {self._remedy()}")

    def _remedy(self) -> str:
        """Returns how W&B gets what it lacks."""
        if self._job == "train":
            return f"send what is missing with: eva sync {self._run_folder}"
        return "do it once more to have it there"

    def preempted(self) -> None:
        self._preempted = True
        self._do(lambda: None, lambda _: self._run.mark_preempting())
        self._seconds = min(self._seconds, PREEMPTED_SECONDS)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._run is not None:
                self._finish(kind)
        finally:
            self._forget_folders()

    def _finish(self, kind: type[BaseException] | None) -> None:
        """Closes the run, which sends what is left, in the time that there is; tells what W&B lacks then."""
        if kind is not None and issubclass(kind, KeyboardInterrupt):
            self._seconds = min(self._seconds, CTRL_C_SECONDS)
        try:
            with wandb_client.at_most(self._seconds):
                with self._attempt("not everything was sent"):
                    for artifact, aliases in self._artifacts:
                        self._run.log_artifact(artifact, aliases=aliases)
                with self._attempt("not everything was sent"):
                    if not (self.lost and wandb_client.is_gone()):
                        # A preempted run counts as one, to be gone on with, if it does not end as a finished one does.
                        self._run.finish(exit_code=0 if kind is None and not self._preempted else 1)
                        self._check_delivery()
        except BaseException:  # one more Ctrl-C
            self.lost = True
            raise
        finally:
            self._run = None
            if self.lost:
                wandb_client.end(0.0)  # it would go on trying
                _tell(f"W&B lacks a part of this run; {self._remedy()}")
        if self.mode == "online" and not self.lost and self._step >= self._offline_steps:
            for part in parts_of(self._root, self.run_id):  # or `wandb sync` would send them once more
                (part / f"run-{self.run_id}.wandb.synced").touch()

    def _check_delivery(self) -> None:
        """Raises what wandb only prints, and what its client doesn't even notice: that the file lacks rows."""
        if self._warnings:
            raise ConnectionError(self._warnings[0])
        if self.mode == "offline" and self.folder is not None:
            deadline = time.monotonic() + wandb_client.LEAVE_SECONDS
            while not (kept := holding(self.folder / f"run-{self.run_id}.wandb")).ended and time.monotonic() < deadline:
                time.sleep(0.02)  # the client still writes
            if not kept.ended or kept.rows < self._step - self._known:
                raise OSError(f"{self.folder} holds {kept.rows} rows of {self._step - self._known}")

    @contextlib.contextmanager
    def _attempt(self, outcome: str) -> Iterator[None]:
        """Tells what goes wrong; only the first is news."""
        try:
            yield
        except Exception as error:
            if not self.lost:
                _tell(f"W&B: {outcome} ({_reason(error)})")
            self.lost = True
            if wandb_client.is_gone():  # or all that is printed would go on being offered to it
                with contextlib.suppress(Exception):
                    self._run._console_stop()

    def _do(self, make: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        """Makes something and sends it, as long as W&B takes what it is sent."""
        if self._run is not None and not self.lost:
            with self._attempt("nothing more is sent, and the run goes on"):
                made = make()  # takes its time
                with wandb_client.at_most(STUCK_SECONDS):
                    send(made)

    def configure(self, values: Mapping[str, Any]) -> None:
        self._do(lambda: dict(values), lambda made: self._run.config.update(made, allow_val_change=True))

    def _send(self, make: Callable[[], Mapping[str, Any]]) -> None:
        """Logs what `make` returns as the next step, unless W&B has that step."""
        step, self._step = self._step, self._step + 1
        if step >= self._known:
            self._do(make, lambda row: self._run.log(dict(row), step=step, commit=True))

    def log(self, row: Mapping[str, Any]) -> None:
        self._send(lambda: row)

    def log_image(self, key: str, path: Path) -> None:
        self._send(lambda: {key: self._wandb.Image(str(path))})

    def log_text(self, key: str, text: str) -> None:
        # Escaped, so that no markup in it is executed.
        self._send(lambda: {key: self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)})

    def log_images(self, key: str, images: Sequence[tuple[Picture, str]]) -> None:
        if images:  # an empty list would be logged as a value of another kind
            shown = images[:MAX_IMAGES]
            self._send(lambda: {key: [self._wandb.Image(picture, caption=caption) for picture, caption in shown]})

    def log_table(self, key: str, table: Table) -> None:
        self._send(lambda: {key: self._table(table)})

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
        chart = partial(
            self._wandb.plot.confusion_matrix,
            y_true=list(labels),
            preds=list(predicted),
            class_names=list(classes),
            title="confusion matrix",
        )
        self._send(lambda: {key: chart()})

    def log_lines(
        self, key: str, x: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, of: str
    ) -> None:
        # wandb would take one empty list of x for no list at all.
        xs, ys = [list(x) for _ in lines], [list(line) for line in lines.values()]
        chart = partial(self._wandb.plot.line_series, xs=xs, ys=ys, keys=list(lines), title=title, xname=of)
        self._send(lambda: {key: chart()})

    def log_bars(self, key: str, bars: Mapping[str, float], title: str, of: Names) -> None:
        def chart() -> Any:
            table = self._wandb.Table(columns=list(of), data=[[name, value] for name, value in bars.items()])
            return self._wandb.plot.bar(table, of[0], of[1], title=title)

        self._send(lambda: {key: chart()})

    def log_artifact(
        self,
        name: str,
        kind: str,
        paths: Sequence[Path],
        metadata: Mapping[str, Any],
        aliases: Sequence[str],
        tables: Mapping[str, Table] | None = None,
    ) -> None:
        # Its files are copied now; the rest waits, as wandb asks the server about each one first.
        def make() -> Any:
            artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
            for path in paths:
                artifact.add_file(str(path))
            for key, table in (tables or {}).items():
                artifact.add(self._table(table), key)
            return artifact

        self._do(make, lambda artifact: self._artifacts.append((artifact, list(aliases))))

    def use_artifact(self, name: str) -> bool:
        found = False

        def use(_: object) -> None:
            nonlocal found
            with contextlib.suppress(self._wandb.errors.Error, ValueError):  # there is none of this name
                self._run.use_artifact(name)
                found = True

        if self.mode == "online":
            self._do(lambda: None, use)
        return found

    def summarize(self, values: Mapping[str, Any]) -> None:
        self._do(lambda: dict(values), lambda made: self._run.summary.update(made))


class _Notes:
    """Takes what wandb would print, and keeps what tells of data that were not sent."""

    def __init__(self, kept: list[str]) -> None:
        self._kept = kept

    def info(self, message: str) -> None:
        """Lets it pass."""

    def warning(self, message: str) -> None:
        """Keeps what the client says once it has given up sending, and no other warning."""
        if "will not be synced" in message:
            self._kept.append(message.partition(". Use ")[0])

    def error(self, message: str) -> None:
        """Lets it pass: it is raised too."""


@contextlib.contextmanager
def _silent_logging() -> Iterator[None]:
    """Makes Python's logging bear in silence what it can't write: on a full disk each line would be a traceback."""
    before, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        yield
    finally:
        logging.raiseExceptions = before


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _reason(error: Exception) -> str:
    """Returns what went wrong in one line, without wandb's advice."""
    line = " ".join(str(error).partition("\nConsider ")[0].split())[:300]
    return line or "its client did not answer in time"


def wandb_root(config: RunConfig, run_folder: Path) -> Path:
    """Returns the folder below which W&B's folders of a run lie, in `wandb`."""
    return run_folder if config.wandb_dir is None else Path(config.wandb_dir)


def parts_of(root: Path, run_id: str, prefix: str = "") -> list[Path]:
    """Returns W&B's folders of a run, the oldest first: one for each time that it was begun or gone on with.

    Args:
        root: Where they lie, as `wandb_root` returns it: the run folder unless `wandb_dir` names another.
        run_id: W&B's id of it.
        prefix: "offline-" for those that were made offline only.
    """
    folders = (root / "wandb").glob(f"{prefix or '*'}run-*-{glob.escape(run_id)}")
    return sorted(folders, key=lambda folder: folder.name.removeprefix("offline-"))


def mended_parts(root: Path, run_id: str) -> dict[Path, int]:
    """Makes the offline parts of a run such that `wandb sync` takes them one after the other, also of a killed process.

    A part in which nothing came to the disk is removed, as it would make wandb give up on the others; one that was
    sent already as far as it goes is marked as sent, or it would be sent once more.

    Returns:
        For each part that is left, the step after that of its last row.
    """
    steps = {}
    for folder in parts_of(root, run_id, "offline-"):
        log = folder / f"run-{run_id}.wandb"
        step = mend(log) if log.exists() else None
        if step is None:
            shutil.rmtree(folder)
            continue
        steps[folder] = step
        if log.with_name(f"{log.name}.syncstate").exists():
            log.with_name(f"{log.name}.synced").touch()
    return steps


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
    settings = wandb_client.setup()
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
