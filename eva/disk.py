"""What takes room on the disk, and what of it can go: runs, W&B's folders, the cache of decoded images."""

import fcntl
import os
import re
import shlex
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from eva.config import UserError
from eva.files import read_json
from eva.text import aligned, printable

# Where `eva train` and `eva sweep` write by default.
USUAL = (Path("runs"), Path("sweeps-out"))
# Statuses of runs that nobody goes on with.
ENDED = ("finished", "diverged", "stopped")
# So long after its last change a temporary file that nobody locks is of no living process.
STALE_SECONDS = 24 * 3600
# Of more paths than that, a command is told in the report's plain data only.
PATHS_SHOWN = 20

WEIGHTS, STATES, PREDICTIONS, PICTURES = "weights", "saved states", "predictions", "pictures"
RECORDS, DATA, OTHER = "histories, settings", "data sets", "other files"
WANDB_RUNS, WANDB_CACHE, WANDB_STAGING = "W&B runs", "W&B cache", "W&B staging"
WANDB_ARTIFACTS, DECODED, LEFTOVERS = "W&B artifacts", "decoded images", "leftovers of killed processes"

# Why something of a kind can go.
REASONS = {
    STATES: "only to resume runs; these have ended",
    WANDB_RUNS: "all of it is at W&B",
    WANDB_CACHE: "copies of what W&B has",
    WANDB_STAGING: "all of it is at W&B",
    WANDB_ARTIFACTS: "can be fetched from W&B again",
    DECODED: "decoded again when needed",
    LEFTOVERS: "nobody reads them",
}


@dataclass(frozen=True)
class Part:
    """A file or folder with all in it.

    Attributes:
        kind: What it is.
        path: Where.
        can_go: Whether nothing is lost without it, other than the time to make it again.
        bytes: What it takes on the disk, folders included, without what another part counts.
        files: How many there are in it, folders not included.
    """

    kind: str
    path: Path
    can_go: bool
    bytes: int = 0
    files: int = 0


@dataclass(frozen=True)
class Disk:
    """A file system, in bytes.

    Attributes:
        path: A folder on it.
        size: All of it.
        free: What this user may still write.
    """

    path: Path
    size: int
    free: int


