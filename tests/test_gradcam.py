"""Grad-CAM against torchcam, captum and closed forms, that it leaves nothing behind, and finds a known place."""

import contextlib
import copy
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerAttribution, LayerGradCam
from PIL import Image
from torch import Tensor, nn
from torchcam.methods import GradCAM as TorchCAM

from eva.config import UserError
from eva.gradcam import CAMs, GradCAM, Targets, colour_map, heat_map, overlay, stages
from eva.models import build_model

SIZE = (32, 32)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images_of(count: int = 4) -> Tensor:
    return torch.randn(count, 3, *SIZE)


def randomize_norms(model: nn.Module) -> None:
    """Statistics and affine parameters unlike those of a new layer, so that a wrong mode is noticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


def small_model(inplace: bool = True) -> nn.Sequential:
    """Two blocks that change what they get in place, with norm and dropout; 32x32 and 16x16 maps, five classes."""
    layers = {
        "conv1": nn.Conv2d(3, 8, 3, padding=1),
        "norm1": nn.BatchNorm2d(8),
        "relu1": nn.ReLU(inplace=inplace),
        "block": nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU(inplace=inplace)),
        "conv2": nn.Conv2d(12, 12, 3, padding=1),
        "relu2": nn.LeakyReLU(0.1, inplace=inplace),
        "dropout": nn.Dropout(0.5),
        "pool": nn.AdaptiveAvgPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(48, 5),
    }
    model = nn.Sequential(OrderedDict(layers))
    randomize_norms(model)
    return model


SMALL_LAYERS = ("conv1", "norm1", "relu1", "block", "conv2", "relu2")


def assert_same(cams: CAMs, expected: CAMs, tolerance: float = 1e-5) -> None:
    """Equal to within a share of each map's largest value, and of the logits'."""
    assert list(cams.maps) == list(expected.maps) and list(cams.raw) == list(expected.raw)
    assert torch.equal(cams.targets, expected.targets)
    torch.testing.assert_close(
        cams.logits, expected.logits, rtol=0, atol=tolerance * float(expected.logits.abs().max())
    )
    for name in expected.raw:
        top = float(expected.raw[name].max())
        torch.testing.assert_close(cams.raw[name], expected.raw[name], rtol=0, atol=tolerance * top)
        torch.testing.assert_close(cams.maps[name], expected.maps[name], rtol=0, atol=10 * tolerance)


# against other libraries


def of_torchcam(model: nn.Module, layers: tuple[str, ...], images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """torchcam's raw maps (N, h, w) of a model in eval mode."""
    with TorchCAM(model.eval(), list(layers)) as extract:
        maps = extract(classes.tolist(), model(images), normalized=False)
    return dict(zip(layers, maps, strict=True))


def of_captum(model: nn.Module, layers: tuple[str, ...], images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """captum's raw maps (N, h, w) of a model in eval mode, one layer after the other."""
    model.eval()
    return {
        name: LayerGradCam(model, model.get_submodule(name))
        .attribute(images, target=classes, relu_attributions=True)[:, 0]
        .detach()
        for name in layers
    }


def assert_like_both(cams: CAMs, model: nn.Module, images: Tensor) -> None:
    """Raw maps within 1e-5 of their largest value, scaled ones within 1e-4, of those of both libraries."""
    layers = tuple(cams.raw)
    torchcam, captum = (library(model, layers, images, cams.targets) for library in (of_torchcam, of_captum))
    for name in layers:
        for expected in (torchcam[name], captum[name]):
            top = float(expected.max())
            assert top > 0, f"{name}: maps of zeros compare nothing"
            torch.testing.assert_close(cams.raw[name], expected, rtol=0, atol=1e-5 * top)
            resized = LayerAttribution.interpolate(expected[:, None], SIZE, "bilinear")[:, 0]
            highest = resized.amax((1, 2), keepdim=True).clamp_min(1e-30)
            torch.testing.assert_close(cams.maps[name], resized / highest, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "norm", "layers"),
    [
        ("resnet18", "batch", ("layer1", "layer2", "layer3", "layer4")),
        ("resnet18", "layer", ("layer4", "conv1", "layer2.0", "layer2.0.conv2")),
        ("resnet9", "batch", ("prep", "layer1", "layer2", "layer3")),
        ("torchvision/resnet18", "batch", ("conv1", "layer1", "layer2", "layer3.1.conv2")),
        ("torchvision/mobilenet_v3_small", "batch", ("features.0", "features.3", "features.8", "features.11.block.0")),
        ("torchvision/shufflenet_v2_x0_5", "batch", ("conv1", "maxpool", "stage2", "stage3")),
    ],
)
def test_maps_are_those_of_torchcam_and_captum(name: str, norm: str, layers: tuple[str, ...]) -> None:
    model = build_model(name, num_classes=5, norm=norm)
    randomize_norms(model)
    images = images_of(2).repeat_interleave(3, dim=0)
    cams = GradCAM(model, layers)(images, torch.tensor([0, 1, 2, 3, 4, 0]))
    # Both libraries read what a later in-place layer made of a layer's output: they get a model without such layers.
    reference = copy.deepcopy(model)
    for module in reference.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # type: ignore[assignment]
    assert_like_both(cams, reference, images)


