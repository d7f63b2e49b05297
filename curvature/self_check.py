"""What must hold for a model's curvature to mean anything, checked on a few images before any number is reported.

The curvature of an example is that of its own cross-entropy: the model must map pixels in [0, 1] to finite logits,
one row per image, the same row each time and whatever else is in the batch, and differentiably so.
"""

from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.outside import forward
from utils.errors import UserError, one_line
from utils.numerics import RTOL, frozen_in_eval, same, tensors

TF32_EPS = 2**-10
# what PyTorch's refusal to differentiate what is compiled says -> what helps
COMPILED = dict.fromkeys(("was compiled", "torch.compile"), "leave torch.compile out of it")
Calls = dict[tuple[str, int], tuple[list[Tensor], list[Tensor]]]  # (layer, its how many-th call): inputs and outputs


def check_model(model: nn.Module, images: Tensor, num_classes: int, name: str) -> None:
    """Refuse a model whose curvature would be meaningless or could not be computed.

    Args:
        model: maps images to logits; it is tried in eval mode and left as it was found.
        images: (N, 3, H, W), a few of the data set in the model's dtype, on its device, left unchanged. With N = 1
            whether examples mix cannot be told.
        num_classes: the data set's.
        name: what to call the model in messages.

    Raises:
        UserError: naming the model, what is wrong and the remedy.
    """
    low, high = float(images.min()), float(images.max())
    if not (images.is_floating_point() and low >= 0 and high <= 1):  # normalized, 8 bit, or not finite
        raise UserError(
            f"{name}: the images are {images.dtype} from {low:.3g} to {high:.3g}; give floating point pixels in [0, 1] "
            "and put any normalization inside the model"
        )
    logits_of = partial(forward, model, num_classes=num_classes, name=name)
    with frozen_in_eval(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # as it will be measured
        logits = logits_of(images)
        check_values(logits, name)
        # if random, it would be differentiated as another function each time
        if not same(logits, logits_of(images), RTOL):
            layer = first_difference(model, images[:2], images[:2], RTOL)
            raise UserError(
                f"{name}: random in eval: {layer} gives two answers to the same input; make it deterministic in eval"
            )
        # if it mixes examples, the Hessian of one's loss depends on the others; but another batch size may mean
        # another algorithm, which in low precision rounds differently from RTOL on
        tf32 = images.is_cuda and images.dtype == torch.float32  # convolutions on a GPU, unless the user forbade it
        rtol = max(RTOL, 16 * (TF32_EPS if tf32 else torch.finfo(logits.dtype).eps))
        if not same(logits, torch.cat([logits_of(image) for image in images.split(1)]), rtol):
            layer = first_difference(model, images[:2], images[:1], rtol)
            raise UserError(
                f"{name}: mixes examples: {layer} gives an image alone another answer than in a batch; "
                "treat each image by itself in eval (a BatchNorm needs its running statistics)"
            )
        check_differentiable(model, logits_of, images, name)


def check_values(logits: Tensor, name: str) -> None:
    """Refuse values that are not finite, and probabilities; log-probabilities have the logits' cross-entropy."""
    if not logits.isfinite().all():
        raise UserError(f"{name}: its logits are not all finite; check its weights and its dtype")
    sums = logits.float().sum(dim=1)
    if logits.shape[1] > 1 and logits.min() >= 0 and logits.max() <= 1 and ((sums - 1).abs() <= 1e-4).all():
        raise UserError(f"{name}: gives probabilities, not logits; leave its softmax out")


def check_differentiable(model: nn.Module, logits_of: Callable[[Tensor], Tensor], images: Tensor, name: str) -> None:
    """Refuse a model whose logits have no gradient with respect to the pixels, or cannot be differentiated twice.

    A gradient of zero passes where all weights of a layer are zero, as a last layer's may be before training.
    """
    pixels = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(pixels).to(images.dtype)
        weights = torch.linspace(1, 2, logits.shape[1], dtype=images.dtype, device=images.device)
        # a function of the logits that, unlike the cross-entropy, is never flat where the model is sure of its answer;
        # weighted, as models may well fix the sum of their logits; squared, so that autograd needs all it needs later;
        # and not around 0, where a square is flat, as untrained logits may be zero
        objective = (1 + logits @ weights).square()
        gradient = None
        try:
            if objective.requires_grad:
                (gradient,) = torch.autograd.grad(objective.sum(), pixels, create_graph=True, allow_unused=True)
            if gradient is not None and gradient.requires_grad:
                # not grad(), which leaves out in silence what comes through a once_differentiable function
                gradient.sum().backward()
        except Exception as error:
            remedy = next((known for words, known in COMPILED.items() if words in str(error)), "use layers that can")
            raise UserError(f"{name}: cannot be differentiated twice ({one_line(error)}); {remedy}") from error
    if gradient is None or not (gradient.any() or any(w.ndim > 1 and not w.any() for w in model.parameters())):
        raise UserError(
            f"{name}: its logits do not depend differentiably on the pixels; "
            "remove any no_grad, detach or rounding from its forward"
        )


# which layer is to blame


def record_calls(model: nn.Module, images: Tensor) -> Calls:
    """Run the model, and note every layer's inputs and outputs, call by call, in order of completion."""
    calls: Calls = {}
    counts = defaultdict(count)
    entered = []  # the inputs of the calls under way: the innermost is the last

    def enter(module, args, kwargs):
        entered.append(list(tensors((args, kwargs))))

    def leave(layer, module, args, kwargs, output):
        calls[layer, next(counts[layer])] = entered.pop(), list(tensors(output))

    with ExitStack() as hooks:
        for path, module in model.named_modules():
            kind = type(module).__name__
            layer = f"layer {path} ({kind})" if path else f"the model's own forward ({kind})"
            # before the user's own hooks, which belong to the layer
            hooks.enter_context(module.register_forward_pre_hook(enter, prepend=True, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(leave, layer), with_kwargs=True))
        model(images.clone())
    return calls


def first_difference(model: nn.Module, images: Tensor, first: Tensor, rtol: float) -> str:
    """The first layer to complete a call with equal inputs and different outputs: the innermost that is to blame.

    Of the batch of images, the leading part of each tensor is compared with its counterpart of the ``first`` of them.
    """
    one, other = record_calls(model, images), record_calls(model, first)

    def agree(many: list[Tensor], few: list[Tensor]) -> bool:
        return len(many) == len(few) and all(
            a.ndim == b.ndim and same(a[tuple(map(slice, b.shape))], b, rtol) for a, b in zip(many, few, strict=True)
        )

    for key, (inputs, outputs) in one.items():
        if key in other and agree(inputs, other[key][0]) and not agree(outputs, other[key][1]):
            return key[0]
    return "some layer"  # a difference that two more runs did not show
