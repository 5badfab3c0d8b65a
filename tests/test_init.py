"""First weights: what passes on, what whitens, and what cannot."""

import pytest
import torch
from torch import nn

from eva.config import UserError
from eva.init import initialize, whiten
from eva.models import build_model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def images(count: int = 200) -> torch.Tensor:
    """Smooth noise, whose neighbouring pixels and channels are alike, as in photographs."""
    noise = torch.randn(count, 3, 35, 35)
    return nn.functional.avg_pool2d(noise + 0.5 * noise.mean(1, keepdim=True), 4, 1)


def test_whitened_patches_are_uncorrelated_and_of_one_variance() -> None:
    """With both signs; NumPy's view of what the layer gives over all patches. The epsilon shrinks small variances."""
    layer = nn.Conv2d(3, 24, 2)
    layer.bias.data.zero_()  # type: ignore[union-attr]
    shown = images()
    whiten(layer, shown)
    with torch.no_grad():
        values = layer(shown).transpose(0, 1).flatten(1).double()  # (24, N * L)
    moments = values[:12] @ values[:12].T / values.shape[1]
    diagonal = moments.diagonal()
    torch.testing.assert_close(moments, torch.diag(diagonal), atol=1e-4, rtol=0)
    assert (diagonal > 0.8).all() and (diagonal < 1.001).all()
    torch.testing.assert_close(values[12:], -values[:12], atol=1e-5, rtol=0)
    assert not layer.weight.requires_grad and layer.bias is not None and layer.bias.requires_grad


def test_a_layer_with_more_filters_keeps_the_rest_of_them() -> None:
    layer = nn.Conv2d(3, 64, 3)
    before = layer.weight.detach().clone()
    whiten(layer, images())
    assert torch.equal(layer.weight[54:], before[54:]) and not torch.equal(layer.weight[:54], before[:54])


@pytest.mark.parametrize("name", ["resnet9", "resnet18", "speednet"])
def test_identity_filters_pass_the_first_maps_on(name: str) -> None:
    model = build_model(name, num_classes=10)
    initialize(model, "identity", images())
    first, *later = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    assert first.weight.requires_grad
    for layer in later:
        maps = torch.randn(2, layer.in_channels, 8, 8)
        kept = min(layer.in_channels, layer.out_channels)
        passed = nn.functional.conv2d(maps, layer.weight, padding=layer.padding)[:, :kept]
        torch.testing.assert_close(passed, maps[:, :kept])
    linear = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    assert linear.weight.std().item() == pytest.approx(1)


def test_default_changes_nothing() -> None:
    model = build_model("resnet9", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    initialize(model, "default", images())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_first_layer_that_is_too_small_is_refused() -> None:
    with pytest.raises(UserError, match="at least 54 filters for patches of 3x3x3, but got 24"):
        initialize(build_model("torchvision/shufflenet_v2_x0_5", num_classes=10), "whitened", images())
    with pytest.raises(UserError, match="whose first layer is a plain convolution"):
        initialize(nn.Sequential(nn.Flatten(), nn.Linear(3072, 10)), "whitened", images())