def test_layers_before_and_among_in_place_layers_give_what_they_returned() -> None:
    model, images = small_model(inplace=True), images_of()
    reference = small_model(inplace=False)
    reference.load_state_dict(model.state_dict())
    assert_like_both(GradCAM(model, SMALL_LAYERS)(images), reference, images)
    # One at a time as well: then each is the earliest.
    for name in SMALL_LAYERS:
        assert_like_both(GradCAM(model, name)(images), reference, images)


def test_a_layer_that_is_added_to_in_place_gives_what_it_returned() -> None:
    class Added(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.body, self.inplace = small_model(), inplace

        def forward(self, images: Tensor) -> Tensor:
            stem = self.body[0](images)
            branch = self.body[1](stem)
            if self.inplace:
                branch += stem
            else:
                branch = branch + stem
            logits: Tensor = self.body[2:](branch)
            return logits

    model, reference, images = Added(inplace=True), Added(inplace=False), images_of()
    reference.load_state_dict(model.state_dict())
    for module in reference.modules():
        if isinstance(module, (nn.ReLU, nn.LeakyReLU)):
            module.inplace = False
    assert_like_both(GradCAM(model, ["body.norm1", "body.conv1"])(images), reference, images)


# closed forms


class Weighted(nn.Module):
    """Logits that are weighted means over each channel of the images, read from a layer that returns them."""

    def __init__(self, weights: list[list[float]]) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, images: Tensor) -> Tensor:
        means: Tensor = self.layer(images).mean((2, 3))
        return means @ self.weights.T


