"""One epoch of training: the optimizer, the training step, evaluation, and BatchNorm's first statistics."""

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.self_check import COMPILED
from data.batches import Batch, Split, batches
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from models.model_selector import OUR_NETWORKS
from regularized_loss import CELoss
from training.parallel import average_statistics, equalize, sum_gradients, sum_together
from utils import distributed
from utils.errors import UserError, is_out_of_memory, one_line

MINIMIZED = "return a scalar tensor computed from the network's output"
# of the metrics, beside the terms of the loss
COLUMNS = ("epoch", "learning_rate", "train_loss", "test_loss", "test_accuracy", "seconds", "images_per_second")


def build_optimizer(
    loss: CELoss, lr: float, momentum: float, weight_decay: float, beta_weight_decay: float = 0.0
) -> torch.optim.SGD:
    """SGD for the network's parameters and the loss's own.

    Weight decay is on the network's, except log beta and log gamma: they have penalties (paper, appendix).
    beta_weight_decay draws beta itself to 0; weight decay on log beta would draw beta to 1.
    """
    log_betas = [m.log_beta for m in loss.model.modules() if isinstance(m, CenteredSoftplus)]
    log_gammas = [m.log_gamma for m in loss.model.modules() if isinstance(m, LipschitzBatchNorm2d)]
    undecayed, of_model = set(log_betas + log_gammas), set(loss.model.parameters())
    groups = [
        {"params": [p for p in loss.model.parameters() if p not in undecayed], "weight_decay": weight_decay},
        {"params": log_betas + log_gammas, "weight_decay": 0.0},
        {"params": [p for p in loss.parameters() if p not in of_model], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD([group for group in groups if group["params"]], lr=lr, momentum=momentum, fused=True)
    if momentum:
        # Fused SGD creates momentum buffers only in its first step.
        # Create all of them now: some parameters get their first gradient later.
        for parameter in loss.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def decay_betas(*_) -> None:
        for log_beta in log_betas:
            if log_beta.grad is not None:  # d/d(log beta) of weight / 2 * beta^2
                log_beta.grad += beta_weight_decay * (2 * log_beta).exp()

    if beta_weight_decay:
        optimizer.register_step_pre_hook(decay_betas)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.SGD, state: dict) -> None:
    """Go on with the momenta in the optimizer's state of a checkpoint, laid out as the weights are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, theirs in state["state"].items():
        if (momentum := theirs.get("momentum_buffer")) is not None:
            own = optimizer.state[parameters[index]]["momentum_buffer"]
            own.copy_(momentum.view_as(own))


def learning_rate(initial: float, epoch: int, num_epochs: int) -> float:
    """The rate for an epoch counted from 1: initial, times 0.1 after 75 % of the epochs and again after 87.5 %.

    Where both round down to the same epoch, the first comes one earlier, so that a short run passes through both rates.
    A milestone at zero epochs is passed over: a one-epoch run trains at the initial rate.
    """
    second = int(0.875 * num_epochs)
    first = min(int(0.75 * num_epochs), second - 1)
    return initial * 0.1 ** sum(0 < milestone < epoch for milestone in (first, second))


def unregistered(loss: CELoss) -> dict[str, Tensor | nn.Module]:
    """What nn.Module does not know as the loss's own: modules with a state, and tensors that require a gradient.

    They would be neither trained nor saved. Lists, tuples and dicts are looked into; the network is not.
    """
    known = {id(part) for part in (*loss.parameters(), *loss.modules())}

    def hidden(name: str, value) -> Iterator[tuple[str, Tensor | nn.Module]]:
        if isinstance(value, (list, tuple, dict)):
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                yield from hidden(f"{name}[{key!r}]", item)
        elif id(value) not in known:
            # what a submodule computed from its parameters, as the old weight_norm does, is no leaf
            trained = isinstance(value, Tensor) and value.requires_grad and (value.is_leaf or "." not in name)
            if trained or (isinstance(value, nn.Module) and value.state_dict()):
                yield name, value

    found = {}
    for path, part in loss.named_modules():
        own = vars(part) | part._buffers if path.split(".")[0] != "model" else {}
        for name in own.keys() - vars(nn.Module()).keys():
            found |= hidden(f"{path}.{name}".lstrip("."), own[name])
    return found


def own_state(loss: CELoss) -> dict:
    """The entries of the loss's state_dict that are not the network's, which losses in it may have again."""
    network = set(loss.model.modules())
    shared = tuple(f"{path}." for path, part in loss.named_modules(remove_duplicate=False) if part in network)
    return {name: value for name, value in loss.state_dict().items() if not name.startswith(shared)}


class TrainingStep:
    """step(images, labels, weight): the loss of a batch, and the gradient of weight times it in every grad.

    compute_loss takes the input gradient with create_graph: one backward pass gives the gradient of loss and penalty.
    The gradients, which must be None before, are summed over the processes, whose state starts as the first one's.
    The step returns ``train_loss``, the quantity minimized, and each unweighted term of the loss, as scalars.
    """

    def __init__(self, loss: CELoss):
        equalize(loss)
        self.loss, self.keys = loss, own_state(loss).keys()
        # a buffer that is None may be filled later
        self.keys |= {f"{path}.{name}".lstrip(".") for path, m in loss.named_modules() for name in m._buffers}
        self.names: list[str] | None = None  # of the loss's terms
        self.made: dict[str, Tensor | nn.Module] = {}  # what the first step left in plain attributes

    def __call__(self, images: Tensor, labels: Tensor, weight: float = 1.0) -> dict[str, Tensor | float]:
        total, terms = self.loss(images, labels), self.loss.terms
        self.check(total, terms)
        (total * weight).backward()
        sum_gradients(self.loss)
        if all(parameter.grad is None for parameter in self.loss.parameters()):
            self.refuse(f"returned a tensor that depends on no parameter; {MINIMIZED}")
        return {"train_loss": total.detach(), **terms}

    def check(self, total: Tensor, terms: dict[str, Tensor]) -> None:
        """Raise UserError unless the loss can be minimized, and its terms can be columns of the metrics.

        Nor may the loss create parameters or modules in its first step: the optimizer and --resume would miss them.
        What the second step finds unchanged counts as created; what is made anew in each step does not.
        """
        if not isinstance(total, Tensor):
            self.refuse(f"returned a {type(total).__name__}; {MINIMIZED}")
        if total.ndim:
            self.refuse(f"returned a tensor of shape {tuple(total.shape)}; {MINIMIZED}")
        if not total.requires_grad:
            self.refuse(f"returned a tensor without gradient; {MINIMIZED}")
        created = ()
        if self.names is None:
            self.names, created = list(terms), own_state(self.loss).keys() - self.keys
            parts = unregistered(self.loss).items()
            self.made = {name: part for name, part in parts if isinstance(part, nn.Module) or part.is_leaf}
        elif self.made:
            created = [name for name, part in unregistered(self.loss).items() if self.made.get(name) is part]
            self.made = {}
        if created:
            self.refuse(f"creates {min(created)}, neither trained nor resumed; create it in the constructor")
        if taken := [name for name in terms if name in COLUMNS]:
            self.refuse(f"sets metadata in which {taken[0]!r} is a column of the metrics already; rename it")
        if list(terms) != self.names:
            names = f"{', '.join(self.names)} at first, {', '.join(terms)} later"
            self.refuse(f"sets the metadata {names}; set the same in every step")
        if odd := [name for name, term in terms.items() if term.ndim]:
            shape = tuple(terms[odd[0]].shape)
            self.refuse(f"sets metadata in which {odd[0]!r} is of shape {shape}; set a scalar")

    def refuse(self, problem: str) -> None:
        raise UserError(f"{type(self.loss).__name__}.compute_loss {problem}")


class NonFiniteStep(Exception):
    """A loss or a gradient that is not a finite number; the step was not taken."""


class FiniteSteps:
    """From the first non-finite loss or gradient on, the fused optimizer skips its updates: ``found_inf`` is 1.

    A GPU is asked once, when the epoch ends: no step waits for it. A CPU is asked at every step.
    """

    def __init__(self, loss: nn.Module, optimizer: torch.optim.Optimizer):
        self.parameters, self.optimizer = list(loss.parameters()), optimizer
        self.steps: list[Tensor] = []  # what was computed in each, on the device
        self.bad = torch.zeros((), device=self.parameters[0].device)

    def check(self, terms: dict[str, Tensor]) -> None:
        """To be called between the gradients of a step and the optimizer's step."""
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters if p.grad is not None]))
        # terms on the host are left out: to send them to the device would wait
        terms = {name: term.float() for name, term in terms.items() if term.device == self.bad.device}
        terms["the gradient"] = norms.sum().float()
        self.names = list(terms)
        values = torch.stack(list(terms.values()))
        sum_together([values])
        self.steps.append(values)
        self.bad = torch.maximum(self.bad, 1 - values.isfinite().all().float())
        self.optimizer.found_inf = self.bad
        if self.bad.device.type == "cpu":
            self.raise_if_bad()

    def raise_if_bad(self) -> None:
        """Raise NonFiniteStep, with what went bad, if a step was not finite. Waits for the device."""
        if self.bad.item():
            step, values = next((i, v) for i, v in enumerate(self.steps, start=1) if not v.isfinite().all())
            bad = [f"{name} {value:g}" for name, value in zip(self.names, values.tolist(), strict=True)]
            bad = [text for text in bad if text.endswith(("nan", "inf"))]
            raise NonFiniteStep(f"step {step}: {', '.join(bad)}, so the step was not taken")


