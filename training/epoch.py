"""Training: the optimizer, one epoch, evaluation, and the BatchNorm statistics a low-curvature network starts from."""

import math
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.batches import Batch, Split, batches
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from regularized_loss import CELoss
from training import parallel
from utils import distributed
from utils.errors import UserError, one_line


def build_optimizer(
    model: nn.Module, lr: float, momentum: float, weight_decay: float, beta_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD with weight decay on everything except log beta and log gamma (paper, appendix: they have penalties).

    beta_weight_decay is for beta itself, not for the log beta that is trained, whose decay would draw beta to 1.
    """
    log_betas = [m.log_beta for m in model.modules() if isinstance(m, CenteredSoftplus)]
    undecayed = log_betas + [m.log_gamma for m in model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    undecayed_ids = {id(parameter) for parameter in undecayed}
    decayed = [parameter for parameter in model.parameters() if id(parameter) not in undecayed_ids]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if undecayed:
        groups.append({"params": undecayed, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)
    if momentum:  # what a fused optimizer would add at its first step, but not at a later one, to what has a gradient
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def decay_betas(*_) -> None:
        for log_beta in log_betas:
            if log_beta.grad is not None:  # d/d(log beta) of weight / 2 * beta^2
                log_beta.grad += beta_weight_decay * (2 * log_beta).exp()

    if beta_weight_decay:
        optimizer.register_step_pre_hook(decay_betas)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.SGD, state: dict, path: Path) -> None:
    """Go on with the momenta of the checkpoint at path, whose optimizer's state_dict this is; all else is the flags'.

    Raises:
        UserError: if they are not of these parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        for index, theirs in state["state"].items():
            own, momentum = optimizer.state[parameters[index]], theirs.get("momentum_buffer")
            if momentum is not None:
                own["momentum_buffer"].copy_(momentum.view_as(own["momentum_buffer"]))  # laid out as the weights are
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise UserError(
            f"{path}: the optimizer's state does not fit ({one_line(error)}); start again, with --overwrite"
        ) from error


def learning_rate(initial: float, epoch: int, num_epochs: int) -> float:
    """The rate for an epoch counted from 1: initial, times 0.1 after 75 % of the epochs and again after 87.5 %.

    A function of the epoch alone, so a resumed run needs no scheduler state. A milestone that rounds down to zero
    epochs is passed over: a one-epoch run trains at the initial rate.
    """
    milestones = [int(fraction * num_epochs) for fraction in (0.75, 0.875)]
    return initial * 0.1 ** sum(0 < milestone < epoch for milestone in milestones)


# of the metrics, beside the terms of the loss
COLUMNS = ("epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second")


class Gradients:
    """gradients(images, labels, weight): the loss of a batch and, in every parameter's grad, weight times its gradient.

    A penalty on the input gradient is inside compute_loss, as autograd.grad with create_graph: one backward pass then
    gives the gradient of loss and penalty together. With several processes it is their mean, see ``data_parallel``.

    Returns:
        ``train_loss``, the quantity minimized, and each unweighted term of the loss, as scalars.
    """

    def __init__(self, loss: CELoss, model: nn.Module, find_unused: bool = False):
        self.loss, self.compute_loss = loss, parallel.data_parallel(loss, model, find_unused)
        self.names: list[str] | None = None  # of the loss's terms

    def __call__(self, images: Tensor, labels: Tensor, weight: float = 1.0) -> dict[str, Tensor | float]:
        total = self.compute_loss(images, labels)
        self.check_total(total)
        terms = self.loss.terms if isinstance(self.loss, CELoss) else self.loss.metadata
        self.check_terms(terms)
        (total * weight).backward()
        return {"train_loss": total.detach(), **terms}

    def check_total(self, total: Tensor) -> None:
        """Raise UserError unless the loss is something to minimize."""
        problem = None
        if not isinstance(total, Tensor):
            problem = f"a {type(total).__name__}"
        elif total.ndim:
            problem = f"a tensor of shape {tuple(total.shape)}"
        elif not total.requires_grad:
            problem = "a tensor without gradient"
        if problem:
            raise UserError(
                f"{type(self.loss).__name__}.compute_loss returned {problem}; return a scalar tensor computed from the "
                "network's output"
            )

    def check_terms(self, terms: dict[str, Tensor | float]) -> None:
        """Raise UserError unless the terms can be columns of the metrics: numbers, of names of their own, the same in
        every step."""
        if self.names is None:
            self.names = list(terms)
        problem = None
        if taken := [name for name in terms if name in COLUMNS]:
            problem = f"{taken[0]!r} is a column of the metrics already; rename it"
        elif list(terms) != self.names:
            problem = f"{', '.join(self.names)} at first, {', '.join(terms)} later; set the same in every step"
        elif odd := [name for name, term in terms.items() if isinstance(term, Tensor) and term.ndim]:
            problem = f"{odd[0]!r} is of shape {tuple(terms[odd[0]].shape)}; set a scalar"
        elif odd := [name for name, term in terms.items() if not isinstance(term, (Tensor, int, float))]:
            problem = f"{odd[0]!r} is a {type(terms[odd[0]]).__name__}; set a number"
        if problem:
            raise UserError(f"the terms in the metadata of {type(self.loss).__name__}: {problem}")


class NonFiniteStep(Exception):
    """A loss or a gradient that is not a finite number; the step was not taken."""


class FiniteSteps:
    """Lets the optimizer, a fused one, take no step from the first on whose loss or gradient is not finite.

    On a GPU nothing is read back before the epoch ends, so that no step waits for it; on a CPU it is at once.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer, self.step = optimizer, 0
        self.bad: Tensor | None = None

    def check(self, terms: dict[str, Tensor | float]) -> None:
        """To be called between the gradients of a step and the optimizer's step."""
        self.step += 1
        device = self.parameters[0].device
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None]))
        # what a loss computed on the host is left out: to send it to the device would wait
        terms = {n: t for n, t in terms.items() if isinstance(t, Tensor) and t.device == device}
        terms["the gradient"] = norms.sum()
        self.names = list(terms)
        values = distributed.summed_on_device(torch.stack([term.float() for term in terms.values()]))
        if self.bad is None:
            self.bad, self.first = torch.zeros((), device=device), torch.zeros((), device=device)
            self.values = values
        good = self.bad == 0
        self.values = torch.where(good, values, self.values)
        self.first = torch.where(good, float(self.step), self.first)
        self.bad = torch.maximum(self.bad, 1 - values.isfinite().all().float())
        self.optimizer.found_inf = self.bad
        if device.type == "cpu":
            self.raise_if_bad()

    def raise_if_bad(self) -> None:
        """Raise NonFiniteStep, with the step and what went bad in it, if one was not finite. Waits for the device."""
        if self.bad is not None and self.bad.item():
            bad = [f"{name} {value:g}" for name, value in zip(self.names, self.values.tolist(), strict=True)]
            bad = [text for text in bad if text.endswith(("nan", "inf"))]
            raise NonFiniteStep(f"step {int(self.first)}: {', '.join(bad)}, so the step was not taken")


