"""Models against hand-worked counts, torchvision's networks and second implementations."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eva.config import UserError
from eva.models import (
    NORMS,
    GhostBatchNorm2d,
    build_model,
    count_parameters,
    model_names,
    summarize,
)

close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def shapes(model: nn.Module, names: list[str]) -> list[tuple[int, ...]]:
    """The output shapes (C, H, W) of named submodules for one image."""
    seen: list[tuple[int, ...]] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *call: seen.append(tuple(call[2].shape[1:])))
    model.eval()(torch.zeros(1, 3, 32, 32))
    return seen


def randomize_norms(model: nn.Module) -> None:
    """Statistics and affine parameters unlike those of a new layer, so that a swapped layer is noticed."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)


# resnet18


@pytest.mark.parametrize("norm", ["batch", "ghost", "group", "layer", "instance"])
@pytest.mark.parametrize("stage_strides", [(1, 2, 2, 2), (1, 2, 2, 1)])
def test_resnet18_has_the_published_parameter_count(norm: str, stage_strides: tuple[int, ...]) -> None:
    model = build_model("resnet18", num_classes=10, norm=norm, stage_strides=stage_strides)
    assert count_parameters(model) == 11_173_962


def test_resnet18_without_norms_has_one_bias_where_a_norm_had_weight_and_bias() -> None:
    # Channels that were normalized: the stem, four layers a stage, and the three shortcuts that change shape.
    channels = 64 + 4 * (64 + 128 + 256 + 512) + 128 + 256 + 512
    model = build_model("resnet18", num_classes=10, norm="none")
    assert count_parameters(model) == 11_173_962 - channels
    assert all(conv.bias is not None for conv in model.modules() if isinstance(conv, nn.Conv2d))


@pytest.mark.parametrize(("last_stride", "last_size"), [(2, 4), (1, 8)])
def test_resnet18_map_sizes_follow_the_stage_strides(last_stride: int, last_size: int) -> None:
    model = build_model("resnet18", num_classes=10, norm="layer", stage_strides=(1, 2, 2, last_stride))
    assert shapes(model, ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]) == [
        (64, 32, 32),
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, last_size, last_size),
        (10,),
    ]


@pytest.mark.parametrize("stage_strides", [(1, 2, 2, 2), (1, 2, 2, 1)])
@pytest.mark.parametrize("training", [False, True])
def test_resnet18_computes_what_torchvisions_does_with_the_cifar_stem(
    stage_strides: tuple[int, ...], training: bool
) -> None:
    from torchvision.models import resnet18

    reference = resnet18(num_classes=10)
    reference.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    reference.maxpool = nn.Identity()
    if stage_strides[-1] == 1:
        reference.layer4[0].conv1.stride = reference.layer4[0].downsample[0].stride = (1, 1)
    ours = build_model("resnet18", num_classes=10, stage_strides=stage_strides)
    randomize_norms(ours)
    renamed = {
        name.replace("norm", "bn").replace("shortcut", "downsample"): tensor.clone()
        for name, tensor in ours.state_dict().items()
    }
    reference.load_state_dict(renamed)
    images = torch.randn(4, 3, 32, 32)
    ours.train(training)
    reference.train(training)
    logits, expected = ours(images), reference(images)
    close(logits, expected)
    logits.square().sum().backward()
    expected.square().sum().backward()
    close(ours.get_parameter("conv1.weight").grad, reference.conv1.weight.grad, rtol=1e-3, atol=1e-2)


# resnet9


def test_resnet9_parameter_count_worked_by_hand() -> None:
    def layer(in_channels: int, channels: int) -> int:
        return 9 * in_channels * channels + 2 * channels

    prep, layer1, layer2, layer3 = layer(3, 64), layer(64, 128), layer(128, 256), layer(256, 512)
    residuals = 2 * layer(128, 128) + 2 * layer(512, 512)
    model = build_model("resnet9", num_classes=10)
    assert count_parameters(model) == prep + layer1 + layer2 + layer3 + residuals + 512 * 10 == 6_573_120