def train_epoch(step: TrainingStep, optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> dict[str, float]:
    """One pass of optimizer steps over batches; returns the means over the examples of what ``step`` returns.

    Raises:
        UserError: on a batch too small to train BatchNorm with.
        NonFiniteStep: on a loss or gradient that is not finite, before the optimizer uses it.
    """
    loss, model = step.loss, step.loss.model
    model.train()  # the rest of the loss, a teacher say, stays in the mode it is in
    sums: dict[str, Tensor] = {}  # stay on the device: reading a number after every step would wait for it
    num_examples = 0
    finite = FiniteSteps(loss, optimizer)
    for images, labels, size, share in batches:
        optimizer.zero_grad(set_to_none=True)
        try:
            terms = step(images, labels, share)
        except ValueError as error:
            if "more than 1 value per channel" in str(error):
                raise UserError("BatchNorm cannot be trained on one example of this size; raise --batch-size") from None
            raise
        finite.check(terms)
        for name, term in terms.items():  # before the step changes terms that are parameters
            sums[name] = sums.get(name, 0.0) + term * (share * size)
        optimizer.step()
        average_statistics(loss, share)
        num_examples += size
    finite.raise_if_bad()
    equalize(loss, average=True)
    means = distributed.summed([float(value) / num_examples for value in sums.values()])
    return dict(zip(sums, means, strict=True))


# what PyTorch's refusal says -> what may help
REMEDIES = {
    "deterministic": "--no-strong-determinism-wanted may help",
    **COMPILED,
    "leaf Variable that requires grad": "change its input nowhere in place: inplace=False in the first layer",
    "used in the graph": "remove any no_grad or detach from its forward",
}


@contextmanager
def failures_in_one_line(model_arch: str, loss: CELoss, epoch: int) -> Iterator[None]:
    """Say in one line why another project's network could not be trained.

    A mistake in regularized_loss.py keeps its traceback, and so does all that goes wrong with ours.
    What autograd refuses there is the network's fault: a layer that cannot be differentiated twice.
    """
    name = type(loss).__name__
    try:
        yield
    except NonFiniteStep as error:
        remedy = f"a smaller --lr may help, or look at how {name} computes it"
        raise UserError(f"epoch {epoch}, {error}; what was saved before it stays; {remedy}") from None
    except Exception as error:  # the user's own code may raise anything
        files = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
        last = max(i for i, file in enumerate(files) if Path(torch.__file__).parent not in file.parents)
        in_autograd = [file.parent.name for file in files[last + 1 :]][:1] == ["autograd"]
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        in_network = any(frame.f_locals.get("self") is loss.model for frame in frames)  # one of torch's layers alone
        in_the_loss = files[last].name == "regularized_loss.py" and not in_autograd and not in_network
        if isinstance(loss.model, OUR_NETWORKS) or in_the_loss or isinstance(error, UserError):
            raise
        if distributed.is_lost_process(error) or is_out_of_memory(error):
            raise
        remedy = "use layers that can be differentiated as often as it needs, or --lcnn, which replaces some"
        remedy = next((known for words, known in REMEDIES.items() if words in str(error)), remedy)
        raise UserError(f"{model_arch}: cannot be trained with {name} ({one_line(error)}); {remedy}") from error


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int) -> tuple[float, float]:
    """Mean cross-entropy and accuracy in percent on a split; the model is left in eval mode."""
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


@torch.no_grad()
def calibrate_batchnorm(model: nn.Module, images: Tensor) -> None:
    """Set every BatchNorm's running statistics to those of one batch (n, 3, H, H), layer by layer from the input on.

    Behind spectrally normalized convolutions the standard deviations are some hundredths, far from the initial 1.
    Running averages take a hundred steps to get there, and until then the clip min(1, s gamma) moves.
    """

    def set_statistics(norm: nn.BatchNorm2d, inputs: tuple[Tensor]) -> None:  # just before the layer is applied
        if norm.running_mean is not None:  # otherwise it uses each batch's own, always
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
