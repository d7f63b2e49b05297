"""The layers against closed forms and dense operators."""

import copy
import math
from functools import partial

import pytest
import torch
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode

from models.layers import BatchNorm2d, CenteredSoftplus, Conv2d, LipschitzBatchNorm2d, SpectralNormConv2d


def dense_matrix(function, shape: tuple[int, ...]) -> torch.Tensor:
    """The matrix of a linear function on tensors of the given shape (without batch): the identity pushed through."""
    size = math.prod(shape)
    return function(torch.eye(size, dtype=torch.float64).reshape(size, *shape)).reshape(size, -1).T


def derivatives(layer, x: torch.Tensor, parameters=()) -> tuple:
    """Output and gradients of a layer at x; then of penalties on its gradient by x alone, and by x and parameters."""
    at = x.clone().requires_grad_()
    wanted = [at, *parameters]
    y = layer(at)
    (gradient,) = grad(y.pow(3).sum(), at, create_graph=True)
    by_penalty = grad(y.sum() + gradient.square().sum(), wanted)
    first = grad(layer(at).pow(3).sum(), wanted, create_graph=True)
    by_all = grad(sum(g.square().sum() for g in first), wanted)
    return y, gradient, by_penalty, first, by_all


def spectral_conv(*arguments, **keywords) -> SpectralNormConv2d:
    torch.manual_seed(0)
    return SpectralNormConv2d(*arguments, **keywords, dtype=torch.float64)


# of the convolutions in the nets, with even and odd sizes, and some outside them
geometries = pytest.mark.parametrize(
    ("kernel", "stride", "padding", "size"),
    [
        (3, 1, 1, 8),
        (3, 2, 1, 8),
        (3, 2, 1, 7),
        (1, 2, 0, 8),
        (1, 2, 0, 7),
        (5, 3, 2, 10),
        ((3, 1), (2, 1), (1, 0), (9, 6)),
    ],
)


@geometries
def test_spectral_norm_is_that_of_the_dense_operator(kernel, stride, padding, size):
    conv = spectral_conv(3, 4, kernel, stride=stride, padding=padding, bias=False, input_size=size)
    fresh = conv.eval().spectral_norm()
    # 600 steps: the gap to the second singular value is small for some, and the error falls by its square
    conv.power_iteration(600)
    matrix = dense_matrix(conv._operator, (3, *conv.input_size))
    torch.testing.assert_close(dense_matrix(conv._adjoint, tuple(conv.u.shape[1:])), matrix.T)
    true_norm = torch.linalg.matrix_norm(matrix, ord=2)
    assert fresh > 0.9 * true_norm
    torch.testing.assert_close(conv.eval().spectral_norm(), true_norm, rtol=1e-4, atol=0)
    normalized = dense_matrix(conv, (3, *conv.input_size))
    assert torch.linalg.matrix_norm(normalized, ord=2).item() == pytest.approx(1, rel=1e-4)


def test_spectral_norm_iterates_in_training_only():
    conv, expected = (spectral_conv(3, 4, 3, padding=1, input_size=8) for _ in range(2))
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    first = conv.eval()(x)
    assert torch.equal(first, conv(x))
    assert torch.equal(conv.u, expected.u)
    outputs = [conv.train()(x), conv(x), conv.eval()(x)]
    expected.power_iteration(2)  # one per forward, the same as the initial ones
    torch.testing.assert_close((conv.u, conv.v), (expected.u, expected.v))
    sum(y.sum() for y in outputs).backward()
    assert conv.weight.grad.isfinite().all()
    torch.nn.init.zeros_(conv.weight)
    assert conv.train()(x).isfinite().all()  # no 0 / 0


def test_the_spectral_norms_derivative_is_u_conv_v_and_needs_no_convolution():
    """On a GPU a backward pass would convolve in TF32, whatever the forward pass was told."""
    convolutions = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            convolutions.extend([func] if "convolution" in str(func) else [])
            return func(*args, **(kwargs or {}))

    conv = spectral_conv(2, 2, 3, stride=2, padding=1, bias=False, input_size=4).train()
    with Recorder():
        sigma = conv.spectral_norm()
        assert len(convolutions) == 3
        sigma.backward()
    assert len(convolutions) == 3
    (expected,) = grad((conv.u * conv._operator(conv.v)).sum(), conv.weight)
    torch.testing.assert_close(conv.weight.grad, expected)


def test_what_the_layers_cannot_do_is_refused():
    x = torch.zeros(1, 2, 1, 1)
    for refused, reason in (
        (lambda: SpectralNormConv2d(3, 4, 3, padding=1, padding_mode="reflect", input_size=8), "reflect"),
        (lambda: SpectralNormConv2d(3, 4, 3, padding="same", input_size=8), "same"),
        (lambda: SpectralNormConv2d(3, 4, (5, 1), input_size=4), "does not fit"),
        (lambda: CenteredSoftplus(0), "positive"),
        (lambda: LipschitzBatchNorm2d(2, init_gamma=-1), "positive"),
        (lambda: LipschitzBatchNorm2d(2)(x), "more than 1 value per channel"),
    ):
        with pytest.raises(ValueError, match=reason):
            refused()