def test_resnet9_map_sizes() -> None:
    model = build_model("resnet9", num_classes=7)
    assert shapes(model, ["prep", "layer1", "layer2", "layer3", "pool", "fc"]) == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 1, 1),
        (7,),
    ]


def test_resnet9_computes_its_definition_written_as_functions() -> None:
    model = build_model("resnet9", num_classes=10)
    randomize_norms(model)
    # Tensors in the order of the definition: per layer the convolution, then weight, bias, mean and variance.
    tensors = iter([tensor for tensor in model.state_dict().values() if tensor.ndim])

    def layer(x: Tensor, pool: bool = False) -> Tensor:
        x = F.conv2d(x, next(tensors), padding=1)
        if pool:
            x = F.max_pool2d(x, 2)
        weight, bias, mean, variance = (next(tensors) for _ in range(4))
        return F.relu(F.batch_norm(x, mean, variance, weight, bias))

    images = torch.randn(3, 3, 32, 32)
    x = layer(images)
    x = layer(x, pool=True)
    x = x + layer(layer(x))
    x = layer(x, pool=True)
    x = layer(x, pool=True)
    x = x + layer(layer(x))
    expected = F.max_pool2d(x, 4).flatten(1) @ next(tensors).T / 8
    assert next(tensors, None) is None
    close(model.eval()(images), expected)


def test_resnet9_ends_with_an_eighth_of_the_linear_layers_output() -> None:
    model = build_model("resnet9", num_classes=10)
    outputs: list[Tensor] = []
    model.get_submodule("fc").register_forward_hook(lambda *call: outputs.append(call[2]))
    logits = model(torch.randn(2, 3, 32, 32))
    assert torch.equal(logits, outputs[0] / 8)  # a power of two: exact


# torchvision


def test_torchvision_models_have_torchvisions_parameter_count() -> None:
    from torchvision.models import resnet34

    ours = build_model("torchvision/resnet34", num_classes=10)
    assert count_parameters(ours) == count_parameters(resnet34(num_classes=10))


# speednet


def test_speednet_parameter_count_worked_by_hand() -> None:
    """Filters, the first layer's bias, and a bias a normalized channel; the scales of the norms are not trained."""
    filters = 24 * 3 * 4 + 9 * (24 * 64 + 64 * 64 + 64 * 256 + 256 * 256 + 2 * 256 * 256)
    assert count_parameters(build_model("speednet", num_classes=10)) == filters + 24 + 2 * (64 + 256 + 256) + 2560


def test_speednet_map_sizes() -> None:
    found = shapes(build_model("speednet", num_classes=7), ["first", "group1", "group2", "group3", "pool", "scale"])
    assert found == [(24, 31, 31), (64, 15, 15), (256, 7, 7), (256, 3, 3), (256, 1, 1), (7,)]


