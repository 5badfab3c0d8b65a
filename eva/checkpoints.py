"""Files that hold a model or a whole run: safetensors for weights, a weights-only torch file for the state."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from eva.config import UserError
from eva.files import finite, sync_folder, write_atomically
from eva.run_folder import STATES, saved_states, state_number

STATE_FORMAT = 2
# How many states of a run stay: if the newest is damaged, there is one before it.
STATES_KEPT = 2
BEST = "best.safetensors"

# States that are not asked for by name may take this share of the time.
SAVING_SHARE = 0.02
# Seconds that a save may take to give up when somebody wants an end: Python aborts if it ends within native code.
LEAVE_SECONDS = 2.0


def save_weights(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes parameters and buffers as safetensors, with `facts` (plain values) as JSON in its metadata."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "eva": json.dumps(finite(facts)), "digest": _digest_of(tensors)}
    with _errors_of_the_disk(path.parent):
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Returns the SHA-256 digest of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_weights(path: Path, model: nn.Module) -> None:
    """Loads what `save_weights` wrote into a model of the same architecture.

    Raises:
        UserError: The file is missing or damaged, or its tensors are not those of the model, or not numbers.
    """
    try:
        tensors = load_file(path)
        with safetensors.safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {str(path)!r}") from None
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is not a readable checkpoint: {error}") from None
    if digest is not None and digest != _digest_of(tensors):
        raise UserError(f"the checkpoint {str(path)!r} is damaged: its tensors have not the digest in its header")
    if broken := sorted(name for name, tensor in tensors.items() if tensor.isnan().any()):
        told = f"{len(broken)} of {len(tensors)} tensors, {broken[0]!r} for one"
        raise UserError(f"the weights in {str(path)!r} must be numbers, but NaN is in {told}: take another checkpoint")
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{str(path)!r} holds another architecture: {reason}") from None


def read_facts(path: Path) -> dict[str, Any]:
    """Returns the facts that `save_weights` wrote beside the weights, without reading these.

    Raises:
        UserError: The file is missing or damaged, or it has no facts: eva did not write it.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        facts = json.loads(metadata.get("eva", "null"))
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {str(path)!r}") from None
    except (OSError, ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise UserError(f"{str(path)!r} is not a readable checkpoint: {' '.join(str(error).split())}") from None
    if not isinstance(facts, dict):
        raise UserError(f"{str(path)!r} is no checkpoint of eva: its metadata have no facts about a run")
    return facts


# States: NUMBER-DIGEST.pt in the folder `state` of a run, the digest being that of the file's content


def save_state(run_folder: Path, state: Mapping[str, Any], ends: Callable[[], bool] = lambda: False) -> Path:
    """Writes a state of plain values and tensors as a run's newest, and drops all but the last two.

    It is there in full, under a name that tells its content's SHA-256 digest, or not at all.

    Args:
        run_folder: The run's.
        state: What is written.
        ends: Asked before each tensor; if so, the writing is given up.

    Returns:
        Where it is.

    Raises:
        OSError: The disk is full, or refuses it for another reason, or the writing was given up.
    """
    folder = run_folder / STATES
    folder.mkdir(exist_ok=True)
    temporary = folder / ".new"  # a run has one process; what a killed one left of it is overwritten
    try:
        with _errors_of_the_disk(folder), open(temporary, "wb") as file:
            torch.save({"format": STATE_FORMAT, **state}, _Writing(file, ends))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        before = saved_states(run_folder)
        number = 1 + (state_number(before[0]) if before else 0)
        path = folder / f"{number:06d}-{_digest(temporary)}.pt"
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(folder)
    for old in before[STATES_KEPT - 1 :]:
        old.unlink(missing_ok=True)
    return path


class _Writing:
    """A file under way, which takes no more once somebody wants an end."""

    def __init__(self, file: BinaryIO, ends: Callable[[], bool]) -> None:
        self._file, self._ends = file, ends
        self.flush = file.flush

    def write(self, content: bytes) -> int:
        if self._ends():
            raise InterruptedError("the writing was given up")
        return self._file.write(content)


def newest_state(run_folder: Path) -> tuple[dict[str, Any], Path] | None:
    """Returns the newest state that is whole, tensors on the CPU, and where it is; None if there is none.

    Nothing in it is executed. One that is damaged is named in a warning on stderr and laid aside under another name.

    Raises:
        UserError: It is of another version of eva, or holds more than plain values and tensors.
    """
    for path in saved_states(run_folder):
        if _digest(path) == path.stem.partition("-")[2]:
            return _read_state(path), path
        aside = path.with_name(f"{path.name}.damaged")
        os.replace(path, aside)
        rest = saved_states(run_folder)
        then = f"going on from the one before, {str(rest[0])!r}" if rest else "there is none before it: beginning again"
        told = f"the state {str(path)!r} is damaged, its content has not the digest in its name; {then}"
        print(f"warning: {told}", file=sys.stderr, flush=True)
    return None


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for what it didn't write, or would have to execute
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{str(path)!r} is not a readable state: {reason}") from None
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise UserError(f"{str(path)!r} is no state of this version of eva (format {STATE_FORMAT})")
    return state


@contextlib.contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Makes an OSError again of what torch makes of one when it writes."""
    try:
        yield
    except (RuntimeError, safetensors.SafetensorError) as error:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from None
        if shutil.disk_usage(folder).free < 1 << 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise


# Saving beside the training


class Buffers:
    """Memory of the host that copies are made in, again and again: to get new memory takes ten times the copy.

    Beside a GPU it is page-locked, so that copies don't wait for each other.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Gets memory for one copy of each of these tensors; for others it is got when they are copied."""
        self._free: dict[Any, list[Tensor]] = defaultdict(list)
        for tensor in tensors:
            self._free[_kind(tensor)].append(_memory_for(tensor))

    def copy(self, value: Any) -> Any:
        """Returns mappings, lists and tuples of plain values and tensors, with copies of the tensors on the host."""
        copied = self._copy(value)
        if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            free = self._free[_kind(value)]
            memory = free.pop() if free else _memory_for(value)
            return memory.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copy(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(inner) for inner in value)
        return value

    def give_back(self, value: Any) -> None:
        """Takes back the memory of a copy, which is not to be used any more."""
        if isinstance(value, Tensor):
            self._free[_kind(value)].append(value)
        elif isinstance(value, Mapping):
            self.give_back(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for inner in value:
                self.give_back(inner)


def _kind(tensor: Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


def _memory_for(tensor: Tensor) -> Tensor:
    # Zeros are written, so that the pages are there before they are needed.
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return memory.zero_()


@dataclass(frozen=True)
class Best:
    """The weights of the best epoch so far, on the host, and the facts that go into the checkpoint with them."""

    weights: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Saver:
    """Keeps a training on the disk while it goes on: what changes is copied at once, and written by a thread."""

    def __init__(self, folder: Path, journals: Sequence[Path], tensors: Iterable[Tensor], best: Best | None) -> None:
        """Prepares to save.

        Args:
            folder: The run's.
            journals: Files that grow with the training; a state is on the disk no earlier than their rows.
            tensors: What will be copied each time, as far as it is known.
            best: The best weights so far, of a run that goes on. They are written again, as the file may be newer.
        """
        self._folder, self._journals = folder, journals
        self._buffers = Buffers(tensors)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._ends = False
        self._best = best
        self._best_on_disk: Best | None = None
        self._seconds = 0.0  # that the last save took
        self._ended = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None:  # the disk may be slow, and somebody wants an end
            self._ends = True
            self._thread.join(LEAVE_SECONDS)

    def idle_seconds(self) -> float:
        """Returns how long ago the last save ended, or this began; 0 while one is being written."""
        return 0.0 if self._busy() else time.monotonic() - self._ended

    def affordable(self) -> bool:
        """Tells whether a save as long as the last one would keep saving at 2 % of the time since then."""
        return not self._busy() and self.idle_seconds() * SAVING_SHARE >= self._seconds

    def keep_best(self, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Copies the weights of an epoch that is the best so far; they are written with the next state."""
        if self._best is not None and not self._busy():  # or they may be in the writing
            self._buffers.give_back(self._best.weights)
        self._best = Best(self._buffers.copy(weights), dict(facts))

    def save(self, state: Mapping[str, Any] | None) -> None:
        """Copies a state and has it written, after the one before if that is still being written.

        Args:
            state: All that changes; None to write the best weights alone.

        Raises:
            OSError: The one before could not be written.
        """
        self.wait()
        started = time.monotonic()
        copied = self._buffers.copy(state)
        # A daemon, so that a process that is to end at once does not wait for the disk: what is cut off doesn't count.
        self._thread = threading.Thread(target=self._write, args=(copied, self._best, started), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Waits until all is on the disk.

        Raises:
            OSError: It could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _write(self, copied: Mapping[str, Any] | None, best: Best | None, started: float) -> None:
        try:
            self._bring_to_the_disk(copied, best, started)
        except BaseException as error:  # raised where it is waited for
            self._error = error

    def _bring_to_the_disk(self, copied: Mapping[str, Any] | None, best: Best | None, started: float) -> None:
        for journal in self._journals:
            with open(journal, "rb") as file:
                os.fsync(file.fileno())
        if copied is not None:
            entry = None if best is None else {"weights": dict(best.weights), "facts": best.facts}
            save_state(self._folder, {**copied, "best": entry}, lambda: self._ends)
        if best is not None and best is not self._best_on_disk and not self._ends:
            save_weights(self._folder / BEST, best.weights, best.facts)
            self._best_on_disk = best
        self._buffers.give_back(copied)
        self._ended = time.monotonic()
        self._seconds = self._ended - started


class SilentSaver(Saver):
    """That of a process beside the one that writes: it keeps nothing."""

    def __init__(self) -> None:
        super().__init__(Path(), (), (), None)

    def idle_seconds(self) -> float:
        return 0.0

    def keep_best(self, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        pass

    def save(self, state: Mapping[str, Any] | None) -> None:
        pass
