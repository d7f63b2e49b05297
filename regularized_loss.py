"""The losses networks are trained with: cross-entropy, and penalties on the input gradient and on curvature.

This is the file to edit for an experiment. A loss is an ``nn.Module`` that extends ``CELoss``. Its
``compute_loss(input, target)`` returns the scalar to minimize, and sets ``self.metadata`` to the unweighted terms that
are logged: the columns of the metrics file. It may own parameters, which are trained, buffers and networks. All are
saved and resumed; what plain attributes hold is not. Before each epoch the trainer sets ``self.epoch``, counted
from 1, and ``self.num_epochs``. ``self.ramp`` is what --reg-warmup multiplies the weights of penalties by.

At the end of this file, one line in ``WEIGHTS`` makes a flag of a weight, and one line in ``regularizers`` gives a loss
its name on the command line. The README's section "Writing your own loss" has a complete example.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.bound import log_curvature_bound
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from utils.errors import UsageError

# G = 1e5 / 128^2 * mean_i ||grad_x l_i||^2: the reference's 1e5 * sum ||grad_x L||^2 / N at its batch size N = 128, but
# with per-example losses in place of their batch mean L, so that the penalty does not change with the batch size.
GRADNORM_SCALE = 1e5 / 128**2
CURE_SCALE = 1e3 / 128**2  # the same for CURE


def with_input_gradient(input: Tensor) -> Tensor:
    """The same pixels as a tensor that gradients with respect to the input can be taken at."""
    return input if input.requires_grad else input.detach().requires_grad_()


def input_gradient(losses: Tensor, input: Tensor) -> Tensor:
    """Gradient of each example's loss with respect to its own pixels, itself differentiable (double backprop).

    Args:
        losses: (N,) per-example losses computed from ``input``.
        input: (N, ...) tensor that requires a gradient.

    Returns:
        (N, ...), row i = d(sum of losses) / d(input i). That is the gradient of loss i alone wherever examples do not
        mix; a BatchNorm in training mode mixes them a little.

    Raises:
        ValueError: unless there is one loss an example. The gradient of a batch mean is N times too small.
    """
    if not isinstance(losses, Tensor):
        raise ValueError(f"losses of type {type(losses).__name__}; give a tensor, (N,), one for each example")
    if losses.shape != input.shape[:1]:
        raise ValueError(f"losses of shape {tuple(losses.shape)} for {len(input)} examples; give one for each, (N,)")
    return torch.autograd.grad(losses.sum(), input, create_graph=True)[0]


def gradnorm_penalty(losses: Tensor, input: Tensor) -> Tensor:
    """G = (1e5 / 128^2) * mean over examples of ||grad_x l_i||^2 (paper, equation 4), a scalar."""
    gradient = input_gradient(losses, input)
    return GRADNORM_SCALE * gradient.square().sum() / len(gradient)


def sign_direction(gradient: Tensor) -> Tensor:
    """z = sign(gradient) / ||sign(gradient)||_2 of each example (N, ...), held constant; 0 where the gradient is."""
    z = gradient.detach().sign().flatten(1)
    return (z / z.norm(dim=1, keepdim=True).clamp_min(1)).view_as(gradient)  # ||sign|| is 0 or at least 1


def beta_penalty(model: nn.Module) -> Tensor:
    """B = sum over the centered softplus activations of beta (paper, section 4.3), a scalar; 0 where there are none."""
    betas = [module.beta for module in model.modules() if isinstance(module, CenteredSoftplus)]
    return torch.stack(betas).sum() if betas else torch.zeros(())


def gamma_penalty(model: nn.Module) -> Tensor:
    """Gamma = sum over the gamma-Lipschitz BatchNorms of |log gamma|, a scalar; 0 where there are none."""
    log_gammas = [module.log_gamma for module in model.modules() if isinstance(module, LipschitzBatchNorm2d)]
    return torch.stack(log_gammas).abs().sum() if log_gammas else torch.zeros(())


def require_curvature_parameters(model: nn.Module) -> None:
    """Raise ValueError if the model has neither a beta nor a gamma for a curvature penalty to shrink."""
    if not any(isinstance(module, (CenteredSoftplus, LipschitzBatchNorm2d)) for module in model.modules()):
        raise ValueError(
            "a curvature penalty needs a network with trainable beta or gamma: resnet18lcnn, resnet34lcnn or vgg11lcnn "
            "(or --lcnn)"
        )


def require_third_derivatives(losses: Tensor) -> None:
    """Raise UsageError if a layer in the tensor's graph has a third derivative that PyTorch refuses or gets wrong.

    Its BatchNorm, InstanceNorm and LayerNorm take statistics from their input, and hold them constant from the third
    derivative on: https://github.com/pytorch/pytorch/issues/186256, .../175754. Newer versions raise an error for some.
    """
    nodes, seen = [losses.grad_fn], {None}
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        nodes += [before for before, _ in node.next_functions]
        theirs = re.match("(Native|Cudnn|Miopen|Sync)(Batch|Layer)NormBackward", node.name())
        if theirs and getattr(node, "_saved_training", True):  # BatchNorm in eval mode has constants
            raise UsageError(
                "PyTorch's BatchNorm, InstanceNorm and LayerNorm cannot be differentiated three times in training; "
                "give a network of ours or --lcnn, which replaces BatchNorm2d, or normalize by GroupNorm"
            )


class CELoss(nn.Module):
    """L, the batch mean of the cross-entropy. The other losses extend it.

    Args:
        model: maps inputs (N, ...) to logits (N, classes).
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.terms: dict[str, Tensor] = {}
        # the trainer sets all three before each epoch, the last from --reg-warmup
        self.epoch, self.num_epochs, self.warmup_epochs = 1, 1, 0.0

    @property
    def metadata(self) -> Mapping[str, float]:
        """The unweighted terms of the last compute_loss, as floats. Reading it waits for the device; setting it to
        tensors does not. What is read cannot be written to: set the whole dict."""
        return MappingProxyType({name: term.item() for name, term in self.terms.items()})

    @metadata.setter
    def metadata(self, terms: dict[str, Tensor | float]) -> None:
        self.terms = {n: t.detach() if isinstance(t, Tensor) else torch.tensor(float(t)) for n, t in terms.items()}

    @property
    def ramp(self) -> float:
        """What the weights of the penalties are multiplied by: from 0 in the first epoch to 1 after the warmup."""
        return min(1.0, (self.epoch - 1) / self.warmup_epochs) if self.warmup_epochs else 1.0

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """``compute_loss``, as ``nn.Module`` calls it."""
        return self.compute_loss(input, target)

    def losses(self, input: Tensor, target: Tensor) -> Tensor:
        """(N,) cross-entropy of each example; target holds (N,) class indices."""
        return F.cross_entropy(self.model(input), target, reduction="none")

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        """The scalar to minimize, for a batch of inputs (N, ...) and class indices (N,)."""
        raw_loss = self.losses(input, target).mean()
        self.metadata = {"raw_loss": raw_loss}
        return raw_loss