def test_speednet_computes_its_definition_written_as_functions() -> None:
    """Convolution, pool, norm, GELU, convolution, norm, GELU; in training mode, so by the statistics of the batch."""
    model = build_model("speednet", num_classes=10)
    named = dict(model.named_parameters())
    for parameter in named.values():
        if parameter.ndim == 1:
            nn.init.normal_(parameter.data, std=0.1)
    images = torch.randn(4, 3, 32, 32)

    def norm(maps: Tensor, name: str) -> Tensor:
        mean, variance = maps.mean((0, 2, 3), keepdim=True), maps.var((0, 2, 3), keepdim=True, correction=0)
        weight, bias = (named[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("weight", "bias"))
        return (maps - mean) / torch.sqrt(variance + 1e-12) * weight + bias

    def gelu(maps: Tensor) -> Tensor:
        return maps * (1 + torch.erf(maps / 2**0.5)) / 2

    maps = gelu(F.conv2d(images, named["first.weight"], named["first.bias"]))
    for number in (1, 2, 3):
        maps = F.max_pool2d(F.conv2d(maps, named[f"group{number}.0.weight"], padding=1), 2)
        maps = F.conv2d(gelu(norm(maps, f"group{number}.2")), named[f"group{number}.5.weight"], padding=1)
        maps = gelu(norm(maps, f"group{number}.6"))
    close(model(images), maps.amax((2, 3)) @ named["fc.weight"].T / 256)


def test_speednets_running_statistics_follow_quickly() -> None:
    model = build_model("speednet", num_classes=10)
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert len(norms) == 6 and all(not layer.weight.requires_grad and layer.bias.requires_grad for layer in norms)
    maps = torch.randn(8, 64, 5, 5) + 3
    norms[0](maps)
    assert norms[0].running_mean is not None
    close(norms[0].running_mean, 0.4 * maps.mean((0, 2, 3)))


def test_model_names_list_every_torchvision_classifier_and_no_detector() -> None:
    names = model_names()
    assert {"resnet18", "resnet9", "torchvision/resnet34", "torchvision/vit_b_16"} <= set(names)
    assert len(names) == len(set(names))
    assert not any("rcnn" in name or "deeplab" in name for name in names)


@pytest.mark.parametrize("name", ["vit_b_32", "googlenet", "mobilenet_v3_small", "regnet_x_400mf", "swin_t"])
def test_torchvision_models_train_on_32x32_images(name: str) -> None:
    model = build_model(f"torchvision/{name}", num_classes=7)
    assert model.training
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_torchvision_models_take_our_norms_and_dropout() -> None:
    model = build_model("torchvision/resnet18", num_classes=10, norm="layer", dropout=0.5)
    kinds = {type(module) for module in model.modules()}
    assert nn.GroupNorm in kinds and nn.BatchNorm2d not in kinds
    head = model.get_submodule("fc")
    assert isinstance(head, nn.Sequential) and [type(layer) for layer in head] == [nn.Dropout, nn.Linear]


def test_checking_that_a_torchvision_model_trains_leaves_it_new() -> None:
    model = build_model("torchvision/resnet18", num_classes=10)
    statistics = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert statistics and all(count == 0 for count in statistics)
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


# norms


@pytest.mark.parametrize("name", ["resnet18", "resnet9", "speednet"])
@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains_a_step_with_finite_gradients(name: str, norm: str) -> None:
    model = build_model(name, num_classes=10, norm=norm, dropout=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = model.get_parameter("fc.weight").detach().clone()
    loss = F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3]))
    loss.backward()  # type: ignore[no-untyped-call]
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), path
    optimizer.step()
    assert not torch.equal(model.get_parameter("fc.weight"), before)


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        ("layer", lambda x: F.layer_norm(x, (64, 4, 4))),
        ("group", lambda x: F.layer_norm(x.reshape(2, 8, 8, 4, 4), (8, 4, 4)).reshape(x.shape)),
        ("instance", lambda x: F.layer_norm(x, (4, 4))),
        ("batch", lambda x: F.layer_norm(x.transpose(0, 1), (2, 4, 4)).transpose(0, 1)),
        ("ghost", lambda x: F.layer_norm(x, (4, 4))),  # two images in two slices: an image a slice
        ("none", lambda x: x),
    ],
)
def test_norms_normalize_over_their_dimensions(norm: str, expected) -> None:  # type: ignore[no-untyped-def]
    model = build_model("resnet18", num_classes=10, norm=norm, norm_groups=8, ghost_splits=2)
    images = torch.randn(2, 64, 4, 4) * 3 + 1
    close(model.get_submodule("norm1")(images), expected(images))


