"""Batch norm with the statistics of the whole batch, of which each process has a share."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from eva.distributed import counted


class _Summed(torch.autograd.Function):
    """The sum over the processes; its gradient is the sum of theirs, as each one's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        summed = gradient.contiguous().clone()
        dist.all_reduce(summed)
        return summed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` whose mean and variance are those of all processes' images; alone it is that layer exactly.

    torch's own SyncBatchNorm is for GPUs alone, and all of its images count.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        assert self.running_mean is not None and self.running_var is not None
        images = counted(input).float()
        values = images.shape[0] * images.shape[2] * images.shape[3]
        # Sums of squares around this process's own mean, as those around zero would lose digits.
        mean = images.sum((0, 2, 3)) / max(values, 1)  # (C,)
        squares = (images - mean.detach().view(-1, 1, 1)).square().sum((0, 2, 3))
        own = mean.double(), squares.double()
        sums = torch.stack([torch.full_like(own[0], values), values * own[0], own[1] + values * own[0].square()])
        count, total, total_squares = _Summed.apply(sums)  # (C,) each
        mean64 = total / count
        var64 = total_squares / count - mean64.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean64.to(self.running_mean.dtype), self.momentum)
            unbiased = var64 * (count / (count - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * (var64 + self.eps).rsqrt().float()
        # The mean comes off first, as a large one times the scale would lose digits.
        centred = input.float() - mean64.float().view(-1, 1, 1)
        normalized: Tensor = centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return normalized.to(input.dtype)


def synchronize(model: nn.Module) -> None:
    """Replaces the batch norms of a model by synchronized ones of the same parameters, statistics and names."""
    for path, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            synced = SyncBatchNorm2d(
                module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats
            )
            synced.load_state_dict(module.state_dict())
            model.set_submodule(path, synced)
