"""Image classifiers by name, their normalization layers, and their summary table.

A model takes float images (N, 3, 32, 32) and returns logits (N, num_classes); softmax belongs to the loss. To
add one, write a function with the signature of `resnet9` and register it in `MODELS`.

Weights start from torch's (and torchvision's) own initialization, as in the usual CIFAR implementations.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import chain, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva.config import UserError, unknown_name

NORMS = ("batch", "ghost", "group", "layer", "instance", "none")
STAGE_STRIDES = (1, 2, 2, 2)
TORCHVISION = "torchvision/"
IMAGE_SIZE = 32

# Makes the normalization layer for so many channels; nn.Identity stands for none.
Norm = Callable[[int], nn.Module]


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch norm with the statistics of slices of the batch (Hoffer et al. 2017, arXiv 1705.08741).

    A training batch (N, C, H, W) is cut into `splits` contiguous slices, as `torch.tensor_split` cuts it;
    fewer where a slice would be left with a single value per channel. Each slice is normalized by its own
    mean and variance and updates the running statistics once, with a momentum that lets the whole batch weigh
    as much as in plain batch norm: over n slices, 1 - (1 - momentum) ** (1 / n). `num_batches_tracked` counts
    batches. In eval mode, and with one split, this is `nn.BatchNorm2d` exactly.

    Args:
        num_features: Number of channels C.
        splits: Number of slices.
        eps: Added to the variance.
        momentum: Weight of one batch in the running statistics; a number (no cumulative average).

    Raises:
        UserError: `splits` is below 1.
    """

    def __init__(self, num_features: int, *, splits: int = 4, eps: float = 1e-5, momentum: float = 0.1) -> None:
        if splits < 1:
            raise UserError(f"ghost_splits must be at least 1, but got ghost_splits={splits}")
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.splits = splits

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        images, _, height, width = input.shape
        slices = min(self.splits, images if height * width > 1 else images // 2)
        if not self.training or slices <= 1:
            return super().forward(input)
        assert self.num_batches_tracked is not None and self.momentum is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 - (1 - self.momentum) ** (1 / slices)
        normalized = [
            F.batch_norm(part, self.running_mean, self.running_var, self.weight, self.bias, True, momentum, self.eps)
            for part in torch.tensor_split(input, slices)
        ]
        return torch.cat(normalized)

    def extra_repr(self) -> str:
        return f"{self.num_features}, splits={self.splits}, eps={self.eps}, momentum={self.momentum}"


def model_names() -> tuple[str, ...]:
    """Returns every name that `build_model` knows: our own, then "torchvision/NAME" for its classifiers."""
    from torchvision import models  # over a second to import, so only where it is asked for

    return (*MODELS, *(TORCHVISION + name for name in models.list_models(module=models)))


def build_model(
    name: str,
    *,
    num_classes: int,
    norm: str = "batch",
    ghost_splits: int = 4,
    norm_groups: int = 32,
    dropout: float = 0.0,
    stage_strides: tuple[int, ...] = STAGE_STRIDES,
) -> nn.Module:
    """Returns a new model in training mode on the CPU, its weights drawn from torch's global generator.

    Args:
        name: One of `model_names()`.
        num_classes: Number of logits.
        norm: One of `NORMS`. "layer" is GroupNorm of one group (over C, H, W); "none" removes the layers and
            gives the convolutions biases. For torchvision models "batch" keeps the model's own normalization,
            whatever that is, and "none" leaves the convolutions as torchvision makes them.
        ghost_splits: Slices of the batch that "ghost" takes its statistics over.
        norm_groups: Channel groups of "group".
        dropout: Probability of dropping a value between the two convolutions of each residual block
            (Zagoruyko & Komodakis 2016, arXiv 1605.07146); for torchvision models, before the last linear
            layer, added to what dropout the model has.
        stage_strides: Strides of the four stages of resnet18.

    Raises:
        UserError: A name is unknown, a value is out of its range, or the model cannot do what is asked.
    """
    if name not in MODELS and name not in (names := model_names()):
        raise UserError(unknown_name("model", name, names, shown=(*MODELS, "torchvision/NAME")))
    if num_classes < 1:
        raise UserError(f"num_classes must be at least 1, but got num_classes={num_classes}")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout must be in [0, 1), but got dropout={dropout}")
    norm_layer = _norm_layer(norm, ghost_splits, norm_groups)
    if name in MODELS:
        return MODELS[name](num_classes, norm_layer, dropout, tuple(stage_strides))
    if tuple(stage_strides) != STAGE_STRIDES:
        raise UserError(_no_strides(name, stage_strides))
    return _torchvision(name, num_classes, norm, norm_layer, dropout)


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def summarize(model: nn.Module, input_size: tuple[int, ...] = (1, 3, IMAGE_SIZE, IMAGE_SIZE)) -> str:
    """Returns a table of the layers with their output shapes and parameters, by torchinfo.

    One batch of zeros passes in eval mode, on the model's device. Modes, statistics and random state stay as
    they were.
    """
    import torchinfo

    modes = {module: module.training for module in model.modules()}
    parameter = next(model.parameters())
    # From a size alone, torchinfo would draw random numbers and move the model to whatever GPU it finds.
    images = torch.zeros(input_size, device=parameter.device, dtype=parameter.dtype)
    try:
        table = torchinfo.summary(
            model,
            input_data=images,
            col_names=("output_size", "num_params"),
            row_settings=("depth", "var_names"),
            mode="eval",
            verbose=0,
        )
    finally:
        # torchinfo gives all modules the mode of the outermost one.
        for module, training in modes.items():
            module.training = training
    return str(table)


def resnet18(num_classes: int, norm: Norm, dropout: float, stage_strides: tuple[int, ...]) -> nn.Module:
    """Returns ResNet-18 in its CIFAR form (He et al. 2015, arXiv 1512.03385): a 3x3 stem and no max-pool.

    Strides (1, 2, 2, 2) give maps of 32x32, 16x16, 8x8 and 4x4; with (1, 2, 2, 1) the last stay at 8x8.

    Raises:
        UserError: `stage_strides` is not four strides of 1 or 2.
    """
    if len(stage_strides) != 4 or not set(stage_strides) <= {1, 2}:
        raise UserError(f"stage_strides must be four strides of 1 or 2, but got stage_strides={list(stage_strides)}")
    layers: dict[str, nn.Module] = {
        "conv1": _conv(3, 64, norm),
        "norm1": norm(64),
        "relu": nn.ReLU(inplace=True),
    }
    widths = pairwise((64, 64, 128, 256, 512))
    for stage, ((in_channels, channels), stride) in enumerate(zip(widths, stage_strides, strict=True), 1):
        layers[f"layer{stage}"] = nn.Sequential(
            BasicBlock(in_channels, channels, stride, norm, dropout),
            BasicBlock(channels, channels, 1, norm, dropout),
        )
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(512, num_classes)}
    return nn.Sequential(OrderedDict(layers))


