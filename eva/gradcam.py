"""What in an image a network's answer rests on: Grad-CAM maps of any layers, and how they look on the image."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eva.config import UserError, unknown_name
from eva.hardware import preserved_random_state

MOST_STAGES = 4
OVERLAY_SIZE = 128
OVERLAY_OPACITY = 0.5

# Class indices (N,), one for all images, what decides them from the logits (N, K), or None for the predicted ones.
Targets = Tensor | NDArray[np.int64] | Sequence[int] | int | Callable[[Tensor], Tensor] | None
Hook = Callable[[str, nn.Module, tuple[Any, ...], Any], Tensor | None]


@dataclass(frozen=True)
class CAMs:
    """The class activation maps of a batch, by layer, on the model's device.

    Attributes:
        maps: float32 (N, H, W) in [0, 1], at the images' size: each raw map resized and divided by its own maximum,
            so that it ends in 1. A map that is zero everywhere stays zero.
        raw: float32 (N, h, w), not negative, at the layer's size and in the logit's unit, so that maps of several
            images or models can be compared. An image whose map is not finite has zeros.
        logits: float32 (N, K).
        targets: The classes that the maps speak for, int64 (N,).
    """

    maps: dict[str, Tensor]
    raw: dict[str, Tensor]
    logits: Tensor
    targets: Tensor


class GradCAM:
    """Grad-CAM of any layers of an image classifier (Selvaraju et al. 2017, arXiv 1610.02391).

    A layer's map is relu(sum over k of w_k A_k), where A_k (h, w) are the layer's activations in channel k, and w_k is
    the mean over the pixels of the gradient of the target's logit with respect to A_k. The model is borrowed: it runs
    in eval mode, frozen and not compiled, and has no hooks but during a call. Afterwards the modes of its modules,
    `requires_grad`, `.grad`, statistics and the random generators are as they were, also after an exception.

    Args:
        model: From images (N, 3, H, W) to logits (N, K). One that was compiled gives the same maps, uncompiled.
        layers: Names (as `named_modules` has them) or modules of the layers, one or several.

    Raises:
        UserError: A layer is unknown, is named twice, or there is none.
    """

    def __init__(self, model: nn.Module, layers: str | nn.Module | Sequence[str | nn.Module]) -> None:
        self.model = _uncompiled(model)
        self.layers: dict[str, nn.Module] = {}
        for layer in [layers] if isinstance(layers, (str, nn.Module)) else layers:
            name, module = _find(self.model, layer)
            if module in self.layers.values():
                raise UserError(f"each layer must be named once, but {name!r} is named twice")
            self.layers[name] = module
        if not self.layers:
            raise UserError("Grad-CAM needs at least one layer, but got none")

    def __call__(self, images: Tensor, targets: Targets = None) -> CAMs:
        """Returns the maps of a batch, from one forward and one backward pass for all images and layers.

        The gradient goes back to the earliest of the layers and no further, and never to a parameter. It works under
        `torch.no_grad`, `torch.inference_mode` and `torch.autocast`; in half precision, maps of early layers may be
        off by some hundredths of their maximum.

        Args:
            images: Float (N, 3, H, W), on the model's device; left as they are, whatever the model does to its input.
            targets: Class indices, integers (N,) or one for all images; None for the class with the largest logit.
                A function gets the logits, float32 (N, K), and returns classes (N,): for test-time augmentation,
                where more than this pass decides. It may run the model.

        Raises:
            UserError: Images or targets have the wrong shape, type or range; the logits are not (N, K); or a layer
                does not run exactly once, does not return a map (N, C, h, w), or is not reached by the gradient.
        """
        if images.ndim != 4 or not images.is_floating_point():
            raise UserError(f"images must be float (N, 3, H, W), but got {_described(images)}")
        outputs: dict[str, Tensor] = {}

        def keep(name: str, _: nn.Module, __: tuple[Any, ...], output: Any) -> Tensor:
            if name in outputs:
                raise UserError(
                    f"layer {name!r} runs more than once in a forward pass, so it has no one map; "
                    "choose a layer that runs once"
                )
            is_map = isinstance(output, Tensor) and output.ndim == 4 and len(output) == len(images)
            if not is_map or not output.is_floating_point():
                raise UserError(f"layer {name!r} must return a float map (N, C, h, w), but got {_described(output)}")
            # The model goes on with a copy: what follows may change it in place. Nothing is recorded before the first
            # layer, as nothing that requires a gradient went in. Grad mode is set for models that run parts without.
            with torch.enable_grad():
                kept: Tensor = output.clone() if output.requires_grad else output.detach().clone().requires_grad_()
                outputs[name] = kept
                return kept.clone()

        with _borrowed(self.model):
            with _hooked(self.layers, keep):
                logits = self.model(images.detach().clone())
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
                raise UserError(f"the model must return logits (N, K), but got {_described(logits)}")
            if missing := [name for name in self.layers if name not in outputs]:
                raise UserError(f"the forward pass must run every layer, but it does not run {_quoted(missing)}")
            classes = _classes(targets, logits.detach().float())
            score = logits.gather(1, classes[:, None]).sum()
            gradients: dict[str, Tensor | None] = dict.fromkeys(outputs)
            if score.requires_grad:
                found = torch.autograd.grad(score, list(outputs.values()), allow_unused=True)
                gradients = dict(zip(outputs, found, strict=True))
            if unreached := [name for name in self.layers if gradients[name] is None]:
                raise UserError(
                    f"no gradient reaches {_quoted(unreached)}: "
                    "the logits don't depend on that output, or the model detaches it on the way"
                )
        with torch.no_grad():
            raw = {
                name: _weighted_sum(outputs[name], gradient)
                for name in self.layers
                if (gradient := gradients[name]) is not None
            }
            maps = {name: _scaled(each, (images.shape[2], images.shape[3])) for name, each in raw.items()}
            return CAMs(maps, raw, logits.detach().float(), classes)


def stages(model: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Returns the names of at most four layers whose maps go from fine to coarse, in the order in which they run.

    They are taken from the model's outermost modules, or from those inside them, level by level, while fewer than
    four return a map. The last module of each map size goes before the others, then later ones before earlier ones:
    for a ResNet, its four stages. The last name is that of the deepest layer. Empty for a model without
    convolutional maps.

    A map is an output (N, C, h, w) of more than one pixel, in the images' proportions, and no larger than they and the
    maps before it (an average pooling may copy one pixel to many). A convolution of the images themselves is no
    feature of theirs (a vision transformer's patches), modules that run more than once have no one map, and what lies
    inside a module that returns tokens is left alone: attention has squares of its own.

    Args:
        model: From images (N, 3, H, W) to logits; left as it was.
        images: Float (N, 3, H, W), on the model's device; only the first is used.
    """
    model = _uncompiled(model)
    shapes: dict[str, list[tuple[int, ...]]] = {}  # of the outputs of each run; () for what can't be a map
    image = images[:1].detach().clone()

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        of_images = isinstance(module, nn.Conv2d) and any(argument is image for argument in args)
        shapes.setdefault(name, []).append(tuple(output.shape) if isinstance(output, Tensor) and not of_images else ())

    with _borrowed(model), torch.no_grad(), _hooked(dict(model.named_modules()), note):
        model(image)

    size = (images.shape[2], images.shape[3])
    once = {name: runs[0] for name, runs in shapes.items() if len(runs) == 1}
    found: dict[str, tuple[int, int]] = {}
    level: list[str] = []
    deeper = [name for name, _ in model.named_children()]
    while len(found) < MOST_STAGES and deeper != level:
        level = deeper
        maps = _shrinking({name: shape for name, shape in once.items() if name in level}, size)
        found = max(found, maps, key=len)
        deeper = [inner for name in level for inner in _inside(model, name, once.get(name, ()), size)]
    order = list(found)
    last_of_size = {size: name for name, size in found.items()}.values()
    chosen = sorted(order, key=lambda name: (name in last_of_size, order.index(name)))[-MOST_STAGES:]
    return tuple(sorted(chosen, key=order.index))


