"""The folder of an offline sweep: what it was asked for, where its trials' runs go, and which of them are alive."""

import contextlib
import fcntl
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from eva.config import UserError
from eva.files import read_json, write_atomically, write_json
from eva.search import Search, open_storage, trial_name, without_password
from eva.sweep_file import Sweep, read_sweep

# Where a storage's URL comes from if its password may not be written down.
STORAGE_VARIABLE = "EVA_STORAGE"
# The storage of a sweep that is not given one, in its folder.
JOURNAL = "journal.log"


@dataclass(frozen=True)
class SweepFolder:
    """A folder that `eva sweep` made.

    Attributes:
        path: Absolute.
        name: What the storage calls the sweep; the W&B group of its runs.
        storage: Path of the journal, or URL of the database without its password.
        place: Drawn for this folder: tells its trials from those whose runs lie in a folder on another machine.
        isolate: Whether each trial gets a process of its own.
        retries: How many times a trial whose process died is gone on with.
    """

    path: Path
    name: str
    storage: str
    place: str
    isolate: bool
    retries: int

    @property
    def sweep(self) -> Sweep:
        """The sweep as this folder keeps it."""
        return read_sweep(self.path / "sweep.yaml")

    @property
    def shares_storage(self) -> bool:
        """Whether the storage lies outside of the folder, so that it may have trials of other folders."""
        return self.storage != JOURNAL

    def run_folder(self, number: int) -> Path:
        """Returns where the run of a trial goes."""
        return self.path / "trials" / trial_name(number)

    def log(self, number: int) -> Path:
        """Returns the file of what a trial printed."""
        return self.path / "trials" / f"{trial_name(number)}.log"

    def open_search(self) -> Search:
        """Returns the sweep's search.

        Raises:
            UserError: The storage can't be opened or holds another sweep.
        """
        return Search(self.sweep, open_storage(self.storage_url()), self.name)

    def storage_url(self) -> str:
        """Returns what the storage is opened with: with its password, if the environment gives it."""
        given = os.environ.get(STORAGE_VARIABLE, "")
        if "://" in self.storage:
            return given if without_password(given) == self.storage else self.storage
        return str(self.path / self.storage)

    @contextlib.contextmanager
    def hold(self, number: int | str) -> Iterator[int | None]:
        """Holds a trial, or whatever else is named, for this process; yields None if another one holds it.

        The lock is the file's, which the system gives free when the last process that has it open ends. So a trial
        that nobody holds is not running, whatever its state says. Yields the file's number, for child processes.
        """
        folder = self.path / "locks"
        folder.mkdir(exist_ok=True)
        file = os.open(folder / f"{number}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            yield file
        finally:
            os.close(file)


def make_sweep_folder(
    path: Path, sweep: Sweep, storage: str | None, isolate: bool, retries: int, name: str | None
) -> SweepFolder:
    """Makes the folder of a new sweep.

    Args:
        path: Where; must be empty or not there.
        sweep: What is kept as sweep.yaml.
        storage: Path or URL; a journal in the folder if None.
        isolate: Whether each trial gets a process of its own.
        retries: How many times a trial whose process died is gone on with.
        name: What the storage calls the sweep; drawn if None.

    Raises:
        UserError: The folder can't be made, or holds something.
    """
    check_empty(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        folder = SweepFolder(
            path=path.resolve(),
            name=name or f"{sweep.name or sweep.source.stem}-{secrets.token_hex(3)}",
            storage=without_password(storage) if storage else JOURNAL,
            place=secrets.token_hex(8),
            isolate=isolate,
            retries=retries,
        )
        (path / "trials").mkdir()
        write_atomically(path / "sweep.yaml", lambda temporary: temporary.write_text(sweep.text, encoding="utf-8"))
        write_json(path / "sweep.json", {key: value for key, value in asdict(folder).items() if key != "path"})
    except OSError as error:
        raise UserError(f"cannot make sweep folder {str(path)!r}: {error.strerror}; choose another --out") from None
    return folder


def check_empty(path: Path) -> None:
    """Checks that a folder is empty or not there.

    Raises:
        UserError: It holds something, or is no folder.
    """
    try:
        if path.exists() and any(path.iterdir()):
            raise UserError(f"sweep folder {str(path)!r} is not empty; choose another --out, or --resume={path}")
    except OSError as error:
        raise UserError(f"cannot make sweep folder {str(path)!r}: {error.strerror}; choose another --out") from None


def open_sweep_folder(path: Path) -> SweepFolder:
    """Returns the folder of a sweep that was begun.

    Raises:
        UserError: It is none, or damaged.
    """
    if not (path / "sweep.json").is_file():
        raise UserError(f"{str(path)!r} is no sweep folder: it has no sweep.json")
    values = read_json(path / "sweep.json")
    kinds = {"name": str, "storage": str, "place": str, "isolate": bool, "retries": int}
    if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != kinds:
        raise UserError(f"{str(path / 'sweep.json')!r} is no description of a sweep")
    return SweepFolder(path=path.resolve(), **values)
