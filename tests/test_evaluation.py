"""Evaluation and predictions against plain loops in float64, and that they leave the model as it was."""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from eva.config import UserError
from eva.evaluation import Evaluation, evaluate, predict
from eva.hardware import Hardware

FP32 = Hardware(torch.device("cpu"), None, torch.contiguous_format)
BF16 = Hardware(torch.device("cpu"), torch.bfloat16, torch.channels_last)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def tiny_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def uneven_batches() -> list[tuple[Tensor, Tensor]]:
    """Batches of 8, 8 and 3."""
    return [(2 * torch.randn(size, 3, 8, 8), torch.randint(4, (size,))) for size in (8, 8, 3)]


def by_plain_loop(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, an image at a time."""
    losses, hits = [], []
    model = model.double().eval()
    for images, labels in batches:
        for image, label in zip(images, labels, strict=True):
            logits = model(image[None].double())[0]
            losses.append((logits.exp().sum().log() - logits[label]).item())
            hits.append(max(range(4), key=lambda k: logits[k].item()) == label.item())
    return sum(losses) / len(losses), sum(hits) / len(hits)


@pytest.mark.parametrize(("hardware", "tolerance"), [(FP32, 1e-6), (BF16, 2e-2)], ids=["fp32", "bf16"])
def test_every_image_counts_once_whatever_the_batch_sizes(hardware: Hardware, tolerance: float) -> None:
    model, batches = tiny_model(), uneven_batches()
    evaluation = evaluate(model, batches, hardware)
    loss, accuracy = by_plain_loop(model, batches)
    assert evaluation.count == 19
    assert evaluation.loss == pytest.approx(loss, rel=tolerance)
    if hardware is FP32:
        assert evaluation.accuracy == accuracy
    # However the images are cut into batches, the same comes out.
    images, labels = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
    whole = evaluate(model.float(), [(images, labels)], hardware)
    assert whole.loss == pytest.approx(evaluation.loss, rel=tolerance) and whole.count == 19


def test_a_model_that_answers_evenly_has_the_entropy_of_a_guess() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    labels = torch.tensor([0, 0, 1, 2])  # of equal logits the first class is the prediction
    evaluation = evaluate(model, [(torch.randn(4, 3, 8, 8), labels)], FP32)
    assert evaluation == Evaluation(loss=evaluation.loss, accuracy=0.5, count=4)
    assert evaluation.loss == pytest.approx(math.log(4))


def test_loss_has_no_label_smoothing() -> None:
    certain = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4))
    for parameter in certain.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        certain.get_parameter("1.bias")[2] = 100.0
    assert evaluate(certain, [(torch.randn(4, 3, 8, 8), torch.full((4,), 2))], FP32).loss == 0


def mixed(model: nn.Module) -> None:
    """A frozen norm in a model under training."""
    model.train()
    model.get_submodule("1").eval()


def failing(batches: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor]]:
    yield batches[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize("prepare", [nn.Module.train, nn.Module.eval, mixed])
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    "run", [evaluate, predict, partial(predict, layer="2", tta="flip")], ids=["evaluate", "logits", "maps"]
)
def test_modes_statistics_gradients_and_random_state_stay(
    run: Callable[..., object], prepare: Callable[[nn.Module], object], fails: bool
) -> None:
    model = tiny_model()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    prepare(model)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    batches = uneven_batches()
    random_state = torch.get_rng_state()
    if fails:
        with pytest.raises(OSError, match="the disk is gone"):
            run(model, failing(batches), FP32)
    else:
        run(model, batches, FP32)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(gradients) == len(list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert torch.is_grad_enabled()


# Predictions


class Pooled(nn.Module):
    """Convolution, norm, ReLU, mean over the pixels, linear: Grad-CAM of the ReLU then has a closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(8, 4, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(images)).mean((2, 3)))  # type: ignore[no-any-return]


def pooled_model() -> Pooled:
    """In train mode, with statistics unlike those of any batch."""
    model = Pooled()
    model.features[1].running_mean = torch.randn(8) / 9
    model.features[1].running_var = torch.rand(8) + 0.5
    nn.init.normal_(model.head.weight)
    return model.train()


