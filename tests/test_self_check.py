"""The checks a model passes before it is measured: good models of many kinds do, each kind of bad one is named."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.self_check import check_model
from utils.errors import UserError


@pytest.fixture(autouse=True)
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(4, 3, 16, 16)


class Function(nn.Module):
    """A layer without weights; or, with inner layers, a function of them and the input."""

    def __init__(self, function, *inner: nn.Module):
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(inner)

    def forward(self, *args, **kwargs):
        return self.function(*self.inner, *args, **kwargs)


def network(*middle: nn.Module, end: nn.Module | None = None) -> nn.Sequential:
    """A small ReLU network of 10 classes; (N, 4, 16, 16) into ``middle`` and out of it, its logits into ``end``."""
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *middle, nn.ReLU(inplace=True))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10), end or nn.Identity())


class ManyKinds(nn.Module):
    """A layer called twice, dicts and tuples between layers, keyword arguments, and ``last`` before the head."""

    def __init__(self, last: nn.Module):
        super().__init__()
        self.shared = nn.Conv2d(3, 3, 3, padding=1)
        self.split = Function(lambda x, scale: {"both": (x, [scale * x])})
        self.join = Function(lambda *, parts: parts["both"][0] + parts["both"][1][0])
        self.last, self.head = last, nn.Linear(3, 10)

    def forward(self, x):
        x = self.join(parts=self.split(self.shared(self.shared(x).relu_()), scale=0.5))
        return self.head(self.last(x).mean(dim=(2, 3)))


class SequenceFirst(nn.Module):
    """Attention over rows of pixels with the batch second, as torch's default has it; fused unless told otherwise."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.attention, self.norm, self.head = nn.MultiheadAttention(48, 2), norm, nn.Linear(48, 10)

    def forward(self, x):
        x = x.permute(2, 0, 1, 3).flatten(2)  # (rows, N, 48)
        return self.head(self.norm(self.attention(x, x, x, need_weights=False)[0]).mean(dim=0))


def head_of_zeros() -> nn.Module:
    """As it is before training: its logits and their gradient are zero."""
    model = network()
    nn.init.zeros_(model[3].weight)
    nn.init.zeros_(model[3].bias)
    return model


def sure_of_its_answers() -> nn.Module:
    """Log-probabilities whose cross-entropy is flat to the last digit; they are not."""
    model = network(end=nn.LogSoftmax(dim=1))
    nn.init.constant_(model[3].bias[3], 1000)
    return model


GOOD = {
    "in place": lambda: network(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
    "dropout and group norm": lambda: network(nn.Dropout(), nn.GroupNorm(2, 4)),
    "changes its input, float64": lambda: Function(lambda net, x: net(x.sub_(0.5)), network()).double(),
    "sure of its answers": sure_of_its_answers,
    "a head of zeros": head_of_zeros,
    "logits of zero, with a gradient": lambda: network(end=Function(lambda z: z - z.detach())),
    "logits of sum zero": lambda: network(end=Function(lambda z: z - z.mean(dim=1, keepdim=True))),
    "attention": lambda: SequenceFirst(nn.LayerNorm(48)),
    "another rounding for each batch size": lambda: network(end=Function(lambda z: z * (1 + len(z) / 512))).bfloat16(),
}


@pytest.mark.parametrize("kind", GOOD)
def test_good_models_pass_and_stay_as_they_were(kind, images):
    model = GOOD[kind]()
    list(model.modules())[-1].eval()  # modes may well be mixed
    images = images.to(next(model.parameters()).dtype)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes, before = [module.training for module in model.modules()], images.clone()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    check_model(model, images, 10, "model")
    check_model(model, images[:1], 10, "model")  # one image is enough
    assert torch.equal(images, before)
    assert images.grad is None
    assert not images.requires_grad
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in parameters] == [False] + [True] * (len(parameters) - 1)
    assert all(parameter.grad is None for parameter in parameters)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def dropout_within() -> nn.Module:
    """Random between two layers that are not."""
    return Function(lambda one, two, x: two(F.dropout(one(x))), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))


def hooked() -> nn.Module:
    model = network(nn.Conv2d(4, 4, 1))
    model[0][1].register_forward_pre_hook(lambda module, args: (args[0] + torch.randn_like(args[0]),))
    return model