def test_ghost_norm_is_batch_norm_on_each_slice() -> None:
    ghost = GhostBatchNorm2d(5, splits=3)
    randomize_norms(ghost)
    images = torch.randn(7, 5, 4, 4)  # an odd size: slices of 3, 2 and 2
    expected = []
    for part in (images[:3], images[3:5], images[5:]):
        plain = nn.BatchNorm2d(5)
        plain.load_state_dict(ghost.state_dict())
        expected.append(plain(part))
    close(ghost(images), torch.cat(expected), rtol=1e-6, atol=1e-6)


def test_ghost_norms_running_statistics_follow_the_closed_form() -> None:
    ghost = GhostBatchNorm2d(5, splits=2, momentum=0.3)
    images = torch.randn(6, 5, 4, 4) + 2
    ghost(images)
    keep = 0.7**0.5  # what each of the two slices keeps; the batch keeps 0.7 of what was before it
    first, second = images[:3], images[3:]
    dims = (0, 2, 3)
    mean = (1 - keep) * (keep * first.mean(dims) + second.mean(dims))  # running mean starts at 0
    variance = 0.7 + (1 - keep) * (keep * first.var(dims) + second.var(dims))  # running variance starts at 1
    close(ghost.running_mean, mean, rtol=1e-5, atol=1e-6)
    close(ghost.running_var, variance, rtol=1e-5, atol=1e-6)
    assert ghost.num_batches_tracked == 1


def test_a_batch_weighs_as_much_in_ghost_norm_as_in_batch_norm() -> None:
    ghost, plain = GhostBatchNorm2d(5, splits=4), nn.BatchNorm2d(5)
    images = torch.randn(2, 5, 4, 4).repeat(4, 1, 1, 1)  # four equal slices, so only the weight can differ
    for _ in range(3):
        ghost(images)
        plain(images)
    close(ghost.running_mean, plain.running_mean, rtol=1e-5, atol=1e-6)


def test_ghost_norm_in_eval_mode_is_batch_norm() -> None:
    ghost, plain = GhostBatchNorm2d(5, splits=3), nn.BatchNorm2d(5)
    ghost(torch.randn(6, 5, 4, 4))
    plain.load_state_dict(ghost.state_dict())
    images = torch.randn(7, 5, 4, 4)
    assert torch.equal(ghost.eval()(images), plain.eval()(images))
    assert ghost.num_batches_tracked == 1


def test_ghost_norm_with_one_split_is_batch_norm() -> None:
    ghost, plain = GhostBatchNorm2d(5, splits=1), nn.BatchNorm2d(5)
    for _ in range(3):
        images = torch.randn(6, 5, 4, 4)
        assert torch.equal(ghost(images), plain(images))
    for name, tensor in plain.state_dict().items():
        assert torch.equal(ghost.state_dict()[name], tensor), name


def test_ghost_norm_takes_fewer_slices_where_one_would_hold_a_single_value() -> None:
    maps, vectors = torch.randn(3, 5, 4, 4), torch.randn(5, 5, 1, 1)
    close(GhostBatchNorm2d(5, splits=8)(maps), GhostBatchNorm2d(5, splits=3)(maps), rtol=0, atol=0)
    close(GhostBatchNorm2d(5, splits=8)(vectors), GhostBatchNorm2d(5, splits=2)(vectors), rtol=0, atol=0)


def test_ghost_norm_keeps_channels_last_and_takes_bfloat16_as_batch_norm_does() -> None:
    ghost, plain = GhostBatchNorm2d(8, splits=2), nn.BatchNorm2d(8)
    images = torch.randn(4, 8, 6, 6).to(memory_format=torch.channels_last)
    assert ghost(images).is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = ghost(images.bfloat16()), plain(images.bfloat16())
    assert output.dtype == expected.dtype == torch.bfloat16
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert ghost.running_mean is not None and ghost.running_mean.dtype == torch.float32


# dropout


