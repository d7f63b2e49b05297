"""The gradients of a training step as one CUDA graph: its hundreds of kernels are launched by a single call."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from utils.errors import UserError, one_line


class CapturedGradients:
    """gradients(images, labels, weight), which computes a loss and calls backward, captured on the fourth call
    with a batch of the same shape.

    What it returns on a replay is overwritten by the next. The first calls run as they are, on a stream of their own:
    libraries choose their kernels and buffers then. A batch of another shape than the captured one, or with another
    weight, such as an epoch's last, runs as it is, too. Nothing in gradients may wait for the GPU.

    Args:
        gradients: returns a dict of scalar tensors, and leaves each parameter's gradient in its grad, None before.
        model: whose parameters they are.
    """

    EAGER_CALLS = 3

    def __init__(self, gradients: Callable[[Tensor, Tensor, float], dict[str, Tensor]], model: nn.Module):
        self.gradients = gradients
        self.parameters = list(model.parameters())
        self.stream = torch.cuda.Stream()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.key = None
        self.eager_calls: Counter = Counter()

    def __call__(self, images: Tensor, labels: Tensor, weight: float) -> dict[str, Tensor]:
        key = (images.shape, images.dtype, weight)
        if self.graph is None and self.eager_calls[key] == self.EAGER_CALLS:
            self.capture(images, labels, weight)
            self.key = key
        if self.graph is not None and key == self.key:
            self.images.copy_(images)
            self.labels.copy_(labels)
            self.graph.replay()
            for parameter, grad in zip(self.parameters, self.grads, strict=True):
                parameter.grad = grad
            return self.terms
        self.eager_calls[key] += 1
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            terms = self.gradients(images, labels, weight)
        torch.cuda.current_stream().wait_stream(self.stream)
        return terms

    def capture(self, images: Tensor, labels: Tensor, weight: float) -> None:
        """Record the kernels, without running them; UserError if the step cannot be recorded."""
        self.images, self.labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.terms = self.gradients(self.images, self.labels, weight)
        except RuntimeError as error:
            raise UserError(f"--cuda-graph: this step cannot be captured ({one_line(error)}); leave it out") from error
        self.grads = [parameter.grad for parameter in self.parameters]
        self.graph = graph