WEIGHTS = [[1.0, -2.0, 0.5], [0.0, 3.0, -1.0], [0.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]


def test_raw_maps_are_the_weighted_sum_worked_out_by_hand() -> None:
    images = images_of()
    cams = GradCAM(Weighted(WEIGHTS), "layer")(images, torch.tensor([0, 1, 3, 0]))
    weights = torch.tensor(WEIGHTS)[[0, 1, 3, 0]] / (32 * 32)
    expected = (images * weights[:, :, None, None]).sum(1).clamp_min(0)
    torch.testing.assert_close(cams.raw["layer"], expected)
    torch.testing.assert_close(cams.maps["layer"], expected / expected.amax((1, 2), keepdim=True))


def test_a_map_of_zeros_stays_zeros() -> None:
    cams = GradCAM(Weighted(WEIGHTS), "layer")(images_of().abs(), torch.tensor([2, 3, 0, 2]))
    for found in (cams.raw["layer"], cams.maps["layer"]):
        assert found.flatten(1).any(1).tolist() == [False, False, True, False]
        assert found.isfinite().all()


def test_maps_have_the_promised_shapes_types_and_range() -> None:
    images = torch.randn(3, 3, 24, 40)
    cams = GradCAM(small_model(), ["block", "relu1"])(images)
    assert [tuple(found.shape) for found in cams.raw.values()] == [(3, 12, 20), (3, 24, 40)]
    for found in (*cams.maps.values(), *cams.raw.values(), cams.logits):
        assert found.dtype == torch.float32 and not found.requires_grad
    for found in cams.maps.values():
        assert found.shape == (3, 24, 40)
        assert found.amax((1, 2)).tolist() == [1.0, 1.0, 1.0] and found.min() >= 0
    assert cams.targets.dtype == torch.int64


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_with_logits_that_are_not_finite_has_zeros_and_spoils_no_other(value: float) -> None:
    model, images = small_model(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images, 1)
    images[2, 0, 5, 5] = value
    cams = GradCAM(model, SMALL_LAYERS)(images, 1)
    assert not cams.logits[2].isfinite().all()
    others = torch.tensor([0, 1, 3])
    for name in SMALL_LAYERS:
        assert not cams.raw[name][2].any() and not cams.maps[name][2].any()
        torch.testing.assert_close(cams.maps[name][others], expected.maps[name][others], rtol=0, atol=1e-5)
    GradCAM(model, SMALL_LAYERS)(images)  # whatever the largest of such logits is


def test_a_layer_whose_output_is_used_twice_has_the_gradient_of_both_uses() -> None:
    class Twice(Weighted):
        def forward(self, images: Tensor) -> Tensor:
            out = self.layer(images)
            means: Tensor = out.mean((2, 3)) + 2 * out.relu_().mean((2, 3))
            return means @ self.weights.T

    images = images_of().abs()
    once, twice = (GradCAM(made(WEIGHTS), "layer")(images, 0).raw["layer"] for made in (Weighted, Twice))
    torch.testing.assert_close(twice, 3 * once)


def test_a_layer_that_returns_its_input_gives_what_it_returned_though_that_is_changed_later() -> None:
    class Reused(Weighted):
        def forward(self, images: Tensor) -> Tensor:
            features = images * 1
            means: Tensor = self.layer(features).mean((2, 3))
            features.zero_()
            return means @ self.weights.T

    images = images_of().abs()
    expected, reused = (GradCAM(made(WEIGHTS), "layer")(images, 0).raw["layer"] for made in (Weighted, Reused))
    assert expected.any()
    torch.testing.assert_close(reused, expected)


# which class


def test_the_class_is_the_predicted_one_unless_it_is_given() -> None:
    model, images = small_model().eval(), images_of()
    predicted = model(images).argmax(1)
    cam = GradCAM(model, "block")
    assert torch.equal(cam(images).targets, predicted)
    assert_same(cam(images), cam(images, predicted))
    assert_same(cam(images, 3), cam(images, torch.full((4,), 3)))
    assert_same(cam(images, torch.tensor([0, 3, 1, 4], dtype=torch.int32)), cam(images, torch.tensor([0, 3, 1, 4])))


def test_a_function_decides_the_class_from_more_than_this_pass() -> None:
    model, images = small_model().train(), images_of(16)
    cam = GradCAM(model, "block")
    seen: list[Tensor] = []

    def with_flipped(logits: Tensor) -> Tensor:
        seen.append(logits)
        flipped: Tensor = model(images.flip(3))  # in the mode in which it is asked for the maps
        return (logits - flipped).argmax(1)  # a sum would often be decided by one of them

    cams = cam(images, with_flipped)
    assert torch.equal(seen[0], cams.logits)
    model.eval()
    expected = (model(images) - model(images.flip(3))).argmax(1)
    assert torch.equal(cams.targets, expected)
    assert_same(cams, cam(images, expected))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (5, r"targets must be in 0\.\.4, but got 5"),
        (-1, r"targets must be in 0\.\.4, but got -1"),
        (torch.tensor([0, 1, 7, 0]), r"targets must be in 0\.\.4, but got 7"),
        (torch.tensor([0, 1]), r"targets must be class indices \(4,\), but got int64 \(2,\)"),
        (torch.zeros(4), r"targets must be class indices \(4,\), but got float32 \(4,\)"),
        (lambda logits: logits, r"targets must be class indices \(4,\), but got float32 \(4, 5\)"),
    ],
)
def test_wrong_targets_are_told(targets: Targets, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradCAM(small_model(), "block")(images_of(), targets)


# the same maps whatever is around


def test_a_batch_gives_what_single_images_give() -> None:
    model, images = small_model(), images_of(6)
    cam = GradCAM(model, SMALL_LAYERS)
    batch = cam(images)
    for index in range(6):
        single = cam(images[index : index + 1])
        for name in SMALL_LAYERS:
            torch.testing.assert_close(single.maps[name][0], batch.maps[name][index], rtol=0, atol=1e-5)
            torch.testing.assert_close(single.raw[name][0], batch.raw[name][index])


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_gradients_are_had_where_they_are_switched_off(around: Callable[[], Any]) -> None:
    model, images = small_model(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images, torch.tensor([1, 0, 4, 2]))
    with around():
        targets = torch.tensor([1, 0, 4, 2])
        cam = GradCAM(model, SMALL_LAYERS)
        assert_same(cam(images.clone(), targets), expected)
        assert_same(cam(images * 1, lambda logits: targets * 1), expected)
        assert not torch.is_grad_enabled()


def test_a_frozen_model_gives_the_same_maps() -> None:
    model, images = small_model(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images)
    assert_same(GradCAM(model.requires_grad_(False), SMALL_LAYERS)(images), expected)


def test_channels_last_gives_the_same_maps() -> None:
    model, images = small_model(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images)
    last = model.to(memory_format=torch.channels_last)
    assert_same(GradCAM(last, SMALL_LAYERS)(images.to(memory_format=torch.channels_last)), expected)


def test_autocast_gives_nearly_the_same_maps_in_float32() -> None:
    model, images = small_model().eval(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16
        cams = GradCAM(model, SMALL_LAYERS)(images, 1)
    for name in SMALL_LAYERS:
        assert cams.raw[name].dtype == cams.maps[name].dtype == cams.logits.dtype == torch.float32
        difference = (cams.raw[name] - expected.raw[name]).abs().max()
        assert 0 < difference < 0.1 * expected.raw[name].max()
    # Within autocast, casts of weights are kept for later: none of ours may be.
    with torch.autocast("cpu", torch.bfloat16):
        GradCAM(model, "conv1")(images)
        model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("way", ["wrapped", "in place", "a layer"])
def test_a_compiled_model_gives_the_same_maps_and_stays_compiled(way: str) -> None:
    model, images = small_model().eval(), images_of()
    expected = GradCAM(model, SMALL_LAYERS)(images)
    compiled: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    asked: Any = model
    if way == "wrapped":
        asked = torch.compile(model, backend=backend)
    elif way == "in place":
        model.compile(backend=backend)
    else:
        model[3] = torch.compile(model[3], backend=backend)  # type: ignore[assignment]
    with torch.no_grad():
        logits = asked(images)
        before = len(compiled)
        assert before > 0
        assert_same(GradCAM(asked, SMALL_LAYERS)(images), expected)
        assert stages(asked, images) == ("relu1", "relu2", "dropout", "pool")
        torch.testing.assert_close(asked(images), logits, rtol=0, atol=0)
    assert len(compiled) == before


# nothing stays behind


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a pass could leave in a model, and the random generators."""
    modules = dict(model.named_modules())
    return {
        "modes": {name: module.training for name, module in modules.items()},
        "hooks": {
            (name, kind): len(hooks)
            for name, module in modules.items()
            for kind, hooks in vars(module).items()
            if "hooks" in kind and hooks is not None
        },
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "gradients": {
            name: None if parameter.grad is None else parameter.grad.numpy(force=True).copy()
            for name, parameter in model.named_parameters()
        },
        "tensors": {name: tensor.numpy().copy() for name, tensor in model.state_dict().items()},
        "random": (random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state().numpy()),
        "grad mode": torch.is_grad_enabled(),
    }


@contextlib.contextmanager
def nothing_left(model: nn.Module) -> Iterator[None]:
    """Fails if anything is left in the model; modes and frozen parameters are mixed first, and gradients filled."""
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        parameter.requires_grad_(index % 3 != 0)
    before = state_of(model)
    tensors = dict(model.named_parameters())
    yield
    after = state_of(model)
    for part in before:
        np.testing.assert_equal(after[part], before[part], err_msg=part)
    assert all(parameter is tensors[name] for name, parameter in model.named_parameters())


class Fails(nn.Module):
    """Raises in the pass that is named, forward or backward; draws random numbers before."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.when = when

    def forward(self, x: Tensor) -> Tensor:
        noisy = x + torch.rand(()) * torch.tensor(np.random.rand())
        if self.when == "forward":
            raise KeyboardInterrupt("forward failed")
        if self.when == "backward" and noisy.requires_grad:
            noisy.register_hook(self.fail)  # type: ignore[no-untyped-call]
        return noisy

    @staticmethod
    def fail(_: Tensor) -> None:
        raise RuntimeError("backward failed")


@pytest.mark.parametrize("norm", ["batch", "ghost", "instance"])
def test_a_pass_leaves_nothing_behind(norm: str) -> None:
    network = build_model("resnet9", num_classes=5, norm=norm, dropout=0.2)
    model = nn.Sequential(OrderedDict(noise=Fails("never"), net=network))
    images = images_of(2).requires_grad_()
    with nothing_left(model):
        cams = GradCAM(model, ["net.layer1.1", "net.layer3"])(images)
        assert stages(model, images) == ("net.prep", "net.layer1", "net.layer2", "net.layer3")
    assert images.grad is None
    assert not any(found.requires_grad for found in (*cams.maps.values(), *cams.raw.values(), cams.logits))


def refuse(_: Tensor) -> Tensor:
    raise ZeroDivisionError("no class")


@pytest.mark.parametrize(
    ("when", "layers", "targets", "error", "message"),
    [
        ("forward", "conv1", None, KeyboardInterrupt, "forward failed"),
        ("backward", "conv1", None, RuntimeError, "backward failed"),
        ("never", ["conv1", "fc"], None, UserError, "layer 'fc' must return a float map"),
        ("never", "conv1", 9, UserError, "targets must be in"),
        ("never", "conv1", refuse, ZeroDivisionError, "no class"),
    ],
)
def test_a_pass_that_fails_leaves_nothing_behind(
    when: str, layers: str | list[str], targets: Targets, error: type[BaseException], message: str
) -> None:
    model, images = small_model(), images_of()
    model[3].append(Fails(when))  # type: ignore[operator]
    with nothing_left(model), pytest.raises(error, match=message):
        GradCAM(model, layers)(images, targets)


def test_stages_leave_nothing_behind_when_the_model_fails() -> None:
    model, images = small_model(), images_of()
    model[3].append(Fails("forward"))  # type: ignore[operator]
    with nothing_left(model), pytest.raises(KeyboardInterrupt, match="forward failed"):
        stages(model, images)


def test_a_training_step_goes_on_as_if_no_pass_had_come_between() -> None:
    model, images = small_model().train(), images_of()
    other = copy.deepcopy(model)

    def gradients(trained: nn.Module, between: Callable[[], Any]) -> list[Tensor]:
        torch.manual_seed(1)
        loss = F.cross_entropy(trained(images), torch.tensor([0, 1, 2, 3]))
        between()
        loss = loss + F.cross_entropy(trained(images), torch.tensor([3, 2, 1, 0]))  # dropout draws
        return list(torch.autograd.grad(loss, list(trained.parameters())))

    plain = gradients(model, lambda: None)
    for found, expected in zip(gradients(other, lambda: GradCAM(other, SMALL_LAYERS)(images)), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_nothing_is_recorded_before_the_earliest_layer() -> None:
    class Watch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            recorded.append(x.requires_grad)
            return x

    recorded: list[bool] = []
    model = nn.Sequential(*itertools.chain.from_iterable((layer, Watch()) for layer in small_model()))
    GradCAM(model, ["8", "6"])(images_of())
    assert recorded == [False] * 3 + [True] * 7


def test_images_that_the_model_changes_in_place_stay_as_they_were() -> None:
    model = nn.Sequential(nn.ReLU(inplace=True), *small_model())
    images = images_of()
    before = images.clone()
    cams = GradCAM(model, "4")(images)
    stages(model, images)
    assert torch.equal(images, before)
    assert_same(cams, GradCAM(model, "4")(before.relu()))


# which layers


class Odd(nn.Module):
    """Layers of every kind that has no map, before a head that reads one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.shared, self.unused, self.never = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))
        self.detached = nn.Conv2d(3, 3, 1)
        self.tuple = Pair()
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fold = nn.Flatten(0, 1)

    def forward(self, images: Tensor) -> Tensor:
        out = self.shared(self.shared(self.conv(images)))
        self.unused(out)
        self.fold(out[:, :, None])
        first, second = self.tuple(out)
        logits: Tensor = self.pool(first + second + self.detached(out).detach())
        return logits


class Pair(nn.Module):
    """Returns its input twice."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("shared", "layer 'shared' runs more than once in a forward pass"),
        (["conv", "never"], "the forward pass must run every layer, but it does not run 'never'"),
        (["conv", "unused"], "no gradient reaches 'unused'"),
        (["detached", "unused"], "no gradient reaches 'detached', 'unused'"),
        ("pool", r"layer 'pool' must return a float map \(N, C, h, w\), but got float32 \(4, 3\)"),
        ("tuple", r"layer 'tuple' must return a float map \(N, C, h, w\), but got tuple"),
        ("fold", r"layer 'fold' must return a float map \(N, C, h, w\), but got float32 \(12, 1, 32, 32\)"),
    ],
)
def test_a_layer_that_has_no_one_map_is_refused(layers: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradCAM(Odd(), layers)(images_of())


def test_the_last_output_of_a_part_that_runs_without_gradients_has_a_map() -> None:
    class Backbone(nn.Module):
        def __init__(self, body: nn.Module, head: nn.Module) -> None:
            super().__init__()
            self.body, self.head = body, head

        def forward(self, images: Tensor) -> Tensor:
            with torch.no_grad():
                features = self.body(images)
            logits: Tensor = self.head(features)
            return logits

    model, images = small_model(), images_of()
    cams = GradCAM(Backbone(model[:4], model[4:]), "body")(images)
    torch.testing.assert_close(cams.raw["body"], GradCAM(model, "block")(images).raw["block"])


def test_layers_are_named_or_given() -> None:
    model, images = small_model(), images_of()
    named = GradCAM(model, ["block.0", "conv2"])(images)
    assert list(named.maps) == list(named.raw) == ["block.0", "conv2"]
    assert_same(GradCAM(model, [model.block[0], model.conv2])(images), named)  # type: ignore[index, list-item]
    assert_same(GradCAM(model, model.conv2)(images), GradCAM(model, "conv2")(images))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blok", r"unknown layer 'blok' \(did you mean 'block'\?\); known: conv1, norm1, .*fc$"),
        (["conv1", "block.7"], r"unknown layer 'block.7' \(did you mean 'block.\d'\?\)"),
        (["conv1", "conv2", "conv1"], "each layer must be named once, but 'conv1' is named twice"),
        (nn.Conv2d(3, 3, 1), "the layer must be a module of the model, but got another Conv2d"),
        ([], "Grad-CAM needs at least one layer"),
    ],
)
def test_wrong_layers_are_told(layers: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradCAM(small_model(), layers)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), r"images must be float \(N, 3, H, W\), but got float32 \(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "but got uint8"),
    ],
)
def test_wrong_images_are_told(images: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradCAM(small_model(), "conv1")(images)


def test_a_model_without_logits_is_told() -> None:
    with pytest.raises(UserError, match=r"the model must return logits \(N, K\), but got float32 \(4, 12, 16, 16\)"):
        GradCAM(small_model()[:4], "conv1")(images_of())


def test_a_model_made_where_gradients_are_ruled_out_is_told() -> None:
    with torch.inference_mode():
        model = small_model()
    with pytest.raises(UserError, match=r"outside of torch\.inference_mode"):
        GradCAM(model, "conv1")(images_of())


# the stages of a network


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {}, ("layer1", "layer2", "layer3", "layer4")),
        ("resnet18", {"stage_strides": (1, 2, 2, 1), "norm": "layer"}, ("layer1", "layer2", "layer3", "layer4")),
        ("resnet9", {}, ("prep", "layer1", "layer2", "layer3")),
        ("torchvision/resnet18", {}, ("relu", "layer1", "layer2", "layer3")),
        ("torchvision/shufflenet_v2_x0_5", {}, ("conv1", "maxpool", "stage2", "stage3")),
        ("torchvision/mobilenet_v3_small", {}, ("features.0", "features.1", "features.3", "features.8")),
    ],
)
def test_stages_are_the_last_modules_of_the_coarser_and_coarser_maps(
    name: str, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    assert stages(build_model(name, num_classes=5, **options), images_of(1)) == expected


def test_every_stage_has_a_map() -> None:
    model, images = build_model("torchvision/mobilenet_v3_small", num_classes=5), images_of(2)
    raw = GradCAM(model, stages(model, images))(images).raw
    assert [tuple(found.shape[1:]) for found in raw.values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]


def test_copies_of_a_pixel_are_no_stage() -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(7), nn.Flatten()]
    assert stages(nn.Sequential(*layers, nn.Linear(196, 5)), images_of()) == ("1",)


