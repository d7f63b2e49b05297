"""BatchNorm, convolution and centered softplus in training, with both derivatives written out.

A gradient-norm penalty differentiates every layer twice. By autograd, BatchNorm alone would take some thirty passes
over the activations; here each layer takes a few. A penalty on the Hessian differentiates a third time: while a second
derivative is recorded by autograd, it is made of operations and functions that can be differentiated again.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

CHANNELWISE = (-1, 1, 1)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """A context without autocast and TF32."""
    tf32 = device.type == "cuda" and torch.backends.cudnn.allow_tf32
    available = torch.amp.is_autocast_available(device.type)
    try:
        if tf32:
            torch.backends.cudnn.allow_tf32 = False
        with torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext():
            yield
    finally:
        if tf32:
            torch.backends.cudnn.allow_tf32 = True


class ScaledBatchNorm(Function):
    """y = scale * xhat, xhat = (x - mean) / sqrt(var + eps) with the batch's own mean and variance per channel.

    x and y are (N, C, H, W), scale is a scalar tensor. Updates the running statistics. Differentiable any number of
    times.
    """

    @staticmethod
    def forward(ctx, x, scale, running_mean, running_var, momentum, eps):
        weight = scale.repeat(x.shape[1])
        y, mean, inv_std = torch.native_batch_norm(x, weight, None, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, scale, mean, inv_std)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, g):
        x, scale, mean, inv_std = ctx.saved_tensors
        dx, g_xhat = ScaledBatchNormBackward.apply(g, x, scale, mean, inv_std, ctx.eps)
        return dx, g_xhat.sum(), None, None, None, None


class AffineBatchNorm(Function):
    """weight * xhat + bias, both (C,). PyTorch's own, the same to the bit, cannot be differentiated three times."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        y, mean, inv_std = torch.native_batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps)
        ctx.save_for_backward(x, weight, mean, inv_std)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, g):
        x, weight, mean, inv_std = ctx.saved_tensors
        if not torch.is_grad_enabled():
            arguments = (weight, None, None, mean, inv_std, True, ctx.eps, ctx.needs_input_grad[:3])
            return *torch.ops.aten.native_batch_norm_backward(g, x, *arguments), None, None, None, None
        dx, g_xhat = ScaledBatchNormBackward.apply(g, x, mean.new_ones(()), mean, inv_std, ctx.eps)
        dx = (dx * weight.view(CHANNELWISE)).to(x.dtype)
        return dx, g_xhat, g.sum(dim=(0, 2, 3), dtype=mean.dtype), None, None, None, None


class ScaledBatchNormBackward(Function):
    """(g, x, scale) -> dx = scale / std * P g, and (C,) sums of g * xhat.

    P g = g - mean(g) - xhat mean(g xhat), symmetric, removes each channel's mean and its component along xhat.
    """

    @staticmethod
    def value(g, x, scale, mean, inv_std, eps):
        arguments = (scale.repeat(x.shape[1]), None, None, mean, inv_std, True, eps, [True, True, False])
        return torch.ops.aten.native_batch_norm_backward(g, x, *arguments)[:2]

    @staticmethod
    def forward(ctx, g, x, scale, mean, inv_std, eps):
        ctx.set_materialize_grads(False)
        dx, g_xhat = ScaledBatchNormBackward.value(g, x, scale, mean, inv_std, eps)
        ctx.save_for_backward(x, scale, mean, inv_std, dx, g_xhat)
        ctx.eps = eps
        return dx, g_xhat

    @staticmethod
    def backward(ctx, v, u):
        """Of <v, dx> + <u, g_xhat>. With M pixels per channel and S = sum(v dx),
        d<v, dx>/dx = -1/std * (S/M xhat + mean(g xhat) * scale/std P v + mean(v xhat) * dx)."""
        x, scale, mean, inv_std, dx, g_xhat = ctx.saved_tensors
        projected = ScaledBatchNormBackward.value
        if torch.is_grad_enabled():  # for a third derivative the projection and the statistics are functions of x
            projected = ScaledBatchNormBackward.apply
            var, mean = torch.var_mean(x.to(mean.dtype), dim=(0, 2, 3), correction=0)
            inv_std = (var + ctx.eps).rsqrt()
        grad_g = grad_x = grad_scale = None
        if v is not None:
            pixels = x.numel() // x.shape[1]
            grad_g, v_xhat = projected(v, x, scale, mean, inv_std, ctx.eps)
            v_dx = (v * dx).sum(dim=(0, 2, 3), dtype=mean.dtype)
            factors = (inv_std * v_dx, v_xhat, g_xhat)
            along_x, along_dx, along_grad_g = ((-inv_std / pixels * factor).view(CHANNELWISE) for factor in factors)
            grad_x = torch.addcmul(-along_x * mean.view(CHANNELWISE), x, along_x)
            grad_x = grad_x.addcmul_(dx, along_dx).addcmul_(grad_g, along_grad_g).to(x.dtype)
            grad_scale = v_dx.sum() / scale
        if u is not None:
            u = u.view(CHANNELWISE)
            xhat = ((x - mean.view(CHANNELWISE)) * inv_std.view(CHANNELWISE)).to(x.dtype)
            grad_g = u * xhat if grad_g is None else grad_g + u * xhat
            grad_x = u / scale * dx if grad_x is None else grad_x + u / scale * dx
        return grad_g, grad_x, grad_scale, None, None, None


