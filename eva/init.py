"""First weights by name, beside torch's own: filters that pass their input on, and a whitening first layer."""

import torch
from torch import Tensor, nn

from eva.config import UserError

# Images that the patches are taken from, and what is added to their variances (arXiv 2404.00498).
WHITENING_IMAGES = 5000
WHITENING_EPSILON = 5e-4


def initialize(model: nn.Module, name: str, images: Tensor) -> None:
    """Gives a model the first weights of a name, in place.

    Args:
        model: Fresh from `build_model`.
        name: "default" leaves it as it is. "identity" makes the first I of O filters of each later convolution pass
            their input on, and scales the last linear layer to weights of deviation 1. "whitened" does so too, and
            freezes a first convolution whose filters whiten patches of the images (arXiv 2404.00498, section 3).
        images: Normalized train images (N, 3, H, W), float32; as many as `WHITENING_IMAGES` are enough.

    Raises:
        UserError: "whitened", and the first layer is no convolution of at least two filters for each value of a patch.
    """
    if name == "default":
        return
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    if name == "whitened":
        if not convolutions or convolutions[0].groups > 1:
            raise UserError("init=whitened needs a model whose first layer is a plain convolution")
        whiten(convolutions[0], images)
    for layer in convolutions[1:]:
        if layer.groups == 1:
            nn.init.dirac_(layer.weight.data[: layer.in_channels])
    linears = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if linears:
        linears[-1].weight.data /= linears[-1].weight.data.std()


@torch.no_grad()
def whiten(layer: nn.Conv2d, images: Tensor) -> None:
    """Makes the first filters of a layer whiten patches of images, with both signs, and freezes them all.

    The filters are eigenvectors of the patches' second moments (C * h * w, the same number squared), each divided by
    the root of its eigenvalue.

    Raises:
        UserError: The layer has fewer than two filters for each value of a patch.
    """
    channels, (height, width) = layer.in_channels, layer.weight.shape[2:]
    size = channels * height * width
    if layer.out_channels < 2 * size:
        raise UserError(
            f"init=whitened needs a first layer of at least {2 * size} filters for patches of {channels}x{height}x"
            f"{width}, but got {layer.out_channels}"
        )
    patches = nn.functional.unfold(images[:WHITENING_IMAGES].double(), (height, width))  # (N, C * h * w, L)
    patches = patches.transpose(1, 2).reshape(-1, size)
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (eigenvectors / torch.sqrt(eigenvalues + WHITENING_EPSILON)).T.reshape(size, channels, height, width)
    layer.weight.data[: 2 * size] = torch.cat([filters, -filters]).to(layer.weight.dtype)
    layer.weight.requires_grad_(False)