def test_tokens_and_models_without_convolutions_have_no_stages() -> None:
    from torchvision.models import SwinTransformer, VisionTransformer

    vit = VisionTransformer(32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=8, mlp_dim=8, num_classes=5)
    swin = SwinTransformer([4, 4], embed_dim=12, depths=[1, 1], num_heads=[2, 2], window_size=[2, 2], num_classes=5)
    assert stages(swin, images_of()) == ("permute",)  # before it the channels come last
    for model in (vit, nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), nn.Linear(32, 5)):
        assert stages(model, images_of()) == ()


def test_attention_is_no_stage() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Softmax(3)

        def forward(self, patches: Tensor) -> Tensor:
            tokens = patches.flatten(2).transpose(1, 2)  # (N, 16, 8)
            heads = tokens.reshape(-1, 16, 2, 4).transpose(1, 2)  # (N, 2, 16, 4)
            weights = self.weights(heads @ heads.transpose(2, 3))  # (N, 2, 16, 16)
            attended: Tensor = weights @ heads
            return attended.transpose(1, 2).flatten(2)

    model = nn.Sequential(nn.Conv2d(3, 8, 8, 8), Attention(), nn.Flatten(), nn.Linear(128, 5))
    assert stages(model, images_of()) == ()


def test_stages_do_not_run_twice_and_need_not_be_four() -> None:
    assert stages(Odd(), images_of()) == ("unused", "detached")  # maps, though no logit depends on them
    shared = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), shared, nn.Conv2d(4, 4, 3), shared, nn.Flatten(), nn.LazyLinear(5))
    model(images_of())
    assert stages(model, images_of()) == ("2",)


