"""Evaluation against a plain loop in float64, and that it leaves the model as it was."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from eva.evaluate import Evaluation, evaluate
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
def test_modes_statistics_gradients_and_random_state_stay(prepare: Callable[[nn.Module], object], fails: bool) -> None:
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
            evaluate(model, failing(batches), FP32)
    else:
        evaluate(model, batches, FP32)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(gradients) == len(list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None and torch.equal(parameter.grad, gradient)
    assert torch.is_grad_enabled()
