"""The checks a model passes before it is measured: good models of many kinds do, each kind of bad one is named."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature.estimate import estimate_curvature
from curvature.self_check import check_model
from utils.errors import UserError


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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
    """Attention over rows of pixels with the batch second, as torch's default has it."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.attention, self.norm, self.head = nn.MultiheadAttention(48, 2), norm, nn.Linear(48, 10)

    def forward(self, x):
        x = x.permute(2, 0, 1, 3).flatten(2)  # (rows, N, 48)
        return self.head(self.norm(self.attention(x, x, x)[0]).mean(dim=0))


GOOD = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "in place": lambda: network(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)),
    "dropout and group norm": lambda: network(nn.Dropout(), nn.GroupNorm(2, 4)),
    "batch norm": lambda: network(nn.BatchNorm2d(4)),
    "changes its input": lambda: Function(lambda net, x: net(x.sub_(0.5)), network()),
    "normalizes": lambda: nn.Sequential(torchvision.transforms.Normalize([0.5] * 3, [0.2] * 3), network()),
    "log probabilities": lambda: network(end=nn.LogSoftmax(dim=1)),
    "logits of sum zero": lambda: network(end=Function(lambda z: z - z.mean(dim=1, keepdim=True))),
    "many kinds of values": lambda: ManyKinds(nn.Identity()),
    "sequence first": lambda: SequenceFirst(nn.LayerNorm(48)),
    "float64": lambda: network().double(),
    "bfloat16": lambda: network().bfloat16(),
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
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_model_that_is_sure_of_its_answers_passes(images):
    """Its cross-entropy may be flat to the last digit, its logits are not."""
    model = network(end=nn.LogSoftmax(dim=1))
    with torch.no_grad():
        model[3].bias[3] = 1000
    assert not estimate_curvature(model, images, torch.full((4,), 3)).gradient_norm.any()
    check_model(model, images, 10, "model")


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class SkippedAtRandom(nn.Conv2d):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x) if self.calls % 2 else x


def dropout_within() -> nn.Module:
    """Random between two layers that are not."""
    return Function(lambda one, two, x: two(F.dropout(one(x))), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (lambda: network(nn.BatchNorm2d(4), nn.ReLU(), Noise()), r"layer 0\.3 \(Noise\)"),
        (lambda: network(Function(lambda x: x.add_(torch.randn_like(x)))), r"layer 0\.1 \(Function\)"),
        (lambda: network(nn.ReLU(inplace=True), dropout_within()), r"layer 0\.2 \(Function\)"),
        (lambda: network(SkippedAtRandom(4, 4, 1)), r"layer 0\.1 \(SkippedAtRandom\)"),
        (lambda: ManyKinds(Noise()), r"layer last \(Noise\)"),
        (lambda: network(Function(lambda f, x: x + f(), Function(lambda: torch.randn(1)))), r"layer 0\.1\.inner\.0 "),
        (
            lambda: Function(lambda net, x: net(x + torch.rand_like(x)), network()),
            r"the model's own forward \(Function\)",
        ),
    ],
)
def test_a_random_model_is_refused_and_the_layer_named(model, layer, images):
    model = model()
    with pytest.raises(UserError, match=f"user: random in eval: {layer}.*gives two answers to the same input"):
        check_model(model, images, 10, "user")
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")  # of torch.jit, as some files still need it
def test_random_behind_hooks_or_compiled(images):
    hooked = network(nn.Conv2d(4, 4, 1))
    hooked[0][1].register_forward_pre_hook(lambda module, args: (args[0] + torch.randn_like(args[0]),))
    with pytest.raises(UserError, match=r"layer 0\.1 \(Conv2d\)"):
        check_model(hooked, images, 10, "user")
    assert len(hooked[0][1]._forward_pre_hooks) == 1
    scripted = torch.jit.trace(network(Noise()).eval(), images, check_trace=False)
    with pytest.raises(UserError, match=r"random in eval: .* gives two answers"):
        check_model(scripted, images, 10, "user")


def test_an_answer_that_differs_only_the_first_time_names_no_wrong_layer(images):
    factors = iter([2, *[1] * 100])
    with pytest.raises(UserError, match="random in eval: some layer"):
        check_model(network(Function(lambda x: x * next(factors))), images, 10, "user")