def scripted() -> nn.Module:
    return torch.jit.trace(network(Noise()).eval(), torch.rand(1, 3, 16, 16), check_trace=False)


def batch_statistics() -> nn.Module:
    return Function(lambda x: F.batch_norm(x, None, None, training=True))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


LAYER = nn.Linear(10, 10)  # in no list of modules: nothing freezes it
RANDOM = "random in eval: layer "
MIXES = "mixes examples: layer "
TWICE = "cannot be differentiated twice .*"
FLAT = "its logits do not depend differentiably on the pixels"
REFUSED = [
    (lambda: network(nn.BatchNorm2d(4), nn.ReLU(), Noise()), RANDOM + r"0\.3 \(Noise\)"),
    (lambda: network(Function(lambda x: x.add_(torch.randn_like(x)))), RANDOM + r"0\.1 \(Function\)"),
    (lambda: network(nn.ReLU(inplace=True), dropout_within()), RANDOM + r"0\.2 \(Function\)"),
    (lambda: ManyKinds(Noise()), RANDOM + r"last \(Noise\)"),
    (lambda: Function(lambda net, x: net(x + torch.rand_like(x)), network()), "random .* the model's own forward"),
    (lambda: Function(lambda net, x: net(x.sub_(0.5)), network(Noise())), RANDOM + r".* \(Noise\)"),
    (hooked, RANDOM + r"0\.1 \(Conv2d\)"),
    (scripted, "random in eval: .* gives two answers"),
    (lambda: network(nn.BatchNorm2d(4, track_running_stats=False)), MIXES + r"0\.1 \(BatchNorm2d\)"),
    (lambda: ManyKinds(batch_statistics()), MIXES + r"last \(Function\)"),
    (lambda: SequenceFirst(Function(lambda x: x - x.mean(dim=1, keepdim=True))), MIXES + r"norm \(Function\)"),
    (lambda: network(Function(lambda x: x.cumsum(dim=0))), "mixes examples: some layer"),  # the first is by itself
    (lambda: network(end=Function(lambda z: z[:, :7])), "gives 7 logits, the data set has 10 classes"),
    (lambda: network(end=Function(lambda z: (z, z))), "gives a tuple; return the tensor of logits alone"),
    (lambda: network(end=Function(lambda z: z.round().long())), r"gives torch.int64 \(4, 10\)"),
    (lambda: network(end=Function(lambda z: z.squeeze())), r"gives torch.float32 \(10,\) for .* \(1, 3, 16, 16\)"),
    (lambda: network(end=nn.Linear(3, 10)), r"fails on images of shape \(4, 3, 16, 16\) \(RuntimeError: .*shapes"),
    (lambda: network(end=Function(lambda z: z / 0)), "its logits are not all finite"),
    (lambda: network(end=nn.Softmax(dim=1)), "gives probabilities, not logits"),
    (lambda: network(end=Function(lambda z: z.detach())), FLAT),
    (lambda: network(end=Function(lambda z: z.sign())), FLAT),
    (lambda: network(end=Function(lambda z: LAYER(z.detach()))), FLAT),
    (lambda: network(end=Function(torch.inference_mode()(lambda z: z * 2))), FLAT),
    (lambda: network(end=Function(Once.apply)), TWICE + "once_differentiable"),
    (lambda: network(nn.Hardsigmoid()), TWICE + "hardsigmoid_backward"),  # of MobileNetV3 and EfficientNet's kin
    (lambda: network(nn.ReLU()), TWICE + "inplace"),  # the second overwrites what the first one's derivative needs
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of torch.jit, as some files still need it
def test_a_bad_model_is_refused_in_one_line_and_the_layer_named(make, message, images):
    model = make()
    before = [(module.training, len(module._forward_pre_hooks)) for module in model.modules()]
    with pytest.raises(UserError, match=f"user: {message}") as error:
        check_model(model, images, 10, "user")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
    assert [(module.training, len(module._forward_pre_hooks)) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_images_that_are_not_pixels_are_refused(images):
    for wrong, shown in (
        (images * 255, "from 0.* to 255"),
        (images - 0.5, "from -0.5"),
        (images.where(images > 0.5, torch.nan), "from nan to nan"),
        ((images > 0.5).byte(), "uint8"),
    ):
        with pytest.raises(UserError, match=rf"user: the images are .*{shown}.*in \[0, 1\]"):
            check_model(network(), wrong, 10, "user")
