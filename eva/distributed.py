"""One training in several processes, as torchrun starts them: the first one is the run, the others help it.

The first process alone has a run folder, tracks, prints and tells mistakes. The others wait until it tells them what it
trains, do their share of every batch, and end as it does. A world of one process has nothing to agree on: there
everything here returns what it was given.
"""

import contextlib
import functools
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from eva.config import EXIT_INTERRUPTED, Terminated, UserError

T = TypeVar("T")

# What torchrun sets; it is asked for all of it, as other programs set some.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How long one process waits for the others in a step. What the first does alone is waited for without a limit.
GROUP_SECONDS = 600.0
# How long a process that lost the others waits for the first one's word of how it ended.
END_SECONDS = 60.0
POLL_SECONDS = 0.05
# As `loaders.ORDER_STREAM`: the first in the entropy of what is drawn in a step.
STEP_STREAM = int.from_bytes(b"step")

# Keys of the store that torchrun's processes share.
TASK, READY, ERROR, END = "eva/task", "eva/ready", "eva/error", "eva/end"

# The group of the host's own messages, by gloo, so that no GPU is waited for; None for the one that all is done in.
_control: dist.ProcessGroup | None = None
# How many of the images that this process is given count in the step under way; None for all.
_counted: int | None = None


def local_rank() -> int | None:
    """Returns the number of this process among torchrun's on this machine; None if torchrun did not start it."""
    return int(os.environ["LOCAL_RANK"]) if all(name in os.environ for name in VARIABLES) else None


def counted(images: Tensor) -> Tensor:
    """Returns those of a step's images (B, ...) that count in this process, (B', ...): see `World.take`."""
    return images if _counted is None else images[:_counted]