def resnet9(num_classes: int, norm: Norm, dropout: float, stage_strides: tuple[int, ...]) -> nn.Module:
    """Returns the nine-layer network of the EVA course, after Page's DavidNet (2018).

    A max-pool in each layer halves the maps: 16x16, 8x8, 4x4. As in DavidNet the linear layer has no bias and
    the logits are divided by 8: the max-pooled features are large, and without the factor the linear layer
    diverges at rates far below those that the convolutions want (0.006 against 0.1 in a range test).

    Raises:
        UserError: `stage_strides` is not the default; this network has no strides.
    """
    if stage_strides != STAGE_STRIDES:
        raise UserError(_no_strides("resnet9", stage_strides))

    def convolution(in_channels: int, channels: int, *between: nn.Module) -> list[nn.Module]:
        return [_conv(in_channels, channels, norm), *between, norm(channels), nn.ReLU(inplace=True)]

    def residual(channels: int) -> nn.Module:
        first, second = convolution(channels, channels), convolution(channels, channels)
        return Residual(*first, _dropout(dropout), *second)

    layers: dict[str, nn.Module] = {
        "prep": nn.Sequential(*convolution(3, 64)),
        "layer1": nn.Sequential(*convolution(64, 128, nn.MaxPool2d(2)), residual(128)),
        "layer2": nn.Sequential(*convolution(128, 256, nn.MaxPool2d(2))),
        "layer3": nn.Sequential(*convolution(256, 512, nn.MaxPool2d(2)), residual(512)),
        "pool": nn.MaxPool2d(4),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(512, num_classes, bias=False),
        "scale": Scale(1 / 8),
    }
    return nn.Sequential(OrderedDict(layers))


def speednet(num_classes: int, norm: Norm, dropout: float, stage_strides: tuple[int, ...]) -> nn.Module:
    """Returns the network of K. Jordan's CIFAR-10 speed records (2024, arXiv 2404.00498, its 94 % variant).

    A 2x2 layer that is meant to be whitened and frozen (`init=whitened`), then three groups of two convolutions with a
    max-pool after the first of each: maps of 31x31, 15x15, 7x7 and 3x3. Norms have biases but no scales, and running
    statistics that follow quickly; the logits are divided by the number of features.

    Raises:
        UserError: `stage_strides` is not the default; this network has no strides.
    """
    if stage_strides != STAGE_STRIDES:
        raise UserError(_no_strides("speednet", stage_strides))

    def normed(channels: int) -> nn.Module:
        layer = norm(channels)
        if isinstance(getattr(layer, "weight", None), nn.Parameter):
            layer.weight.requires_grad_(False)
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum, layer.eps = 0.4, 1e-12
        return layer

    def group(in_channels: int, channels: int) -> nn.Module:
        layers = _conv(in_channels, channels, norm), nn.MaxPool2d(2), normed(channels), nn.GELU()
        return nn.Sequential(*layers, _dropout(dropout), _conv(channels, channels, norm), normed(channels), nn.GELU())

    layers: dict[str, nn.Module] = {
        "first": nn.Conv2d(3, 24, 2),
        "gelu": nn.GELU(),
        "group1": group(24, 64),
        "group2": group(64, 256),
        "group3": group(256, 256),
        "pool": nn.AdaptiveMaxPool2d(1),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(256, num_classes, bias=False),
        "scale": Scale(1 / 256),
    }
    return nn.Sequential(OrderedDict(layers))


