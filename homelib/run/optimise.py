"""The optimiser: AdamW with a cosine schedule (paper App. B), rates that fall towards the input, an encoder that waits, averaged weights."""

import math
import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..config import TrainingConfig

# The encoder of our networks, and of MONAI's U-Net, in whatever they are wrapped; the U-Net's conv_0 goes with its down_1.
ENCODER = re.compile(r"(?:_forward_module\.|_fsdp_wrapped_module\.|module\.|network\.)*(?:stages\.(?P<stage>\d+)|down_(?P<down>\d+)|conv_0)\.")


def build_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW over the parameters, on the device where they are. With a `layer_rate` each encoder stage is a group whose rate is that factor times
    the rate of the stage that comes after it; all that is no encoder has the full rate."""
    if config.layer_rate == 1:
        groups = [{"params": list(network.parameters()), "full_rate": config.learning_rate}]
    else:
        by_depth: dict[int, list[nn.Parameter]] = {}
        for name, parameter in network.named_parameters():
            by_depth.setdefault(_before_the_end(name), []).append(parameter)
        groups = [{"params": by_depth[depth], "full_rate": config.learning_rate * config.layer_rate**depth} for depth in sorted(by_depth)]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_eps, fused=True)


def _before_the_end(name: str) -> int:
    """Stages from a parameter to the decoder: 0 in the decoder, 1 in the deepest of the four stages, 4 in the first."""
    match = ENCODER.match(name)
    if match is None:
        return 0
    return 4 - int(match["stage"]) if match["stage"] else 5 - int(match["down"] or 1)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: TrainingConfig, *, lowered: float = 1.0) -> float:
    """The rate of `step` in every group; `lowered` is the guard's factor. Returns the full rate of the step."""
    factor = learning_rate_factor(step, config)
    for group in optimizer.param_groups:
        group["lr"] = group["full_rate"] * factor * lowered
    return config.learning_rate * factor * lowered


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Warm-up from zero in a straight line, then half a cosine down to zero: the factor on the learning rate of `step`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def encoder_parameters(network: nn.Module) -> list[nn.Parameter]:
    """What `frozen_steps` keeps as it is: the four stages."""
    return [parameter for name, parameter in network.named_parameters() if ENCODER.match(name)]


def drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """A parameter without a gradient is left alone by clipping and by AdamW, its moments too."""
    for parameter in parameters:
        parameter.grad = None


class Averaged:
    """Exponential moving average of a network's weights: after each step, average = decay * average + (1 - decay) * weights."""

    def __init__(self, network: nn.Module, decay: float):
        self.decay = decay
        self.weights = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        now = network.state_dict()
        floats = [name for name, tensor in self.weights.items() if tensor.is_floating_point()]
        torch._foreach_lerp_([self.weights[name] for name in floats], [now[name] for name in floats], 1 - self.decay)
        for name, tensor in self.weights.items():
            if not tensor.is_floating_point():  # counters
                tensor.copy_(now[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self.weights

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def swap(self, network: nn.Module) -> None:
        """Exchange the average with the network's weights; a second call undoes it."""
        for name, tensor in network.state_dict().items():
            kept = tensor.clone()
            tensor.copy_(self.weights[name])
            self.weights[name].copy_(kept)
