"""Optimizers by name, and the loss with its penalties."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eva.config import RunConfig


def decayed_parameters(model: nn.Module, decay_norm_and_bias: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trainable parameters into those that the L1 and L2 penalties act on and those exempt.

    Norms' scales and all biases are the parameters of fewer than two dimensions; they are exempt unless
    `decay_norm_and_bias`.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in parameters if decay_norm_and_bias or parameter.ndim > 1]
    chosen = {id(parameter) for parameter in decayed}
    return decayed, [parameter for parameter in parameters if id(parameter) not in chosen]


def build_optimizer(
    config: RunConfig, model: nn.Module, fused: bool = True, steps_per_epoch: int = 1
) -> torch.optim.Optimizer:
    """Returns the optimizer that `config` names over the model's parameters, at learning rate `lr_max` for now.

    The loop sets the learning rate and the momentum (AdamW: beta 1) of every step. SGD's decay is an L2 penalty;
    AdamW's is decoupled (arXiv 1711.05101). The fused kernels compute the same update in one pass over memory.
    Under a gradient scaler `fused` must be false: torch's fused SGD takes uninitialized memory for its momentum if
    the first scaled gradients overflow.

    Muon trains the filters of convolutions; linear layers, norms and biases have Nesterov's SGD, each with a rate of
    its own, and `weight_decay` is the share of them that a step at the highest rate takes away. The bias of a frozen
    (whitened) first layer has a rate that falls to nothing within `first_bias_epochs` (arXiv 2404.00498).
    """
    lr = 0.1 if config.lr_max == "find" else config.lr_max
    if config.optimizer == "muon":
        return _build_muon(config, model, lr, steps_per_epoch)
    decayed, exempt = decayed_parameters(model, config.decay_norm_and_bias)
    groups = [
        {"params": parameters, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decayed, config.weight_decay), (exempt, 0.0))
        if parameters
    ]
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(config.momentum, 0.999), fused=fused)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def _build_muon(config: RunConfig, model: nn.Module, lr: float, steps_per_epoch: int) -> "Muon":
    frozen_first = next((layer for layer in model.modules() if _is_frozen(layer)), None)
    first_bias = getattr(frozen_first, "bias", None)
    kinds: dict[str, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            kind = "filters" if parameter.ndim > 2 else "linear" if parameter.ndim == 2 else "biases"
            kinds["first bias" if parameter is first_bias else kind].append(parameter)
    linear_lr, bias_lr = config.linear_lr or lr, config.bias_lr or lr
    groups: list[dict[str, Any]] = [{"params": kinds["filters"], "orthogonal": True, "lr": lr}]
    for kind, rate in (("linear", linear_lr), ("biases", bias_lr), ("first bias", bias_lr)):
        sgd = {"momentum": config.sgd_momentum, "own_momentum": True, "weight_decay": config.weight_decay / rate}
        groups.append({"params": kinds[kind], "lr": rate, "lr_ratio": rate / lr, **sgd})
    groups[-1]["steps"] = config.first_bias_epochs * steps_per_epoch
    return Muon([group for group in groups if group["params"]], momentum=config.momentum)


def _is_frozen(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and not layer.weight.requires_grad


def set_rates(
    optimizer: torch.optim.Optimizer, lr: float, momentum: float, step: int = 0, freezes: bool = True
) -> None:
    """Sets the learning rate and the momentum (Adam's beta 1) of all parameter groups for a step.

    A group with an `lr_ratio` has that multiple of the rate, one with `own_momentum` keeps its momentum. The rate of
    one with `steps` falls linearly to zero within so many, whatever the others do; then its parameters are frozen,
    so that no gradient is computed for them any more, unless `freezes` is false: DistributedDataParallel waits for the
    gradients of all parameters that it began with.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
        if "steps" in group:
            group["lr"] = group["initial_lr"] * max(0.0, 1 - step / group["steps"])
            if freezes and group["lr"] == 0:
                for parameter in group["params"]:
                    parameter.requires_grad_(False).grad = None
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        elif not group.get("own_momentum"):
            group["momentum"] = momentum


# The quintic iteration of Muon: coefficients of the highest slope at zero, so that few steps do (K. Jordan 2024).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 3


def orthogonalize(matrices: Tensor, steps: int = NEWTON_SCHULZ_STEPS) -> Tensor:
    """Returns matrices (B, M, N) with about the same singular vectors, and all singular values near 1.

    Newton-Schulz iterations as Muon has them (K. Jordan 2024, "Muon: An optimizer for hidden layers in neural
    networks"): products alone, in the dtype of what is given; bfloat16 is enough.
    """
    a, b, c = NEWTON_SCHULZ
    wide = matrices.size(-2) <= matrices.size(-1)
    x = matrices if wide else matrices.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized, for the filters of convolutions; SGD with Nesterov's momentum for everything else.

    Filters (O, I, H, W) are taken as matrices (O, I * H * W), and are scaled back to norm sqrt(O) before each step, as
    the author's CIFAR-10 program does (KellerJordan/cifar10-airbench); torch.optim.Muon takes matrices only.

    Args:
        groups: Parameter groups; those with `orthogonal` hold filters. Each has `lr`, and may have `momentum` and, if
            it is not orthogonal, `weight_decay` (as torch's SGD has it).
        momentum: Of the groups that have none.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum, "weight_decay": 0.0, "orthogonal": False})
        for group in self.param_groups:
            group.setdefault("initial_lr", group["lr"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Makes one step with the gradients that are there."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            if group["weight_decay"]:
                gradients = list(torch._foreach_add(gradients, parameters, alpha=group["weight_decay"]))
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            updates = list(torch._foreach_add(gradients, buffers, alpha=group["momentum"]))
            if group["orthogonal"]:
                updates = _orthogonal(updates)
                norms = torch._foreach_norm(parameters)
                scales = [len(parameter) ** 0.5 / norm for parameter, norm in zip(parameters, norms, strict=True)]
                torch._foreach_mul_(parameters, scales)
            torch._foreach_add_(parameters, updates, alpha=-group["lr"])


def _orthogonal(filters: list[Tensor]) -> list[Tensor]:
    """Returns filters (O, I, H, W), orthogonalized as matrices; those of one shape in one go, in bfloat16."""
    results: list[Tensor] = list(filters)
    alike: dict[torch.Size, list[int]] = defaultdict(list)
    for number, one in enumerate(filters):
        alike[one.shape].append(number)
    for shape, numbers in alike.items():
        matrices = torch.stack([filters[number].flatten(1) for number in numbers]).bfloat16()
        for number, matrix in zip(numbers, orthogonalize(matrices), strict=True):
            results[number] = matrix.to(filters[number].dtype).reshape(shape)
    return results


Criterion = Callable[..., Tensor]


def build_criterion(config: RunConfig, model: nn.Module) -> Criterion:
    """Returns the training loss: mean cross-entropy with label smoothing, plus `l1` times the sum of |weights|.

    It takes logits (B, K), of any float type, labels (B,) int64, and, where these are a share of a batch, what their
    summed cross-entropy is multiplied by instead of being their mean; it returns a float32 scalar.
    """
    decayed, _ = decayed_parameters(model, config.decay_norm_and_bias)

    def criterion(logits: Tensor, labels: Tensor, factor: float | None = None) -> Tensor:
        reduction = "mean" if factor is None else "sum"
        loss = F.cross_entropy(logits.float(), labels, reduction=reduction, label_smoothing=config.label_smoothing)
        if factor is not None:
            loss = loss * factor
        if config.l1 > 0:
            loss = loss + config.l1 * torch.stack([parameter.abs().sum() for parameter in decayed]).sum()
        return loss

    return criterion
