"""How well a model does on a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva.hardware import Hardware


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (without label smoothing) and accuracy (a fraction) over `count` images."""

    loss: float
    accuracy: float
    count: int


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], hardware: Hardware) -> Evaluation:
    """Returns the evaluation of a model over batches of images (B, 3, H, W) float32 and labels (B,) int64.

    Each image counts once, whatever the batches' sizes. The model is in eval mode meanwhile and every module
    is left in the mode it was in; sums stay on the device until the end, so nothing waits for it in between.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=hardware.device)
    correct = torch.zeros((), dtype=torch.int64, device=hardware.device)
    count = 0
    try:
        for images, labels in batches:
            images, labels = hardware.to_device(images, labels)
            with hardware.autocast():
                logits = model(images)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").double()
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    finally:
        for module, training in modes.items():
            module.training = training
    return Evaluation(loss.item() / count, correct.item() / count, count)