@dataclass(frozen=True)
class World:
    """The processes of one training.

    Attributes:
        rank: The number of this one; 0 is the first.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    def describe(self, batch_size: int) -> dict[str, Any]:
        """Returns how many processes share a batch, and the most images of it that one has."""
        return {"processes": self.size, "batch_size_per_process": -(-batch_size // self.size)}

    # Shares

    def share(self, count: int) -> range:
        """Returns which of `count` things in a row are this process's: those of two differ by one at most."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def take(self, batch: Sequence[T]) -> list[T]:
        """Returns this process's part of a batch: its share, and then others that don't count, if it is below two.

        Of one value batch normalization has no variance, and of none a network may have no output.
        """
        own = self.share(len(batch))
        filled = range(own.stop, own.stop + min(2, len(batch)) - len(own))
        return [batch[number % len(batch)] for number in (*own, *filled)]

    def begin_step(self, batch_size: int, seed: int, step: int) -> float | None:
        """Tells the network which of the images that come next count, and seeds torch's generators for the step.

        Dropout so depends on (seed, rank, step) alone, and a run goes on with as many processes as if it had not ended.

        Args:
            batch_size: Images of the whole batch.
            seed: The run's.
            step: The step's number.

        Returns:
            What the sum over the images that count is multiplied by, so that its mean over the processes is the mean
            over the batch; None if the mean over the images does as well: all count, and all processes have as many.
        """
        global _counted
        _counted = None
        if self.size == 1:
            return None
        entropy = np.random.SeedSequence([STEP_STREAM, seed, self.rank, step])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        if batch_size % self.size == 0 and batch_size >= 2 * self.size:
            return None
        _counted = len(self.share(batch_size))
        return self.size / batch_size

    # What the processes do together. All of them do it, in the same order.

    def network(self, model: nn.Module) -> nn.Module:
        """Returns a model whose gradients are the mean over the processes; its weights are those of `model`."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        # Running statistics of a process's own share don't matter until they are evaluated: see `share_buffers`.
        devices = [device] if device.type == "cuda" else None
        with warnings.catch_warnings():  # torch is about to rename the option
            warnings.simplefilter("ignore", FutureWarning)
            return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False)

    def agree(self, *wishes: int) -> tuple[int, ...]:
        """Returns the largest of each wish over the processes. It is told from host to host: no GPU is waited for."""
        if self.size == 1:
            return wishes
        told = torch.tensor(wishes, dtype=torch.int64)
        dist.all_reduce(told, dist.ReduceOp.MAX, _control)
        return tuple(told.tolist())

    def summed(self, values: Tensor) -> Tensor:
        """Returns values, on the device, summed over the processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def from_first(self, value: T) -> T:
        """Returns the first process's value."""
        told = [value]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, group=_control)
        return told[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Makes a model's buffers, batch norm's running statistics, those of the first process."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    # Beginning and ending together

    def tell_task(self, task: Mapping[str, Any]) -> None:
        """Tells the other processes, which wait for it, what the first one is about to do."""
        if self.size > 1:
            _store().set(TASK, json.dumps(task))

    def task(self) -> dict[str, Any] | None:
        """Waits for what the first process tells to do; returns None if it ends without that."""
        while not _store().check([TASK]):
            if _store().check([END]):
                return None
            time.sleep(POLL_SECONDS)
        told: dict[str, Any] = json.loads(_store().get(TASK))
        return told

    @contextlib.contextmanager
    def joined(self, device: torch.device) -> Iterator[None]:
        """Connects the processes: each waits for the others to come here.

        Raises:
            UserError: In the first one: another told of a mistake.
            MemoryError: In the first one: another has no memory left.
            RuntimeError: In the first one: there is a bug in another. In the others: one has ended, see `is_loss`.
            Terminated: In the first one: another has died.
        """
        if self.size == 1:
            yield
            return
        try:
            self._connect(device)
            yield
        except (RuntimeError, Terminated) as error:
            if self.rank:
                raise
            raise _cause(error) from None
        finally:
            self._disconnect()

    def _connect(self, device: torch.device) -> None:
        global _control
        _store().set(f"{READY}/{self.rank}", "")
        while not _store().check([f"{READY}/{rank}" for rank in range(self.size)]):
            if _store().check([ERROR]):
                raise dist.DistError
            time.sleep(POLL_SECONDS)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore("eva/group", _store()),
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(seconds=GROUP_SECONDS),
        )
        if device.type == "cuda":
            _control = dist.new_group(backend="gloo")  # type: ignore[assignment]

    def _disconnect(self) -> None:
        global _control
        _control = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def tell_error(self, error: BaseException, kind: str) -> None:
        """Tells the first process why another one ends: `kind` is mistake, memory or bug."""
        line = f"process {self.rank}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _store().compare_set(ERROR, "", json.dumps([kind, str(error) if kind == "mistake" else line]))

    def tell_end(self, code: int) -> None:
        """Tells the other processes with which exit code the first one ends."""
        with contextlib.suppress(dist.DistError):  # torchrun is gone
            _store().set(END, str(code))

    def end(self, seconds: float | None = None) -> int:
        """Waits until the first process ends and returns its exit code; that of an interruption if it takes too long.

        Args:
            seconds: How long to wait; None for no limit, as torchrun ends the others when one has died.
        """
        began = time.monotonic()
        with contextlib.suppress(dist.DistError):
            while not _store().check([END]):
                if seconds is not None and time.monotonic() - began > seconds:
                    return EXIT_INTERRUPTED
                time.sleep(POLL_SECONDS)
            return int(_store().get(END))
        return EXIT_INTERRUPTED


ALONE = World()


def find_world() -> World:
    """Returns the world that torchrun's environment tells of; outside of it this process is alone."""
    if local_rank() is None:
        return ALONE
    return World(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))


@functools.cache
def _store() -> Store:
    """Returns the store that torchrun's processes share; torchrun itself keeps it, so that it outlives each of them."""
    store, *_ = next(iter(rendezvous("env://", timeout=timedelta(seconds=GROUP_SECONDS))))
    return store  # type: ignore[no-any-return]


def is_loss(error: BaseException) -> bool:
    """Tells whether an exception says that another process can't be reached."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _cause(error: BaseException) -> BaseException:
    """Returns what an exception comes of: what another process told when it ended, or its death; else itself.

    From then on SIGTERM is ignored: torchrun sends it to the others when one has ended, and they know.
    """
    told = None
    if is_loss(error) or isinstance(error, Terminated):
        with contextlib.suppress(dist.DistError):
            told = json.loads(_store().get(ERROR)) if _store().check([ERROR]) else None
    if told is None and not is_loss(error):
        return error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if told is None:
        print("another process of this run has died", file=sys.stderr, flush=True)
        return Terminated()
    kind, text = told
    return {"mistake": UserError, "memory": MemoryError, "bug": RuntimeError}[kind](text)
