"""What training shows on the terminal: a bar where there is one, a line an epoch where there is none."""

import sys
import time
from typing import Any

from tqdm import tqdm

from eva.evaluation import Evaluation

# Without a terminal: at most one line of batches in so many seconds.
LINE_SECONDS = 30.0


class Progress:
    """The bar of an epoch (epoch, loss, batch, running accuracy in percent, batches a second), then its result."""

    def __init__(self, epochs: int, batches: int, bar: bool = True) -> None:
        """Takes how much there is to come, and whether a terminal is to show a bar."""
        self._epochs, self._batches = epochs, batches
        self._interactive = bar and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None

    def start_epoch(self, epoch: int, batch: int) -> None:
        """Shows that an epoch, counted from 1, begins at a batch, counted from 0."""
        self._epoch = epoch
        self._printed = self._started = time.monotonic()
        self._first = batch
        if self._interactive:
            self._bar = tqdm(total=self._batches, initial=batch, dynamic_ncols=True)

    def update(self, batches: int, loss: float, batch: int, accuracy: float) -> None:
        """Shows `batches` more of them, the last one's loss and number, and the epoch's accuracy so far."""
        line = f"EPOCH= {self._epoch} Loss= {loss:.4f} Batch_id= {batch} Accuracy= {100 * accuracy:.2f}"
        if self._bar is not None:
            self._bar.set_description(line, refresh=False)
            self._bar.update(batches)
            return
        now = time.monotonic()
        done = batch + 1
        if now - self._printed >= LINE_SECONDS or done == self._batches:
            rate = (done - self._first) / max(now - self._started, 1e-9)
            print(f"{line} {done}/{self._batches} {rate:.2f}it/s", flush=True)
            self._printed = now

    def end_epoch(self, split: str, evaluation: Evaluation) -> None:
        """Shows the evaluation of the watched split after the epoch."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        correct = round(evaluation.accuracy * evaluation.count)
        print(
            f"{split}: loss {evaluation.loss:.4f}, accuracy {correct}/{evaluation.count} "
            f"({100 * evaluation.accuracy:.2f} %), epoch {self._epoch}/{self._epochs}",
            flush=True,
        )