class OfParameters(Function):
    """Zero, whose backward gives the parameters' gradients where these are to be differentiated themselves.

    A layer is a function of x, ``Joined`` with this one. A single function could not know when only the input gradient
    is asked for, and would spend passes on the others. ``gradients(g, wanted, x, *parameters)`` computes them. x comes
    in a list, so as to get no gradient from here.
    """

    @staticmethod
    def forward(ctx, gradients, shape, in_list, *parameters):
        ctx.save_for_backward(*in_list, *parameters)
        ctx.gradients = gradients
        return parameters[0].new_zeros(()).expand(shape)

    @staticmethod
    def backward(ctx, g):
        wanted = ctx.needs_input_grad[3:]
        gradients = ctx.gradients(g, wanted, *ctx.saved_tensors) if torch.is_grad_enabled() else [None] * len(wanted)
        return None, None, None, *gradients


class Joined(Function):
    """The first of two tensors; the gradient goes to both."""

    @staticmethod
    def forward(ctx, y, zero):
        ctx.mark_dirty(y)  # it is unchanged, but others could not change a view of it in place
        return y

    @staticmethod
    def backward(ctx, g):
        return g, g


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride, padding) -> Tensor:
    """``F.conv2d`` without groups and dilation, whose second derivative is made of ordinary convolutions.

    For the weight's part, autograd convolves with a kernel as large as the image.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def gradients(g, wanted, x, weight, bias):
        return convolution_gradients(g, x, weight, stride, padding, (False, *wanted))[1:]

    y = ConvolutionOfInput.apply(x, weight, bias, stride, padding)
    return Joined.apply(y, OfParameters.apply(gradients, y.shape, [x], weight, bias))


def convolution_gradients(g, x, weight, stride, padding, wanted: tuple[bool, bool, bool]):
    """Gradients of <g, conv(x, weight) + bias>; None for those not wanted."""
    geometry = (stride, padding, [1, 1], False, [0, 0], 1)
    return torch.ops.aten.convolution_backward(g, x, weight, [len(weight)], *geometry, wanted)


class ConvolutionOfInput(Function):
    """conv(x, weight) + bias; where its gradient is to be differentiated, a function of x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.geometry = stride, padding
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *convolution_gradients(g, x, weight, *ctx.geometry, ctx.needs_input_grad[:3]), None, None
        dx = ConvolutionInputGradient.apply(g, x, weight, *ctx.geometry) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


class ConvolutionInputGradient(Function):
    """(g, weight) -> dx, linear in both; of x only the shape matters."""

    @staticmethod
    def forward(ctx, g, x, weight, stride, padding):
        ctx.save_for_backward(g, weight)
        ctx.geometry = stride, padding
        return convolution_gradients(g, x, weight, stride, padding, (True, False, False))[0]

    @staticmethod
    def backward(ctx, v):
        g, weight = ctx.saved_tensors
        grad_g = torch.conv2d(v, weight, None, *ctx.geometry)
        grad_weight = convolution_gradients(g, v, weight, *ctx.geometry, (False, True, False))[1]
        return grad_g, None, grad_weight, None, None


def centered_softplus(x: Tensor, b: Tensor) -> Tensor:
    """(softplus(b x) - log 2) / b elementwise, b a scalar tensor; softplus is the identity above 20."""

    def gradients(g, wanted, x, b):
        y = (F.softplus(b * x) - math.log(2)) / b
        return torch.autograd.grad(y, b, g, create_graph=True)

    return Joined.apply(SoftplusOfInput.apply(x, b), OfParameters.apply(gradients, x.shape, [x], b))


class SoftplusOfInput(Function):
    """The centered softplus; where its gradient is to be differentiated, a function of x alone."""

    @staticmethod
    def forward(ctx, x, b):
        by = F.softplus(b * x).sub_(math.log(2))
        ctx.save_for_backward(x, b, by)  # not y itself: some networks go on to change it in place
        return by / b

    @staticmethod
    def backward(ctx, g):
        x, b, by = ctx.saved_tensors
        if torch.is_grad_enabled():
            return SoftplusInputGradient.apply(g, x, b), None
        dx = SoftplusInputGradient.value(g, x, b)
        return dx, ((dx * x).sum() - (g * by).sum() / b) / b


class SoftplusInputGradient(Function):
    """(g, x, b) -> dx = g s with s = sigmoid(b x)."""

    @staticmethod
    def value(g, x, b):
        return torch.ops.aten.softplus_backward(g, b * x, 1, 20)

    @staticmethod
    def forward(ctx, g, x, b):
        ctx.save_for_backward(g, x, b)
        return SoftplusInputGradient.value(g, x, b)

    @staticmethod
    def backward(ctx, v):
        g, x, b = ctx.saved_tensors
        s = torch.sigmoid(bx := b * x)
        if s.dtype == torch.float64:  # elsewhere it is 1 from 20 on by itself
            s = s.masked_fill(bx > 20, 1)
        grad_x = torch.ops.aten.sigmoid_backward(g * v, s).mul_(b)  # g v s (1 - s) b
        return v * s, grad_x, (grad_x * x).sum() / b