@pytest.mark.parametrize("name", ["resnet18", "resnet9", "torchvision/resnet18"])
def test_dropout_acts_only_in_training(name: str) -> None:
    model = build_model(name, num_classes=10, norm="layer", dropout=0.5)  # layer norm is equal in both modes
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.equal(model(images), model(images))
        model.eval()
        assert torch.equal(model(images), model(images))


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet9", 2)])
def test_dropout_sits_once_in_each_residual_block_and_nowhere_at_zero(name: str, blocks: int) -> None:
    def dropouts(dropout: float) -> list[float]:
        model = build_model(name, num_classes=10, dropout=dropout)
        return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]

    assert dropouts(0.1) == [0.1] * blocks
    assert dropouts(0.0) == []


def test_state_of_a_model_with_dropout_loads_into_one_without() -> None:
    for name in ("resnet18", "resnet9"):
        state = build_model(name, num_classes=10, dropout=0.1).state_dict()
        plain = build_model(name, num_classes=10)
        plain.load_state_dict(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in plain.state_dict().items())


# summary


def test_summary_shows_layers_shapes_and_the_total() -> None:
    table = summarize(build_model("resnet18", num_classes=10))
    assert "11,173,962" in table
    assert "[1, 512, 4, 4]" in table
    assert "layer4" in table


def test_summary_leaves_modes_statistics_and_random_state_untouched() -> None:
    model = build_model("resnet9", num_classes=10, dropout=0.1)
    model.get_submodule("layer1").eval()  # a mixed state, as a partly frozen model has it
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    summarize(model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in model.modules())


def test_count_parameters_leaves_out_frozen_ones() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert count_parameters(model) == 6


# mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet_18"}, r"unknown model 'resnet_18'.*did you mean 'resnet18'.*resnet9"),
        ({"name": "torchvision/resnet43"}, r"unknown model.*did you mean 'torchvision/resnet34'"),
        ({"norm": "bacth"}, r"unknown norm 'bacth'.*did you mean 'batch'.*ghost"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), but got dropout=1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), but got dropout=-0.1"),
        ({"num_classes": 0}, r"num_classes must be at least 1, but got num_classes=0"),
        ({"norm": "ghost", "ghost_splits": 0}, r"ghost_splits must be at least 1, but got ghost_splits=0"),
        ({"norm": "group", "norm_groups": 48}, r"norm_groups must divide.*norm_groups=48 and.*64 channels"),
        ({"norm": "group", "norm_groups": 0}, r"norm_groups must divide.*norm_groups=0"),
        ({"stage_strides": (1, 2, 2)}, r"four strides of 1 or 2, but got stage_strides=\[1, 2, 2\]"),
        ({"stage_strides": (1, 2, 2, 3)}, r"four strides of 1 or 2, but got stage_strides=\[1, 2, 2, 3\]"),
        ({"name": "resnet9", "stage_strides": (1, 2, 2, 1)}, r"belongs to resnet18, but got model=resnet9"),
        (
            {"name": "torchvision/resnet18", "stage_strides": (1, 2, 2, 1)},
            r"belongs to resnet18, but got model=to",
        ),
        (
            {"name": "torchvision/densenet121", "norm": "layer"},
            r"densenet121 needs norm=batch.*got norm=layer",
        ),
        ({"name": "torchvision/mobilenet_v2", "norm": "group"}, r"norm_groups=32 and a layer of 16 channels"),
        ({"name": "torchvision/squeezenet1_1", "dropout": 0.1}, r"no linear layer.*but got dropout=0.1"),
        ({"name": "torchvision/inception_v3"}, r"inception_v3 with norm=batch cannot be trained on 32x32"),
        (
            {"name": "torchvision/vit_h_14"},
            r"vit_h_14 with norm=batch cannot be trained on 32x32.*patch size",
        ),
        ({"name": "torchvision/resnet18", "norm": "instance"}, r"norm=instance cannot be trained on 32x32"),
        ({"name": "torchvision/swin_t", "norm": "ghost"}, r"swin_t with norm=ghost cannot be trained"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_model(**({"name": "resnet18", "num_classes": 10} | arguments))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