class GradNormRegularizedLoss(CELoss):
    """L + reg_constant * G: small input gradients, by double backprop through them."""

    def __init__(self, model: nn.Module, reg_constant: float = 1e-3):
        super().__init__(model)
        self.reg_constant = reg_constant

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        input = with_input_gradient(input)
        losses = self.losses(input, target)
        raw_loss, gradnorm = losses.mean(), gradnorm_penalty(losses, input)
        self.metadata = {"raw_loss": raw_loss, "gradnorm": gradnorm}
        return raw_loss + self.ramp * self.reg_constant * gradnorm


class CurvatureRegularizedLoss(CELoss):
    """L + reg_constants[0] * B + reg_constants[1] * Gamma: small beta and gamma, hence a small bound on curvature.

    Raises:
        ValueError: if the model has neither a beta nor a gamma.
    """

    def __init__(self, model: nn.Module, reg_constants: tuple[float, float] = (1e-2, 1e-2)):
        require_curvature_parameters(model)
        super().__init__(model)
        self.reg_constants = reg_constants

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        raw_loss = self.losses(input, target).mean()
        beta_term, gamma_term = beta_penalty(self.model), gamma_penalty(self.model)
        self.metadata = {"raw_loss": raw_loss, "beta_term": beta_term, "gamma_term": gamma_term}
        reg_beta, reg_gamma = (self.ramp * weight for weight in self.reg_constants)
        return raw_loss + reg_beta * beta_term + reg_gamma * gamma_term


class CurvatureAndGradientRegularizedLoss(CELoss):
    """L + reg_constants[0] * B + reg_constants[1] * Gamma + reg_constants[2] * G: the paper's LCNN + GradReg.

    Raises:
        ValueError: if the model has neither a beta nor a gamma.
    """

    def __init__(self, model: nn.Module, reg_constants: tuple[float, float, float] = (1e-2, 1e-2, 1e-3)):
        require_curvature_parameters(model)
        super().__init__(model)
        self.reg_constants = reg_constants

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        input = with_input_gradient(input)
        losses = self.losses(input, target)
        raw_loss, gradnorm = losses.mean(), gradnorm_penalty(losses, input)
        beta_term, gamma_term = beta_penalty(self.model), gamma_penalty(self.model)
        self.metadata = {"raw_loss": raw_loss, "beta_term": beta_term, "gamma_term": gamma_term, "gradnorm": gradnorm}
        reg_beta, reg_gamma, reg_gnorm = (self.ramp * weight for weight in self.reg_constants)
        return raw_loss + reg_beta * beta_term + reg_gamma * gamma_term + reg_gnorm * gradnorm


