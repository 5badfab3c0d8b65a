"""Optimizers by name, and the loss with its penalties."""

from collections.abc import Callable

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


def build_optimizer(config: RunConfig, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """Returns the optimizer that `config` names over the model's parameters, at learning rate `lr_max` for now.

    The loop sets the learning rate and the momentum (AdamW: beta 1) of every step. SGD's decay is an L2 penalty;
    AdamW's is decoupled (arXiv 1711.05101). The fused kernels compute the same update in one pass over memory.
    Under a gradient scaler `fused` must be false: torch's fused SGD takes uninitialized memory for its momentum if
    the first scaled gradients overflow.
    """
    decayed, exempt = decayed_parameters(model, config.decay_norm_and_bias)
    groups = [
        {"params": parameters, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decayed, config.weight_decay), (exempt, 0.0))
        if parameters
    ]
    lr = 0.1 if config.lr_max == "find" else config.lr_max
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(config.momentum, 0.999), fused=fused)
    nesterov = config.nesterov and config.momentum > 0
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=nesterov, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Sets the learning rate and the momentum (Adam's beta 1) of all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


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
