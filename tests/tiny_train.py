"""runners/train.py with one model more: tiny, smooth, so that rounding stays that, and slow enough to be signalled."""

import sys
import time

from torch import Tensor, nn

from eva.cli import main
from eva.models import MODELS, Norm


class Slow(nn.Module):
    """Takes its time in training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not x.is_meta:
            time.sleep(0.05)
        return x


def tiny(num_classes: int, norm: Norm, dropout: float, stage_strides: tuple[int, ...]) -> nn.Module:
    return nn.Sequential(
        *(Slow(), nn.Conv2d(3, 8, 5, stride=2), norm(8), nn.Tanh(), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * 49, num_classes)),
    )


if __name__ == "__main__":
    MODELS["tiny"] = tiny
    sys.exit(main(["train", *sys.argv[1:]]))