class CURELoss(CELoss):
    """L + reg_constant * (1e3 / 128^2) * mean over examples of ||grad_x l_i(x) - grad_x l_i(x + z)||^2, a baseline of
    the paper: small curvature along z, see sign_direction (Moosavi-Dezfooli et al., CVPR 2019).

    Both gradients are differentiated; in training mode each of the two forward passes updates BatchNorm's statistics.
    """

    def __init__(self, model: nn.Module, reg_constant: float = 1e-3):
        super().__init__(model)
        self.reg_constant = reg_constant

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        input = with_input_gradient(input)
        losses = self.losses(input, target)
        gradient = input_gradient(losses, input)
        shifted = with_input_gradient(input.detach() + sign_direction(gradient))
        change = gradient - input_gradient(self.losses(shifted, target), shifted)
        raw_loss, cure = losses.mean(), CURE_SCALE * change.square().sum() / len(input)
        self.metadata = {"raw_loss": raw_loss, "cure": cure}
        return raw_loss + self.ramp * self.reg_constant * cure


class CurvatureBoundRegularizedLoss(CELoss):
    """L + reg_constant * log of the curvature bound of Theorem 1, as far as beta and gamma decide it.

    Raises:
        ValueError: if the model is not a low-curvature ResNet or VGG of this project.
    """

    def __init__(self, model: nn.Module, reg_constant: float = 1e-2):
        log_curvature_bound(model)  # raises
        super().__init__(model)
        self.reg_constant = reg_constant

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        raw_loss, log_bound = self.losses(input, target).mean(), log_curvature_bound(self.model)
        self.metadata = {"raw_loss": raw_loss, "log_bound": log_bound}
        return raw_loss + self.ramp * self.reg_constant * log_bound


class HessianLoss(CELoss):
    """L + reg_constant * mean over examples of ||H_i v_i||^2, each v_i a new random unit vector in every step.

    H_i is the Hessian of loss i with respect to its D pixels. The mean over v is ||H_i||_F^2 / D. The product is
    differentiated, the loss a third time.

    Raises:
        UsageError: by compute_loss, if the model has a layer that cannot be differentiated three times in training.
    """

    def __init__(self, model: nn.Module, reg_constant: float = 1e-4):
        super().__init__(model)
        self.reg_constant = reg_constant

    def compute_loss(self, input: Tensor, target: Tensor) -> Tensor:
        input = with_input_gradient(input)
        losses = self.losses(input, target)
        require_third_derivatives(losses)
        gradient = input_gradient(losses, input)
        v = F.normalize(torch.randn_like(gradient).flatten(1)).view_as(gradient)
        (product,) = torch.autograd.grad(gradient, input, v, create_graph=True)
        raw_loss, hessian = losses.mean(), product.square().sum() / len(product)
        self.metadata = {"raw_loss": raw_loss, "hessian": hessian}
        return raw_loss + self.ramp * self.reg_constant * hessian


# The weights of the penalties: name in ``flags`` -> its default and its help. reg_gnorm is --reg-gnorm there.
WEIGHTS = {
    "reg_gnorm": (1e-3, "weight of the gradient norm"),
    "reg_beta": (1e-2, "weight of the sum of beta; 1e-2 is the reference's last, the paper's Table 1 has 1e-3"),
    "reg_gamma": (1e-2, "weight of the sum of |log gamma|; likewise"),
    "reg_bound": (1e-2, "weight of the log curvature bound"),
    "reg_hessian": (1e-4, "weight of the squared Hessian along random directions"),
}

# --regularizer NAME -> the loss it trains with; ``flags`` are train_models.py's parsed flags
regularizers = {
    "none": lambda model, flags: CELoss(model),
    "gnorm": lambda model, flags: GradNormRegularizedLoss(model, flags.reg_gnorm),
    "curvature": lambda model, flags: CurvatureRegularizedLoss(model, (flags.reg_beta, flags.reg_gamma)),
    "curvature_and_gnorm": lambda model, flags: CurvatureAndGradientRegularizedLoss(
        model, (flags.reg_beta, flags.reg_gamma, flags.reg_gnorm)
    ),
    "cure": lambda model, flags: CURELoss(model, flags.reg_gnorm),
    "curvature_bound": lambda model, flags: CurvatureBoundRegularizedLoss(model, flags.reg_bound),
    "hessian": lambda model, flags: HessianLoss(model, flags.reg_hessian),
}