def by_hand(
    model: Pooled, batches: list[tuple[Tensor, Tensor]], tta: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Logits (N, 4) and raw Grad-CAM maps (N, 3, 3) of the predicted classes, an image at a time, in float64.

    The gradient of a logit that is linear in the mean of the activations is its weights over the number of pixels.
    """
    model = model.double().eval()
    weights = model.head.weight.detach().numpy()
    all_logits, all_maps = [], []
    for image in torch.cat([images for images, _ in batches]).double():
        views = [image.numpy()]
        if tta == "flip_shift":  # the image itself counts twice, as the two that are moved do together
            around = np.pad(image.numpy(), ((0, 0), (1, 1), (1, 1)), mode="reflect")
            views += [image.numpy(), around[:, :-2, :-2], around[:, 2:, 2:]]
        if tta != "none":
            views += [view[..., ::-1] for view in views]
        maps = [model.features(torch.from_numpy(view.copy())[None])[0].detach().numpy() for view in views]
        activations = maps[0]
        logits = sum(one.mean(axis=(1, 2)) @ weights.T for one in maps) / len(maps)
        summed = np.einsum("k,khw->hw", weights[logits.argmax()], activations) / activations[0].size
        all_logits.append(logits)
        all_maps.append(np.maximum(summed, 0))
    model.float().train()
    return np.stack(all_logits), np.stack(all_maps)


@pytest.mark.parametrize("tta", ["none", "flip", "flip_shift"])
def test_every_image_has_the_logits_and_the_map_that_it_has_alone(tta: str) -> None:
    model, batches = pooled_model(), uneven_batches()
    expected, expected_maps = by_hand(model, batches, tta)
    logits, maps = predict(model, batches, FP32, layer="features", tta=tta)
    assert maps is not None
    assert logits.dtype == maps.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    np.testing.assert_allclose(maps, expected_maps, atol=1e-6)
    assert expected_maps.max() > 0.1
    # However the images are cut into batches, and whether or not maps are made.
    images, labels = torch.cat([batch[0] for batch in batches]), torch.cat([batch[1] for batch in batches])
    whole, whole_maps = predict(model, [(images, labels)], FP32, layer="features", tta=tta)
    assert whole_maps is not None
    np.testing.assert_allclose(whole, logits, atol=1e-6)
    np.testing.assert_allclose(whole_maps, maps, atol=1e-6)
    alone, none = predict(model, batches, FP32, tta=tta)
    assert none is None
    np.testing.assert_allclose(alone, logits, atol=1e-6)


def test_with_flips_maps_are_of_what_image_and_mirror_image_say_together() -> None:
    model = pooled_model()
    batches = [(torch.randn(64, 3, 8, 8), torch.zeros(64, dtype=torch.int64))]
    single, _ = predict(model, batches, FP32)
    logits, maps = predict(model, batches, FP32, layer="features", tta="flip")
    changed = logits.argmax(1) != single.argmax(1)
    assert 3 < changed.sum() < 60  # else there would be nothing to see
    _, of_both = by_hand(model, batches, "flip")
    _, of_the_image = by_hand(model, batches, "none")
    assert maps is not None
    np.testing.assert_allclose(maps, of_both, atol=1e-6)
    assert (np.abs(maps - of_the_image).max(axis=(1, 2))[changed] > 1e-4).all()


def test_in_half_precision_logits_and_maps_are_still_float32() -> None:
    model, batches = pooled_model().to(memory_format=torch.channels_last), uneven_batches()
    exact, exact_maps = predict(model, batches, FP32, layer="features")
    logits, maps = predict(model, batches, BF16, layer="features")
    assert maps is not None and exact_maps is not None
    assert logits.dtype == maps.dtype == np.float32
    assert 0 < np.abs(logits - exact).max() < 0.1
    alike = logits.argmax(1) == exact.argmax(1)
    assert alike.mean() > 0.8
    np.testing.assert_allclose(maps[alike], exact_maps[alike], atol=0.05 * float(exact_maps.max()))


@pytest.mark.parametrize(
    ("layer", "message"), [("feature", "unknown layer 'feature'"), ("head", "must return a float map")]
)
def test_a_layer_without_a_map_is_refused(layer: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        predict(pooled_model(), uneven_batches(), FP32, layer=layer)