def _is_map(shape: tuple[int, ...], size: tuple[int, int]) -> bool:
    """Whether an output may be the map (1, C, h, w) of an image of a size: not (1, h, w, C), for one."""
    if len(shape) != 4 or shape[0] != 1:
        return False
    (height, width), (h, w) = size, shape[2:]
    return h <= height and w <= width and abs(h * width - w * height) <= max(size)  # in proportion to a pixel


def _shrinking(shapes: Mapping[str, tuple[int, ...]], size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Returns the sizes of the maps of more than one pixel, without those that are larger than one before them."""
    found: dict[str, tuple[int, int]] = {}
    smallest = size
    for name, shape in shapes.items():
        if _is_map(shape, size) and shape[2] <= smallest[0] and shape[3] <= smallest[1]:
            smallest = (shape[2], shape[3])
            if smallest != (1, 1):
                found[name] = smallest
    return found


def _inside(model: nn.Module, name: str, shape: tuple[int, ...], size: tuple[int, int]) -> list[str]:
    """Returns the names of a module's children, or its own if it has none or nothing in it can be a map."""
    children = [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    return children if children and (len(shape) < 3 or _is_map(shape, size)) else [name]


def heat_map(
    raw_map: NDArray[np.floating], size: int = OVERLAY_SIZE, scale: float | None = None
) -> NDArray[np.float32]:
    """Returns a map resized to float32 (size, size), divided by a scale and clipped to [0, 1].

    Bilinear between pixel centres, as `CAMs.maps` and as captum's `LayerAttribution.interpolate` has it.

    Args:
        raw_map: Not negative, (h, w), as in `CAMs.raw`.
        size: Height and width in pixels.
        scale: The value that becomes 1, the same for maps that are to be compared; None for the resized map's own
            maximum. A map of zeros stays zero.

    Raises:
        UserError: `scale` is not above 0, or `size` is below 1.
    """
    if size < 1:
        raise UserError(f"size must be at least 1 pixel, but got size={size}")
    if scale is not None and not 0 < scale < np.inf:
        raise UserError(f"scale must be a number above 0, but got scale={scale}")
    resized = cv2.resize(np.asarray(raw_map, np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
    top = scale if scale is not None else float(resized.max())
    return np.asarray(np.clip(resized / (top or 1), 0, 1), np.float32)


def colour_map(
    raw_map: NDArray[np.floating], size: int = OVERLAY_SIZE, scale: float | None = None
) -> NDArray[np.uint8]:
    """Returns `heat_map` in OpenCV's turbo colours, uint8 (size, size, 3) RGB: from blue for 0 to red for 1."""
    levels = np.rint(255 * heat_map(raw_map, size, scale)).astype(np.uint8)
    return np.asarray(cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB), np.uint8)


def overlay(
    image: NDArray[np.uint8],
    raw_map: NDArray[np.floating],
    size: int = OVERLAY_SIZE,
    scale: float | None = None,
    opacity: float = OVERLAY_OPACITY,
) -> NDArray[np.uint8]:
    """Returns the coloured heat map over the image, uint8 (size, size, 3) RGB.

    Args:
        image: uint8 (H, W, 3) RGB; enlarged bicubically.
        raw_map: As `heat_map` takes it, like `size` and `scale`.
        size: Height and width in pixels.
        scale: The value that becomes 1; None for the map's own maximum.
        opacity: Weight of the colours, in [0, 1]; the image has the rest.

    Raises:
        UserError: The image is not uint8 (H, W, 3), or a number is out of its range.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"the image must be uint8 (H, W, 3), but got {image.dtype} {image.shape}")
    if not 0 <= opacity <= 1:
        raise UserError(f"opacity must be in [0, 1], but got opacity={opacity}")
    colours = colour_map(raw_map, size, scale)
    enlarged = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(cv2.addWeighted(enlarged, 1 - opacity, colours, opacity, 0), np.uint8)


@contextlib.contextmanager
def _borrowed(model: nn.Module) -> Iterator[None]:
    """Lends a model in eval mode, frozen, not compiled, where gradients can be had; gives back all as it was.

    Raises:
        UserError: The model was made under `torch.inference_mode`, which rules gradients out for good.
    """
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise UserError("Grad-CAM needs a model that was made outside of torch.inference_mode")
    # Modes are set one by one: `eval` and `train` may be overridden to do more.
    modes = {module: module.training for module in model.modules()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Compiled code would pass the hooks by. Where torch._dynamo was never imported nothing is compiled, and importing
    # it takes seconds.
    dynamo = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if dynamo else contextlib.nullcontext()
    with eager, preserved_random_state(), torch.inference_mode(False), torch.enable_grad():
        try:
            for module in modes:
                module.training = False
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
        finally:
            for module, training in modes.items():
                module.training = training
            for parameter in trained:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def _hooked(modules: Mapping[str, nn.Module], hook: Hook) -> Iterator[None]:
    """Has `hook` called with each module's name, itself, its arguments and its output; what it returns goes on."""
    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(partial(hook, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _uncompiled(model: nn.Module) -> nn.Module:
    """Returns the model inside the wrapper that `torch.compile` makes, whose names it has."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _find(model: nn.Module, layer: str | nn.Module) -> tuple[str, nn.Module]:
    named = dict(model.named_modules(remove_duplicate=False))
    if isinstance(layer, str):
        if layer not in named:
            raise UserError(unknown_name("layer", layer, filter(None, named), shown=dict(model.named_children())))
        return layer, named[layer]
    for name, module in named.items():
        if module is layer:
            return name, module
    raise UserError(f"the layer must be a module of the model, but got another {type(layer).__name__}")


def _classes(targets: Targets, logits: Tensor) -> Tensor:
    """Returns the class indices, int64 (N,), checked: CUDA would end the process at a wrong one."""
    images, classes = logits.shape
    if targets is None:
        return logits.argmax(1)
    if isinstance(targets, (int, np.integer)):
        found = torch.full((images,), int(targets), device=logits.device)
    else:
        found = targets(logits) if callable(targets) else torch.as_tensor(targets)
        if found.shape != (images,) or found.is_floating_point() or found.dtype == torch.bool:
            raise UserError(f"targets must be class indices ({images},), but got {_described(found)}")
        # A copy, as it may have been made under torch.inference_mode.
        found = found.detach().to(logits.device, torch.int64, copy=True)
    wrong = (found < 0) | (found >= classes)
    if wrong.any():
        raise UserError(f"targets must be in 0..{classes - 1}, but got {int(found[wrong][0])}")
    return found


def _weighted_sum(activations: Tensor, gradient: Tensor) -> Tensor:
    """Returns relu(sum over k of w_k A_k), float32 (N, h, w); zeros for an image where that is not finite."""
    weights = gradient.mean((2, 3), keepdim=True, dtype=torch.float32)  # (N, C, 1, 1)
    raw = F.relu((weights * activations.float()).sum(1))
    return torch.where(raw.isfinite().all(2).all(1)[:, None, None], raw, 0)


def _scaled(raw: Tensor, size: tuple[int, int]) -> Tensor:
    """Returns maps (N, H, W) in [0, 1]: divided after resizing, so that each ends in 1."""
    maps = F.interpolate(raw[:, None], size, mode="bilinear", align_corners=False)[:, 0]
    top = maps.amax((1, 2), keepdim=True)
    return maps / torch.where(top > 0, top, 1)


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names))


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__