# sense


def patches(count: int, seed: int, side: int = 10) -> tuple[Tensor, Tensor, Tensor]:
    """Noise images with a red, green or blue patch that is the class, and a black or white one that says nothing.

    Both lie anywhere, one in each half. Returns images (N, 3, 32, 32), classes (N,) and where the coloured patch is,
    bool (N, 32, 32).
    """
    rng = np.random.default_rng(seed)
    images = rng.uniform(-0.3, 0.3, (count, 3, *SIZE)).astype(np.float32)
    classes = rng.integers(3, size=count)
    inside = np.zeros((count, *SIZE), dtype=bool)
    for image, label, place in zip(images, classes, inside, strict=True):
        half = rng.integers(2)
        for patch, left in (("class", 16 * half), ("nothing", 16 - 16 * half)):
            row, column = rng.integers(32 - side + 1), left + rng.integers(16 - side + 1)
            at = (slice(row, row + side), slice(column, column + side))
            if patch == "class":
                colour = np.where(np.arange(3) == label, 1, -1)
                place[at] = True
            else:
                colour = np.full(3, rng.choice((-1, 1)))
            image[(slice(None), *at)] += colour[:, None, None]
    return torch.from_numpy(images), torch.from_numpy(classes), torch.from_numpy(inside)


def patch_model() -> nn.Sequential:
    blocks = [
        [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        for a, b in itertools.pairwise((3, 16, 32))
    ]
    return nn.Sequential(*blocks[0], *blocks[1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3))


def hits(model: nn.Module, images: Tensor, inside: Tensor) -> float:
    """The share of images whose map, of the predicted class, is highest on the patch."""
    highest = GradCAM(model, "7")(images).maps["7"].flatten(1).argmax(1)
    return float(inside.flatten(1).gather(1, highest[:, None]).float().mean())


@pytest.mark.parametrize("seed", range(3))
def test_maps_are_highest_where_the_class_is_decided_and_only_of_a_trained_model(seed: int) -> None:
    images, classes, _ = patches(384, seed)
    held_out, held_classes, inside = patches(200, seed + 1000)
    torch.manual_seed(seed)
    model = patch_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in torch.cat([torch.randperm(len(images)) for _ in range(5)]).reshape(-1, 32):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), classes[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert (model.eval()(held_out).argmax(1) == held_classes).float().mean() > 0.95
    assert hits(model, held_out, inside) >= 0.9
    randomised = [hits(patch_model(), held_out, inside) for _ in range(5)]
    assert max(randomised) < 0.9 and np.median(randomised) < 0.6


# overlays


def test_heat_maps_are_resized_as_torch_and_captum_resize() -> None:
    raw = np.random.default_rng(0).random((4, 4), dtype=np.float32)
    expected = LayerAttribution.interpolate(torch.from_numpy(raw)[None, None], (64, 64), "bilinear")[0, 0].numpy()
    np.testing.assert_allclose(heat_map(raw, 64, scale=2.0), expected / 2, atol=1e-6)
    np.testing.assert_allclose(heat_map(raw, 64), expected / expected.max(), atol=1e-6)


def test_heat_maps_at_input_size_are_the_maps() -> None:
    cams = GradCAM(small_model(), "block")(images_of())
    for raw, expected in zip(cams.raw["block"].numpy(), cams.maps["block"].numpy(), strict=True):
        np.testing.assert_allclose(heat_map(raw, 32), expected, atol=1e-5)


def test_a_shared_scale_keeps_maps_in_proportion_and_clips_above_it() -> None:
    low, high = np.full((2, 2), 1.0), np.full((2, 2), 4.0)
    assert heat_map(low, 8).max() == heat_map(high, 8).max() == 1
    assert np.unique(heat_map(low, 8, scale=2.0)).tolist() == [0.5]
    assert np.unique(heat_map(high, 8, scale=2.0)).tolist() == [1.0]
    np.testing.assert_array_equal(colour_map(high, 8, scale=2.0), colour_map(high, 8))
    assert (colour_map(low, 8, scale=2.0) != colour_map(low, 8)).any()


def test_colours_are_those_that_matplotlib_calls_turbo() -> None:
    ramp = np.linspace(0, 1, 256, dtype=np.float32)[None].repeat(256, 0)
    expected = np.rint(255 * matplotlib.colormaps["turbo"](np.arange(256))[:, :3])
    assert np.abs(colour_map(ramp, 256).astype(int) - expected[None]).max() <= 3


def test_an_overlay_blends_the_enlarged_image_with_the_colours() -> None:
    image = np.zeros((32, 32, 3), dtype=np.uint8)
    image[..., 0] = 200  # red: a swapped channel is noticed
    raw = np.random.default_rng(0).random((4, 4)).astype(np.float16)
    colours = colour_map(raw, 96)
    for opacity in (0.0, 0.3, 1.0):
        expected = (1 - opacity) * np.array([200, 0, 0]) + opacity * colours.astype(float)
        found = overlay(image, raw, 96, opacity=opacity)
        assert found.shape == (96, 96, 3) and found.dtype == np.uint8
        assert np.abs(found - expected).max() <= 0.51
    assert overlay(image, raw).shape == colour_map(raw).shape == (128, 128, 3)


def test_an_overlay_without_colours_shows_the_image_enlarged_without_blocks() -> None:
    image = np.random.default_rng(0).integers(60, 200, (8, 8, 3)).astype(np.uint8)
    bare = overlay(image, np.ones((4, 4)), 128, opacity=0.0).astype(int)
    # Pillow's bicubic kernel is a little flatter than OpenCV's.
    smooth = np.asarray(Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(bare - smooth).mean() < 3
    np.testing.assert_array_equal(overlay(image, np.ones((4, 4)), 8, opacity=0.0), image)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_zeros_show_as_the_lowest_colour(scale: float | None) -> None:
    zeros = np.zeros((4, 4), dtype=np.float32)
    assert not heat_map(zeros, 16, scale).any()
    lowest = colour_map(np.eye(2), 16)[0, -1]
    assert (colour_map(zeros, 16, scale) == lowest).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (partial(heat_map, np.ones((2, 2)), scale=0.0), "scale must be a number above 0, but got scale=0.0"),
        (partial(colour_map, np.ones((2, 2)), scale=-1.0), "scale must be a number above 0, but got scale=-1.0"),
        (partial(heat_map, np.ones((2, 2)), scale=float("nan")), "scale must be a number above 0, but got scale=nan"),
        (partial(heat_map, np.ones((2, 2)), 0), "size must be at least 1 pixel, but got size=0"),
        (
            partial(overlay, np.zeros((8, 8, 3), float), np.ones((2, 2))),
            r"image must be uint8 \(H, W, 3\), but got float64",
        ),
        (partial(overlay, np.zeros((8, 8), np.uint8), np.ones((2, 2))), r"but got uint8 \(8, 8\)"),
        (
            partial(overlay, np.zeros((8, 8, 3), np.uint8), np.ones((2, 2)), opacity=1.5),
            r"opacity must be in \[0, 1\], but got opacity=1.5",
        ),
    ],
)
def test_wrong_numbers_of_an_overlay_are_told(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_targets_may_be_a_list_or_a_numpy_array() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)).eval()
    images = torch.rand(3, 3, 8, 8)
    expected = GradCAM(model, "0")(images, torch.tensor([4, 0, 2])).raw["0"]
    for targets in ([4, 0, 2], np.array([4, 0, 2])):
        torch.testing.assert_close(GradCAM(model, "0")(images, targets).raw["0"], expected)
    same = GradCAM(model, "0")(images, np.array([3, 3])[0]).raw["0"]
    torch.testing.assert_close(same, GradCAM(model, "0")(images, 3).raw["0"])
