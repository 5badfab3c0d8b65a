"""Optimizers and the loss against updates and sums written by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eva.config import Layer, RunConfig, resolve
from eva.models import build_model
from eva.optim import Muon, build_criterion, build_optimizer, decayed_parameters, orthogonalize, set_rates

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def config_of(**settings: Any) -> RunConfig:
    return resolve([Layer("test", settings)])[0]


def tiny_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    return nn.Sequential(*layers).to(dtype)


def random_gradients(model: nn.Module, steps: int) -> list[dict[str, Tensor]]:
    named = dict(model.named_parameters())
    return [{name: torch.randn_like(parameter) for name, parameter in named.items()} for _ in range(steps)]


def weights_after(
    config: RunConfig,
    model: nn.Module,
    gradients: list[dict[str, Tensor]],
    rates: list[tuple[float, float]],
    fused: bool,
) -> dict[str, Tensor]:
    """The parameters after a step with each of the gradients, at each of the (lr, momentum)."""
    optimizer = build_optimizer(config, model, fused=fused)
    for step_gradients, (lr, momentum) in zip(gradients, rates, strict=True):
        set_rates(optimizer, lr, momentum)
        for name, parameter in model.named_parameters():
            parameter.grad = step_gradients[name].clone()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


RATES = [(0.1, 0.9), (0.3, 0.5), (0.01, 0.95), (0.2, 0.0), (0.2, 0.9)]


# which parameters decay


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("resnet18", "batch"),
        ("resnet18", "layer"),
        ("resnet9", "ghost"),
        ("resnet9", "instance"),
        ("resnet9", "none"),
        ("torchvision/mobilenet_v3_small", "batch"),
        ("torchvision/convnext_tiny", "batch"),
    ],
)
def test_norms_and_biases_are_exempt(name: str, norm: str) -> None:
    model = build_model(name, num_classes=10, norm=norm)
    norms = nn.BatchNorm2d | nn.GroupNorm | nn.InstanceNorm2d | nn.LayerNorm
    expected = {
        f"{path}.{own}"
        for path, module in model.named_modules()
        for own, _ in module.named_parameters(recurse=False)
        if isinstance(module, norms) or own == "bias"
    }
    decayed, exempt = decayed_parameters(model, decay_norm_and_bias=False)
    names = {id(parameter): path for path, parameter in model.named_parameters()}
    assert {names[id(parameter)] for parameter in exempt} == expected
    assert {names[id(parameter)] for parameter in decayed} == set(names.values()) - expected


def test_everything_decays_if_norms_and_biases_do() -> None:
    model = tiny_model()
    decayed, exempt = decayed_parameters(model, decay_norm_and_bias=True)
    assert len(decayed) == len(list(model.parameters())) and not exempt


def test_frozen_parameters_are_left_out() -> None:
    model = tiny_model()
    frozen = model.get_parameter("0.weight").requires_grad_(False)
    for choice in (True, False):
        decayed, exempt = decayed_parameters(model, choice)
        assert all(parameter is not frozen for parameter in (*decayed, *exempt))
    optimizer = build_optimizer(config_of(), model)
    assert all(parameter is not frozen for group in optimizer.param_groups for parameter in group["params"])


# updates


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_sgd_steps_as_written_by_hand(nesterov: bool, decay_norm_and_bias: bool, fused: bool) -> None:
    config = config_of(nesterov=nesterov, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    model = tiny_model()
    gradients = random_gradients(model, len(RATES))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    velocity = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step, (lr, momentum) in enumerate(RATES):
        for name, weight in expected.items():
            decay = 0.1 if decay_norm_and_bias or weight.ndim > 1 else 0.0
            gradient = gradients[step][name] + decay * weight
            if momentum:  # at zero momentum torch leaves the velocity as it is
                velocity[name] = momentum * velocity[name] + gradient
                gradient = gradient + momentum * velocity[name] if nesterov else velocity[name]
            expected[name] = weight - lr * gradient
    torch.testing.assert_close(weights_after(config, model, gradients, RATES, fused), expected)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_adamw_steps_as_written_by_hand(decay_norm_and_bias: bool, fused: bool) -> None:
    config = config_of(optimizer="adamw", weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias, momentum=0.8)
    model = tiny_model()
    rates = [(lr, 0.8) for lr, _ in RATES]
    gradients = random_gradients(model, len(rates))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    second = {name: torch.zeros_like(weight) for name, weight in expected.items()}
    for step, (lr, beta) in enumerate(rates):
        for name, weight in expected.items():
            gradient = gradients[step][name]
            first[name] = beta * first[name] + (1 - beta) * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unbiased = first[name] / (1 - beta ** (step + 1))
            scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            decay = 0.1 if decay_norm_and_bias or weight.ndim > 1 else 0.0
            # Decoupled (algorithm 2 of arXiv 1711.05101): the decay is not in the gradient's moments.
            expected[name] = weight - lr * (unbiased / scale + decay * weight)
    torch.testing.assert_close(weights_after(config, model, gradients, rates, fused), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fused_kernels_compute_the_same_update_in_float32(optimizer: str) -> None:
    model, twin = tiny_model(torch.float32), tiny_model(torch.float32)
    twin.load_state_dict(model.state_dict())
    gradients = random_gradients(model, len(RATES))
    config = config_of(optimizer=optimizer, weight_decay=0.01)
    expected = weights_after(config, twin, gradients, RATES, fused=False)
    torch.testing.assert_close(weights_after(config, model, gradients, RATES, fused=True), expected)


def test_sgd_without_momentum_takes_the_nesterov_default() -> None:
    model = tiny_model()
    gradients = random_gradients(model, 1)
    expected = {name: weight.detach() - 0.5 * gradients[0][name] for name, weight in model.named_parameters()}
    config = config_of(momentum=0, weight_decay=0)
    torch.testing.assert_close(weights_after(config, model, gradients, [(0.5, 0.0)], fused=True), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_set_rates_sets_every_group_and_nothing_else(optimizer: str) -> None:
    built = build_optimizer(config_of(optimizer=optimizer, decay_norm_and_bias=False, weight_decay=0.3), tiny_model())
    set_rates(built, 0.25, 0.75)
    assert len(built.param_groups) == 2
    for group, weight_decay in zip(built.param_groups, (0.3, 0.0), strict=True):
        assert group["lr"] == 0.25
        assert group["weight_decay"] == weight_decay
        assert group["betas"] == (0.75, 0.999) if optimizer == "adamw" else group["momentum"] == 0.75


# loss


def test_loss_is_mean_cross_entropy_with_label_smoothings_closed_form() -> None:
    logits = torch.randn(3, 4)
    log_probabilities = logits - logits.exp().sum(1, keepdim=True).log()
    chosen = log_probabilities[range(3), LABELS]
    # The target is 0.8 on the label plus 0.2 spread evenly over all four classes.
    expected = -(0.8 * chosen + 0.2 * log_probabilities.mean(1)).mean()
    criterion = build_criterion(config_of(label_smoothing=0.2), tiny_model())
    torch.testing.assert_close(criterion(logits, LABELS), expected)
    torch.testing.assert_close(build_criterion(config_of(), tiny_model())(logits, LABELS), -chosen.mean())


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_l1_adds_the_sum_of_absolute_weights_and_pulls_by_their_sign(decay_norm_and_bias: bool) -> None:
    model = tiny_model(torch.float32)
    logits = torch.randn(3, 4)
    plain = build_criterion(config_of(), model)(logits, LABELS)
    loss = build_criterion(config_of(l1=0.01, decay_norm_and_bias=decay_norm_and_bias), model)(logits, LABELS)
    penalized = {
        name: parameter for name, parameter in model.named_parameters() if decay_norm_and_bias or parameter.ndim > 1
    }
    total = sum(abs(value) for parameter in penalized.values() for value in parameter.flatten().tolist())
    assert loss.item() - plain.item() == pytest.approx(0.01 * total, rel=1e-4)
    loss.backward()  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if name in penalized:
            torch.testing.assert_close(parameter.grad, 0.01 * parameter.detach().sign())
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_of_half_precision_logits_is_float32_inside_and_outside_autocast(
    dtype: torch.dtype, autocast: bool
) -> None:
    model = tiny_model(torch.float32)
    criterion = build_criterion(config_of(l1=0.01, label_smoothing=0.1), model)
    logits = torch.randn(3, 4).to(dtype)
    expected = criterion(logits.float(), LABELS)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        loss = criterion(logits, LABELS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


# Muon


def quintic(values: Tensor) -> Tensor:
    return 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5


@pytest.mark.parametrize("shape", [(2, 5, 9), (1, 9, 5), (3, 4, 4)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape: tuple[int, ...]) -> None:
    """By a singular value decomposition: three times the quintic of each value, over the Frobenius norm."""
    matrices = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(3):
        values = quintic(values)
    expected = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(orthogonalize(matrices), expected, atol=1e-6, rtol=1e-5)


def speednet() -> nn.Module:
    model = build_model("speednet", num_classes=10)
    first = model.get_submodule("first")
    first.weight.requires_grad_(False)
    return model


MUON = {
    **{"optimizer": "muon", "lr_max": 0.2, "momentum": 0.6, "linear_lr": 3.0, "bias_lr": 0.5, "weight_decay": 0.01},
    **{"sgd_momentum": 0.8, "first_bias_epochs": 2},
}


def test_muon_moves_filters_by_orthogonalized_momentum_and_all_else_as_torchs_sgd_does() -> None:
    """Filters by hand with a decomposition in float64; bfloat16 products are good to a hundredth."""
    model, other = speednet(), speednet()
    other.load_state_dict(model.state_dict())
    optimizer = build_optimizer(config_of(**MUON), model, steps_per_epoch=4)
    named, reference = dict(model.named_parameters()), dict(other.named_parameters())
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    filters = [name for name in trained if named[name].ndim == 4]
    assert len(filters) == 6 and "first.bias" in trained
    rates = {name: 3.0 if name == "fc.weight" else 0.5 for name in trained if name not in filters}
    sgd = torch.optim.SGD(
        [{"params": [reference[name]], "lr": rate, "weight_decay": 0.01 / rate} for name, rate in rates.items()],
        momentum=0.8,
        nesterov=True,
    )
    buffers = {name: torch.zeros_like(named[name], dtype=torch.float64) for name in filters}
    expected = {name: named[name].detach().double() for name in filters}
    for step, part in enumerate((1.0, 0.5, 0.25)):
        set_rates(optimizer, 0.2 * part, 0.6, step)
        for group, (name, rate) in zip(sgd.param_groups, rates.items(), strict=True):
            group["lr"] = rate * ((1 - step / 8) if name == "first.bias" else part)
        for name in trained:
            named[name].grad = torch.randn_like(named[name])
            reference[name].grad = named[name].grad.clone()  # type: ignore[union-attr]
        optimizer.step()
        sgd.step()
        for name in filters:
            gradient = named[name].grad.double()  # type: ignore[union-attr]
            buffers[name] = 0.6 * buffers[name] + gradient
            matrix = (gradient + 0.6 * buffers[name]).flatten(1)
            left, values, right = torch.linalg.svd(matrix, full_matrices=False)
            values = quintic(quintic(quintic(values / values.norm())))
            scaled = expected[name] * len(gradient) ** 0.5 / expected[name].norm()
            expected[name] = scaled - 0.2 * part * (left @ torch.diag(values) @ right).view_as(gradient)
    for name in rates:
        torch.testing.assert_close(named[name], reference[name], atol=1e-6, rtol=1e-5)
    for name in filters:
        assert (named[name].double() - expected[name]).norm() < 0.01 * expected[name].norm()


def test_the_bias_of_a_frozen_first_layer_is_frozen_once_its_rate_is_nothing() -> None:
    """After two epochs of four steps; whatever the others' rate is then."""
    model = speednet()
    optimizer = build_optimizer(config_of(**MUON), model, steps_per_epoch=4)
    bias = model.get_submodule("first").bias
    for step in range(8):
        set_rates(optimizer, 0.2, 0.6, step)
        assert bias.requires_grad
    set_rates(optimizer, 0.2, 0.6, 8)
    assert not bias.requires_grad
    others = [parameter for name, parameter in model.named_parameters() if "first" not in name and "norm" not in name]
    assert sum(parameter.requires_grad for parameter in others) > 6


def test_muons_state_goes_on_as_it_was() -> None:
    """As after a kill: the same steps with and without a detour by way of its state."""

    def steps(model: nn.Module, optimizer: torch.optim.Optimizer, numbers: range) -> None:
        for step in numbers:
            generator = torch.Generator().manual_seed(step)
            set_rates(optimizer, 0.1, 0.6, step)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    alone, killed = speednet(), speednet()
    killed.load_state_dict(alone.state_dict())
    whole = build_optimizer(config_of(**MUON), alone, steps_per_epoch=2)
    steps(alone, whole, range(6))
    first = build_optimizer(config_of(**MUON), killed, steps_per_epoch=2)
    steps(killed, first, range(5))
    resumed = speednet()
    resumed.load_state_dict(killed.state_dict())
    second = build_optimizer(config_of(**MUON), resumed, steps_per_epoch=2)
    assert isinstance(second, Muon)
    second.load_state_dict(first.state_dict())
    steps(resumed, second, range(5, 6))
    for name, tensor in alone.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