def batch_statistics() -> nn.Module:
    return Function(lambda x: F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize(
    ("model", "layer"),
    [
        (lambda: network(nn.BatchNorm2d(4, track_running_stats=False)), r"layer 0\.1 \(BatchNorm2d\)"),
        (lambda: network(nn.ReLU(inplace=True), batch_statistics()), r"layer 0\.2 \(Function\)"),
        (lambda: ManyKinds(batch_statistics()), r"layer last \(Function\)"),
        (lambda: SequenceFirst(Function(lambda x: x - x.mean(dim=1, keepdim=True))), r"layer norm \(Function\)"),
        (lambda: nn.Sequential(Function(lambda x: x - x.mean()), network()), r"layer 0 \(Function\)"),
        (lambda: network(Function(lambda x: x.cumsum(dim=0))), "some layer"),  # the first image is by itself
    ],
)
def test_a_model_that_mixes_examples_is_refused_and_the_layer_named(model, layer, images):
    with pytest.raises(UserError, match=f"user: mixes examples: {layer} gives an image alone another answer"):
        check_model(model(), images, 10, "user")


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda x: x * 255, "from 0.* to 255"),
        (lambda x: x - 0.5, "from -0.5"),
        (lambda x: x.where(x > 0.5, torch.nan), "from nan to nan"),
        (lambda x: x.where(x > 0.5, torch.inf), "to inf"),
        (lambda x: (x > 0.5).byte(), "uint8"),
    ],
)
def test_images_that_are_not_pixels_are_refused(change, shown, images):
    with pytest.raises(UserError, match=rf"user: the images are .*{shown}.*in \[0, 1\]"):
        check_model(network(), change(images), 10, "user")


FLAT = "its logits do not depend differentiably on the pixels"


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (Function(lambda z: z[:, :7]), "gives 7 logits, the data set has 10 classes"),
        (Function(lambda z: (z, z)), "gives a tuple; return the tensor of logits alone"),
        (Function(lambda z: z[:, :, None, None]), r"gives torch.float32 \(4, 10, 1, 1\) .* logits \(4, 10\)"),
        (Function(lambda z: z.argmax(dim=1)), r"gives torch.int64 \(4,\)"),
        (Function(lambda z: z.round().long()), r"gives torch.int64 \(4, 10\)"),
        (Function(lambda z: z.squeeze()), r"gives torch.float32 \(10,\) for images of shape \(1, 3, 16, 16\)"),
        (Function(lambda z: z / 0), "its logits are not all finite"),
        (nn.Softmax(dim=1), "gives probabilities, not logits"),
        (Function(lambda z: z.detach()), FLAT),
        (Function(lambda z: z.sign()), FLAT),
        (Function(lambda z: torch.ones_like(z)), FLAT),
        (Function(torch.no_grad()(lambda z: z * 2)), FLAT),
        (Function(torch.inference_mode()(lambda z: z * 2)), FLAT),
        (nn.Linear(3, 10), r"fails on images of shape \(4, 3, 16, 16\) \(RuntimeError: .*shapes"),
        (nn.BatchNorm1d(10, track_running_stats=False), r"fails on images of shape \(1, 3, 16, 16\)"),
    ],
)
def test_other_than_differentiable_logits_are_refused(end, message, images):
    with pytest.raises(UserError, match=f"user: {message}") as error:
        check_model(network(end=end), images, 10, "user")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: network(end=Function(Once.apply)), "once_differentiable"),
        (lambda: network(nn.Hardsigmoid()), "hardsigmoid_backward"),  # of MobileNetV3 and EfficientNet's kin
        (lambda: network(nn.ReLU()), "inplace"),  # the second ReLU overwrites what the first one's derivative needs
    ],
)
def test_a_model_that_cannot_be_differentiated_twice_is_refused(model, reason, images):
    with pytest.raises(UserError, match=f"cannot be differentiated twice .*{reason}"):
        check_model(model(), images, 10, "user")


def test_fused_attention_is_replaced_by_one_that_can(images):
    model = torchvision.models.VisionTransformer(16, 4, 2, 2, 16, 32, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision starts it at zero: constant logits
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        check_model(model, images, 10, "user")
