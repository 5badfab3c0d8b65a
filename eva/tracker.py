"""Where rows, pictures and files of a run go: W&B, memory, or nowhere. Only this module imports wandb."""

import html
import netrc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from eva.config import RunConfig, UserError


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

    def log_artifact(
        self, name: str, kind: str, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]
    ) -> None:
        """Logs a file as a versioned artifact of type `kind`, with `aliases`."""

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Sets values of the run's summary."""


class RecordingTracker(Tracker):
    """Keeps rows, summary and the keys of everything else in memory."""

    mode = "memory"

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.keys: list[str] = []

    def log(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def log_image(self, key: str, path: Path) -> None:
        self.keys.append(key)

    def log_text(self, key: str, text: str) -> None:
        self.keys.append(key)

    def log_artifact(
        self, name: str, kind: str, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]
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
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=self._config.project or os.environ.get("WANDB_PROJECT") or "eva",
                entity=self._config.entity,
                group=self._config.group,
                job_type=self._job,
                name=self._config.name,
                tags=list(self._config.tags) or None,
                id=self.run_id,
                resume="allow" if self.mode == "online" else None,
                dir=str(self._run_folder),
                mode=self.mode,  # type: ignore[arg-type]
                config=dict(self._facts),
                settings=wandb.Settings(silent=self.mode == "offline", quiet=True),
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

    def log_artifact(
        self, name: str, kind: str, path: Path, metadata: Mapping[str, Any], aliases: Sequence[str]
    ) -> None:
        artifact = self._wandb.Artifact(name, type=kind, metadata=dict(metadata))
        artifact.add_file(str(path))
        self._run.log_artifact(artifact, aliases=list(aliases))

    def summarize(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))


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
