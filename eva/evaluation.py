"""How well a model does on a split, and what it says about each of the images."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from eva.distributed import ALONE, World
from eva.gradcam import GradCAM
from eva.hardware import Hardware


@dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy (without label smoothing) and accuracy (a fraction) over `count` images."""

    loss: float
    accuracy: float
    count: int


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], hardware: Hardware, world: World = ALONE
) -> Evaluation:
    """Returns the evaluation of a model over batches of images (B, 3, H, W) float32 and labels (B,) int64.

    Each image counts once, whatever the batches' sizes. The model is in eval mode meanwhile and every module
    is left in the mode it was in; sums stay on the device until the end, so nothing waits for it in between. In a world
    of several processes each has other batches, and the evaluation is of all of them.
    """
    loss = torch.zeros((), dtype=torch.float64, device=hardware.device)
    correct = torch.zeros((), dtype=torch.int64, device=hardware.device)
    count = 0
    with evaluating(model):
        for images, labels in batches:
            images, labels = hardware.to_device(images, labels)
            with hardware.autocast():
                logits = model(images)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").double()
            correct += (logits.argmax(1) == labels).sum()
            count += len(labels)
    sums = world.summed(torch.stack([loss, correct.double(), torch.full_like(loss, count)]))
    total_loss, total_correct, total = sums.tolist()
    number = total or math.nan  # of no image there is no mean
    return Evaluation(total_loss / number, total_correct / number, int(total))


def predict(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    hardware: Hardware,
    *,
    layer: str | None = None,
    tta: str = "none",
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
    """Returns the logits (N, K) of every image and, with a layer, the raw Grad-CAM maps (N, h, w) of what it predicts.

    Args:
        model: In eval mode meanwhile; left as it was.
        batches: Images (B, 3, H, W) float32 and labels (B,) int64, as a loader without shuffling gives them.
        hardware: Where to compute.
        layer: Name of the layer that the maps are of. At the last stage they cost little more than the logits.
        tta: Test-time augmentation, as `views` has it: the logits are the mean over several views of an image. Maps
            are of the image itself, for the class that the mean predicts.

    Raises:
        UserError: The model has no such layer, or its output is no map.
    """
    all_logits, all_maps = [], []
    gradcam = None if layer is None else GradCAM(model, layer)
    with evaluating(model), torch.no_grad(), hardware.autocast():
        for images, labels in batches:
            images, _ = hardware.to_device(images, labels)
            weight, others = views(images, tta)
            of_others = [share * model(view).float() for share, view in others]
            if gradcam is None or layer is None:
                logits = _mean_logits(model(images), weight, of_others)
            else:
                cams = gradcam(images, partial(_predicted, weight=weight, of_others=of_others))
                logits = _mean_logits(cams.logits, weight, of_others)
                all_maps.append(cams.raw[layer].cpu())
            all_logits.append(logits.cpu())
    maps = torch.cat(all_maps).numpy() if all_maps else None
    return torch.cat(all_logits).numpy(), maps


def views(images: Tensor, tta: str) -> tuple[float, list[tuple[float, Tensor]]]:
    """Returns the weight of images (B, 3, H, W) themselves, and other views of them with theirs; the sum is 1.

    Args:
        images: The images.
        tta: "none"; "flip", image and mirror image; or "flip_shift", half of the weight for these, and half for the
            same of the image moved by one pixel, up and left or down and right, with a reflected border (the multi-crop
            evaluation of arXiv 2404.00498).
    """
    if tta == "none":
        return 1.0, []
    if tta == "flip":
        return 0.5, [(0.5, images.flip(3))]
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), "reflect")
    moved = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
    return 0.25, [(0.25, images.flip(3)), *((0.125, view) for one in moved for view in (one, one.flip(3)))]


def _mean_logits(logits: Tensor, weight: float, of_others: list[Tensor]) -> Tensor:
    return weight * logits.float() + sum(of_others) if of_others else logits.float()


def _predicted(logits: Tensor, weight: float, of_others: list[Tensor]) -> Tensor:
    return _mean_logits(logits, weight, of_others).argmax(1)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model into eval mode, and every module back into the mode it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