@dataclass(frozen=True)
class DiskReport:
    """What takes room.

    Attributes:
        parts: In no order; together all of the folders looked at.
        unsynced: Folders of W&B runs that are not known to be at W&B.
        disks: The file systems that the folders are on.
        notes: What could not be looked at, a line each.
    """

    parts: tuple[Part, ...]
    unsynced: tuple[Path, ...]
    disks: tuple[Disk, ...]
    notes: tuple[str, ...]

    def kinds(self) -> dict[str, dict[str, int]]:
        """Returns bytes and files of each kind, and of those that can go, the largest kind first."""
        sums: dict[str, dict[str, int]] = {}
        for part in self.parts:
            found = sums.setdefault(part.kind, dict.fromkeys(("bytes", "files", "bytes_can_go", "files_can_go"), 0))
            found["bytes"] += part.bytes
            found["files"] += part.files
            if part.can_go:
                found["bytes_can_go"] += part.bytes
                found["files_can_go"] += part.files
        return dict(sorted(sums.items(), key=lambda item: -item[1]["bytes"]))

    def sync(self) -> dict[str, list[Path]]:
        """Returns the commands that send runs to W&B and mark them as sent, with the folders that follow them.

        Of what began online wandb's own command would send the first rows twice.
        """
        online = {path.parent.parent for path in self.unsynced if not path.name.startswith("offline-")}
        offline = [path for path in self.unsynced if path.parent.parent not in online]
        return {command: paths for command, paths in (("eva sync", sorted(online)), ("wandb sync", offline)) if paths}

    def can_go(self, kind: str) -> list[Path]:
        """Returns the paths of a kind that can go."""
        return [part.path for part in self.parts if part.can_go and part.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, with the commands that remove what can go and send what is not sent."""
        return {
            "kinds": {
                kind: {**sums, "remove": _command("rm -rf --", self.can_go(kind))}
                for kind, sums in self.kinds().items()
            },
            "sync": [_command(command, paths) for command, paths in self.sync().items()],
            "disks": [{**asdict(disk), "path": str(disk.path)} for disk in self.disks],
            "notes": list(self.notes),
        }


def report(paths: Sequence[Path], data_dir: Path) -> DiskReport:
    """Looks at folders of runs, the data folder and W&B's own folders. Nothing is changed.

    Args:
        paths: Folders of runs or sweeps; if none are given, those that eva writes to by default, as far as they exist.
        data_dir: The folder of data sets and decoded images; need not exist.

    Raises:
        UserError: A given folder does not exist.
    """
    for path in paths:
        if not os.path.isdir(path):
            raise UserError(f"no folder of runs at {str(path)!r}")
    look = _Look()
    for path in paths or [path for path in USUAL if os.path.isdir(path)]:
        look.runs(path)
    look.data(data_dir)
    look.own_folders_of_wandb()
    return DiskReport(tuple(look.parts()), tuple(look.unsynced), _disks(look.roots), tuple(look.notes))


def table(report: DiskReport, width: int = 120) -> str:
    """Returns the report for a reader: kinds, file systems, and the commands that remove what can go."""
    rows = []
    for kind, sums in report.kinds().items():
        can_go = size_text(sums["bytes_can_go"]) if sums["files_can_go"] or report.can_go(kind) else "-"
        why = REASONS.get(kind, "") if can_go != "-" else ""
        rows.append([kind, size_text(sums["bytes"]), f"{sums['files']:,}", can_go, why])
    everything = [sum(part.bytes for part in report.parts), sum(part.files for part in report.parts)]
    going = sum(part.bytes for part in report.parts if part.can_go)
    rows.append(["all", size_text(everything[0]), f"{everything[1]:,}", size_text(going), ""])
    disks = [[printable(str(disk.path)), size_text(disk.size), size_text(disk.free)] for disk in report.disks]
    lines = [
        aligned(["what", "on the disk", "files", "can go", "because"], rows, width),
        aligned(["file system of", "size", "free"], disks, width),
    ]
    for kind in report.kinds():
        if paths := report.can_go(kind):
            lines.append(f"{kind} that can go ({REASONS[kind]}):\n  {_shown('rm -rf --', paths)}\n")
    if report.unsynced:
        commands = "\n  ".join(_shown(command, paths) for command, paths in report.sync().items())
        lines.append(f"W&B runs that are not known to be at W&B, and stay until they are:\n  {commands}\n")
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines).rstrip() + "\n"


class _Look:
    """Gathers what lies in the folders that it is led to, and measures it in the end."""

    def __init__(self) -> None:
        self.roots: list[Path] = []
        self.unsynced: list[Path] = []
        self.notes: list[str] = []
        self._found: list[tuple[str, Path, bool]] = []
        self._rest: list[tuple[str, Path]] = []

    def parts(self) -> Iterator[Part]:
        """Yields all that was found. No file and no folder counts twice: not in two parts, not by two hard links."""
        # A file that also has a name among what stays is not freed with what can go, so what stays counts first.
        stays_first = sorted(self._found, key=lambda found: found[2])
        # What nothing else has counted; of folders in one another it counts for the inner one.
        rest = sorted(self._rest, key=lambda found: -os.path.realpath(found[1]).count(os.sep))
        counted = set[tuple[int, int]]()
        for kind, path, can_go in [*stays_first, *((kind, path, False) for kind, path in rest)]:
            size, files = self._measure(path, counted)
            if size or files:
                yield Part(kind, path, can_go, size, files)

    def runs(self, root: Path) -> None:
        """Looks at a folder of runs or sweeps, or of one run."""
        root = self._root(OTHER, root)
        for path, folders, files in os.walk(root, onerror=self._note):
            if "config.yaml" in files or "summary.json" in files:
                self._run(Path(path))
            folders[:] = [name for name in folders if name != "wandb"]  # W&B has a config.yaml of its own

    def data(self, data_dir: Path) -> None:
        """Looks at the folder of data sets and decoded images."""
        root = self._root(DATA, data_dir)
        for path in self._entries(root / "cache"):
            if path.suffix in (".images", ".npz"):  # .npz: of versions before
                self._add(DECODED, path, can_go=True)
            elif path.suffix in (".part", ".tmp"):
                self._add(LEFTOVERS, path, can_go=_is_left(path))
        for path in self._entries(root / "index"):
            if path.suffix == ".index":
                self._add(DECODED, path, can_go=True)
            elif _is_temporary(path):
                self._add(LEFTOVERS, path, can_go=_is_old(path))

    def own_folders_of_wandb(self) -> None:
        """Looks at the folders that W&B uses where it is told no others."""
        # As wandb.env and wandb.sdk.wandb_settings find them. An empty variable would name the working directory.
        cache = Path(os.environ.get("WANDB_CACHE_DIR") or platformdirs.user_cache_dir("wandb"))
        data = Path(os.environ.get("WANDB_DATA_DIR") or platformdirs.user_data_dir("wandb"))
        self._cache_of_wandb(self._root(WANDB_CACHE, cache), can_go=True)
        # What is staged stays: it may be that of an offline run, wherever that is.
        self._add(WANDB_STAGING, self._root(WANDB_STAGING, data) / "artifacts" / "staging")
        if artifacts := os.environ.get("WANDB_ARTIFACT_DIR"):  # the default is no folder of W&B's own: ./artifacts
            self._root(WANDB_ARTIFACTS, Path(artifacts))
        runs = Path(os.environ.get("WANDB_DIR") or ".")
        for folder in (runs / "wandb", runs / ".wandb"):
            for path in filter(_is_wandb_run, self._entries(self._root(WANDB_RUNS, folder))):
                self._add(WANDB_RUNS, path, can_go=self._is_synced(path))

    def _run(self, folder: Path) -> None:
        ended = _has_ended(folder)
        for path in self._entries(folder):
            if path.name == "wandb" and _is_folder(path):
                self._wandb_of_run(path, ended)
            elif path.name in ("state", "state.pt"):  # state.pt: of versions before
                self._add(STATES, path, can_go=ended)
            elif _is_temporary(path):
                self._add(LEFTOVERS, path, can_go=_is_old(path))
            elif path.suffix == ".safetensors":
                self._add(WEIGHTS, path)
            elif path.suffix == ".npz":
                self._add(PREDICTIONS, path)
            elif path.name == "figures":
                self._add(PICTURES, path)
            elif not _is_folder(path):
                self._add(RECORDS, path)

    def _wandb_of_run(self, folder: Path, ended: bool) -> None:
        entries = self._entries(folder)
        # All stays until all is at W&B: what `wandb sync` sends may need what lies beside it.
        synced = [self._is_synced(path) for path in entries if _is_wandb_run(path)]
        sent = ended and bool(synced) and all(synced)
        for path in entries:
            if path.name == "cache":
                self._cache_of_wandb(path, can_go=ended)
            elif path.name == "data":
                self._add(WANDB_STAGING, path, can_go=sent)
            elif path.name == "artifact":
                self._add(WANDB_ARTIFACTS, path, can_go=sent)
            else:
                self._add(WANDB_RUNS, path, can_go=sent and _is_wandb_run(path))

    def _cache_of_wandb(self, folder: Path, can_go: bool) -> None:
        # What can go is named narrowly: the same folder may be set for the cache and for staging.
        for name in ("artifacts/obj", "artifacts/tmp", "logs"):
            self._add(WANDB_CACHE, folder / name, can_go=can_go)
        self._rest.append((WANDB_CACHE, folder))

    def _is_synced(self, folder: Path) -> bool:
        """Tells whether W&B's client has marked a run as sent, as `wandb sync` and `wandb clean` do."""
        logs = list(folder.glob("*.wandb"))
        synced = bool(logs) and all(os.path.exists(f"{log}.synced") for log in logs)
        if logs and not synced and folder not in self.unsynced:
            self.unsynced.append(folder)
        return synced

    def _root(self, kind: str, root: Path) -> Path:
        """Has what nothing else counts of a folder counted as `kind`; returns the folder, or where a link leads."""
        root = Path(os.path.realpath(root)) if os.path.islink(root) else root
        self.roots.append(root)
        self._rest.append((kind, root))
        return root

    def _add(self, kind: str, path: Path, can_go: bool = False) -> None:
        self._found.append((kind, path, can_go))

    def _measure(self, path: Path, counted: set[tuple[int, int]]) -> tuple[int, int]:
        """Returns bytes and files of a tree without what was counted before, and adds it to that. Follows no link."""
        size = files = 0
        left = [path]
        while left:
            path = left.pop()
            try:
                status = path.lstat()
            except (FileNotFoundError, NotADirectoryError):  # gone meanwhile
                continue
            except OSError as error:
                self._note(error)
                continue
            if (status.st_dev, status.st_ino) in counted:
                continue
            counted.add((status.st_dev, status.st_ino))
            size += status.st_blocks * 512  # the unit of st_blocks, whatever the file system's is
            if stat.S_ISDIR(status.st_mode):
                left += self._entries(path)
            else:
                files += 1
        return size, files

    def _entries(self, folder: Path) -> list[Path]:
        try:
            return sorted(folder.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            self._note(error)
            return []

    def _note(self, error: OSError) -> None:
        note = printable(f"cannot look into {str(error.filename)!r}: {error.strerror}")
        if note not in self.notes:
            self.notes.append(note)


def _has_ended(folder: Path) -> bool:
    with suppress(UserError):
        summary = read_json(folder / "summary.json")
        return isinstance(summary, dict) and summary.get("status") in ENDED
    return False


def _is_folder(path: Path) -> bool:
    return os.path.isdir(path) and not os.path.islink(path)


def _is_wandb_run(path: Path) -> bool:
    return path.name.startswith(("run-", "offline-run-")) and _is_folder(path)


def _is_temporary(path: Path) -> bool:
    return re.fullmatch(r"\..+\.\d+", path.name) is not None  # as `write_atomically` names them


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        return path.lstat().st_mtime < time.time() - STALE_SECONDS
    return False


def _is_left(path: Path) -> bool:
    """Tells whether nobody builds an entry of the cache in a file any more: its lock is free (`eva.image_cache`)."""
    if path.suffix != ".part":
        return _is_old(path)
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # no locks here, or the file of another user
        return _is_old(path)
    return True


def _disks(roots: Sequence[Path]) -> tuple[Disk, ...]:
    disks: dict[int, Disk] = {}
    for root in roots:
        with suppress(OSError):
            # What does not exist yet will lie where the nearest folder above it does.
            folder = next(path for path in (root, *root.absolute().parents) if os.path.isdir(path))
            usage = shutil.disk_usage(folder)
            disks.setdefault(folder.stat().st_dev, Disk(folder, usage.total, usage.free))
    return tuple(disks.values())


def _command(command: str, paths: Sequence[Path]) -> str | None:
    return " ".join([command, *map(_quoted, paths)]) if paths else None


def _shown(command: str, paths: Sequence[Path]) -> str:
    if len(paths) > PATHS_SHOWN:
        return f"{command} ...  ({len(paths):,} paths; --json has the whole command)"
    return str(_command(command, paths))


def _quoted(path: Path) -> str:
    """Returns a path as a shell reads it, and as no terminal acts on it."""
    text = str(path)
    if printable(text) == text:
        return shlex.quote(text)
    shown = (chr(byte) if 32 <= byte < 127 and byte not in b"\\'" else f"\\x{byte:02x}" for byte in os.fsencode(text))
    return f"$'{''.join(shown)}'"


def size_text(size: float) -> str:
    """Returns bytes for a reader, in units of 1,024."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    power = 0
    while size >= 999.5 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    return f"{size:.0f} {units[power]}" if power == 0 or size >= 99.95 else f"{size:.1f} {units[power]}"