def test_centered_softplus_has_its_closed_form_derivatives():
    x = torch.linspace(-3, 3, 101, dtype=torch.float64, requires_grad=True)  # |b x| stays below 20
    for init_beta in (0.3, 5.0):
        act = CenteredSoftplus(init_beta).double()
        b = act.log_beta.exp().detach() + 1e-3
        y = act(x)
        torch.testing.assert_close(y, (torch.log1p((b * x).exp()) - math.log(2)) / b)
        (first,) = grad(y.sum(), x, create_graph=True)
        (second,) = grad(first.sum(), x)
        torch.testing.assert_close(first, torch.sigmoid(b * x))
        torch.testing.assert_close(second, b * torch.sigmoid(b * x) * (1 - torch.sigmoid(b * x)))
    torch.testing.assert_close(CenteredSoftplus(1e5).double()(x), x.relu(), rtol=0, atol=1e-5)
    assert CenteredSoftplus()(x.bfloat16()).dtype == torch.float32  # as under autocast


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 100.0])
def test_batchnorm_in_eval_mode_is_torchs_times_the_clip(gamma, affine):
    norm = LipschitzBatchNorm2d(3, init_gamma=gamma, affine=affine).double().eval()
    if affine:
        torch.nn.init.constant_(norm.weight, -1.0)
    norm.running_var.copy_(torch.tensor([0.01, 4.0, 0.25], dtype=torch.float64))
    norm.running_mean.copy_(torch.tensor([1.0, -2.0, 0.5]))
    plain = torch.nn.BatchNorm2d(3, affine=affine).double().eval()
    plain.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "log_gamma"})
    own = 1 / math.sqrt(0.01 + norm.eps)  # about 10: a gamma of 100 does not count
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(norm(x), plain(x) * min(1, gamma / own))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize(
    "build", [BatchNorm2d, *(partial(LipschitzBatchNorm2d, init_gamma=0.3, affine=affine) for affine in (False, True))]
)
def test_batchnorm_in_training_is_torchs_in_every_derivative(build, momentum):
    """Times the clip, by the statistics before the batch; with a weight of 0 too."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 2, 2, dtype=torch.float64) * 3 + 1
    norm, plain = build(3).double(), torch.nn.BatchNorm2d(3, momentum=momentum)
    norm.momentum = momentum
    norm.running_var.copy_(torch.tensor([0.04, 1.0, 2.0]))
    if norm.affine:
        norm.weight.data.copy_(torch.tensor([0.0, 2.0, -0.3]))
    twin = copy.deepcopy(norm)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        setattr(plain, name, getattr(twin, name))

    def expected(x):
        return (twin.clip() if build is not BatchNorm2d else 1) * plain(x)

    ours, theirs = derivatives(norm, x, list(norm.parameters())), derivatives(expected, x, list(twin.parameters()))
    torch.testing.assert_close(ours, theirs)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(norm.get_buffer(name), buffer)


def test_softplus_in_training_is_torchs_in_every_derivative():
    """Of its input and of beta, when the gradient of one or of both is differentiated itself."""
    x = torch.linspace(-3, 30, 40, dtype=torch.float64)
    layers = [CenteredSoftplus(2.0).double().train(training) for training in (True, False)]
    torch.testing.assert_close(*(derivatives(layer, x, [layer.log_beta]) for layer in layers))


@geometries
def test_convolution_in_training_is_torchs_in_every_derivative(kernel, stride, padding, size):
    """Its output may be changed in place, too."""
    x = torch.randn(2, 3, *([size] * 2 if isinstance(size, int) else size), dtype=torch.float64)
    for bias in (True, False):
        ours, theirs = (
            kind(3, 4, kernel, stride=stride, padding=padding, bias=bias).double() for kind in (Conv2d, torch.nn.Conv2d)
        )
        theirs.load_state_dict(ours.state_dict())
        found, expected = (
            derivatives(lambda x, conv=conv: conv(x).mul_(2), x, list(conv.parameters())) for conv in (ours, theirs)
        )
        torch.testing.assert_close(found, expected)


def test_convolutions_of_other_kinds_are_torchs_in_training_too():
    x = torch.rand(1, 2, 6, 6)
    for other in ({"padding_mode": "reflect"}, {"dilation": 2}, {"groups": 2}, {"padding": "same"}):
        conv = Conv2d(2, 2, 3, **{"padding": 1} | other)
        torch.testing.assert_close((conv(x), conv(x[0])), (conv.eval()(x), conv(x[0])))


def test_an_input_gradient_leaves_the_weights_gradient_out():
    """As autograd's own does: with it, a gradient-norm step would cost a seventh pass of the convolutions."""
    conv = Conv2d(3, 4, 3, padding=1)
    x = torch.rand(2, 3, 8, 8, requires_grad=True)
    y = conv(x).square().sum()
    with torch.profiler.profile() as profile:
        (gradient,) = grad(y, x, create_graph=True)
        y + gradient.square().sum()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::convolution_backward"] == 1
    with torch.profiler.profile() as profile:
        conv(x.detach()).square().sum().backward()  # only the weight's and the bias's, together
    assert {event.key: event.count for event in profile.key_averages()}["aten::convolution_backward"] == 1