def train_epoch(
    model: nn.Module, gradients: Gradients, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]
) -> dict[str, float]:
    """One pass of optimizer steps over batches, the model in training mode.

    Returns:
        Means over the examples of what ``gradients`` returns.

    Raises:
        UserError: on a batch too small to train BatchNorm with.
        NonFiniteStep: on a loss or gradient that is not finite, before the optimizer uses it.
    """
    model.train()
    sums: dict[str, Tensor] = {}  # stay on the device: reading a number after every step would wait for it
    num_examples = 0
    finite = FiniteSteps(model, optimizer)
    for images, labels, size, share in batches:
        optimizer.zero_grad(set_to_none=True)
        try:
            terms = gradients(images, labels, share * distributed.world_size())
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UserError("BatchNorm cannot be trained on one example of this size; raise --batch-size") from None
            raise
        finite.check(terms)
        optimizer.step()
        parallel.average_statistics(model, share)
        for name, term in terms.items():
            sums[name] = sums.get(name, 0.0) + term * (share * size)
        num_examples += size
    finite.raise_if_bad()
    parallel.equalize_buffers(model)
    means = distributed.summed([float(value) / num_examples for value in sums.values()])
    return dict(zip(sums, means, strict=True))


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent on a split, un-augmented, the model left in eval mode."""
    model.eval()
    loss = torch.zeros((), device=split.images.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.images.device)
    own = split[slice(distributed.rank(), None, distributed.world_size())]
    for images, labels in batches(own, batch_size, next(model.parameters()).dtype):
        logits = model(images)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(dim=1) == labels).sum()
    loss, correct = distributed.summed([float(loss), int(correct)])
    return loss / len(split), 100 * correct / len(split)


def set_batchnorm_momentum(model: nn.Module, momentum: float) -> None:
    """How much of each batch enters the running statistics. torch's (and the paper's) 0.1 averages over some 20 steps;
    a short low-curvature run needs more, see calibrate_batchnorm."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Set every BatchNorm's running statistics to those of one batch (n, 3, H, H), layer by layer from the input on.

    Behind spectrally normalized convolutions the standard deviations are some hundredths, far from the initial 1, and
    running averages take a hundred steps to get there; until then the clip min(1, s gamma) moves under the network.
    Each layer's statistics are set just before it is applied, so that the next one sees what it will see in eval.
    """

    def set_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:
        if norm.running_mean is None:  # it uses each batch's own, always
            return
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)))

    was_training = model.training
    hooks = [m.register_forward_pre_hook(set_statistics) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)


def is_finite(terms: dict[str, float]) -> bool:
    """Whether every value is a number one can go on from."""
    return all(math.isfinite(value) for value in terms.values())