MODELS: dict[str, Callable[[int, Norm, float, tuple[int, ...]], nn.Module]] = {
    "resnet18": resnet18,
    "resnet9": resnet9,
    "speednet": speednet,
}


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, in_channels, H, W) to (N, channels, H / stride, W / stride).

    The shortcut is a 1x1 convolution and a norm where the shape changes, else the identity (option B of
    He et al. 2015).
    """

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, dropout: float) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, channels, norm, stride=stride)
        self.norm1 = norm(channels)
        self.dropout = _dropout(dropout)
        self.conv2 = _conv(channels, channels, norm)
        self.norm2 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                _conv(in_channels, channels, norm, kernel_size=1, stride=stride), norm(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.dropout(self.relu(self.norm1(self.conv1(x))))
        out = self.norm2(self.conv2(out))
        activated: Tensor = self.relu(out + self.shortcut(x))
        return activated


class Scale(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Residual(nn.Sequential):
    """Layers whose output is added to their input, which must have the same shape."""

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for layer in self:
            out = layer(out)
        return x + out


def _conv(in_channels: int, channels: int, norm: Norm, *, kernel_size: int = 3, stride: int = 1) -> nn.Conv2d:
    # Normalization layers have a bias of their own.
    bias = norm is nn.Identity
    return nn.Conv2d(in_channels, channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)


def _dropout(probability: float) -> nn.Module:
    # nn.Dropout(0) would cost a pass over the data. A stand-in keeps the names in the state dict the same.
    return nn.Dropout(probability) if probability else nn.Identity()


def _norm_layer(norm: str, ghost_splits: int, norm_groups: int) -> Norm:
    def group_norm(channels: int) -> nn.Module:
        if norm_groups < 1 or channels % norm_groups:
            raise UserError(
                "norm_groups must divide the channels of every normalized layer, "
                f"but got norm_groups={norm_groups} and a layer of {channels} channels"
            )
        return nn.GroupNorm(norm_groups, channels)

    layers: dict[str, Norm] = {
        "batch": nn.BatchNorm2d,
        "ghost": partial(GhostBatchNorm2d, splits=ghost_splits),
        "group": group_norm,
        "layer": partial(nn.GroupNorm, 1),
        "instance": partial(nn.InstanceNorm2d, affine=True),
        "none": nn.Identity,
    }
    if norm not in layers:
        raise UserError(unknown_name("norm", norm, NORMS))
    return layers[norm]


def _no_strides(name: str, stage_strides: tuple[int, ...]) -> str:
    return f"stage_strides belongs to resnet18, but got model={name} with stage_strides={list(stage_strides)}"


def _torchvision(name: str, num_classes: int, norm: str, norm_layer: Norm, dropout: float) -> nn.Module:
    """Returns a torchvision classifier without pretrained weights, known to train on 32x32 images."""
    from torchvision import models

    builder = name.removeprefix(TORCHVISION)
    options: dict[str, object] = {"weights": None, "num_classes": num_classes}
    if builder.startswith("vit_"):
        options["image_size"] = IMAGE_SIZE
    if builder in ("googlenet", "inception_v3"):
        # Auxiliary heads would return a tuple in training; init_weights is the default, but warns if unnamed.
        options |= {"aux_logits": False, "init_weights": True}
    if norm != "batch":
        options["norm_layer"] = norm_layer
    try:
        model: nn.Module = models.get_model(builder, **options)
        _check_forward(model)
    except TypeError as error:
        if "norm_layer" not in str(error):
            raise
        raise UserError(f"{name} needs norm=batch, its layers are fixed, but got norm={norm}") from None
    except (RuntimeError, ValueError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).partition("\n")[0]
        size = f"{IMAGE_SIZE}x{IMAGE_SIZE}"
        raise UserError(f"{name} with norm={norm} cannot be trained on {size} images: {reason}") from None
    if dropout:
        linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linears:
            raise UserError(f"{name} has no linear layer to put dropout before, but got dropout={dropout}")
        last = linears[-1]
        model.set_submodule(last, nn.Sequential(nn.Dropout(dropout), model.get_submodule(last)))
    return model


@torch.no_grad()
def _check_forward(model: nn.Module) -> None:
    """Passes two images in training mode on the meta device: shapes alone, the model stays untouched."""
    tensors = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in chain(model.named_parameters(), model.named_buffers())
    }
    images = torch.empty(2, 3, IMAGE_SIZE, IMAGE_SIZE, device="meta")
    torch.func.functional_call(model, tensors, images)
