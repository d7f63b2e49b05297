"""Eigenvalues and traces of a batch of symmetric operators H, from products H v alone.

One product of the batch serves every example, and every example has its own Krylov space and its own convergence. Those
that have converged are taken out of the batch. Everything is relative: H and 1e-12 H take the same steps.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.derivatives import InputHessian
from utils.numerics import normalize, norms

ZERO_BESIDE_FIRST = 1e-3  # an eigenvalue this small beside the first need not be known to its own digits


@dataclass(frozen=True)
class Eigenvalues:
    """The k eigenvalues of largest magnitude of N operators, the largest first; NaN where an operator is not finite."""

    values: Tensor  # (N, k) signed
    residuals: Tensor  # (N, k) ||H u - lambda u|| / |lambda|, u the eigenvector found for lambda; 0 where H = 0
    products: Tensor  # (N,) products H v spent

    @classmethod
    def none_yet(cls, num_examples: int, k: int) -> "Eigenvalues":
        values = torch.full((num_examples, k), torch.nan, dtype=torch.float64)
        return cls(values, values.clone(), torch.zeros(num_examples, dtype=torch.int64))

    def update(self, rows: Tensor, values: Tensor, residuals: Tensor, tol: float) -> Tensor:
        """Note the (n, k) results of the rows still at work after one more product; which have not converged."""
        self.values[rows], self.residuals[rows] = values, residuals
        self.products[rows] += 1
        return (residuals > tol).any(dim=1)  # False for NaN: more products will not mend it

    def to(self, like: Tensor) -> "Eigenvalues":
        return Eigenvalues(self.values.to(like), self.residuals.to(like), self.products.to(like.device))


def power_method(hessian: InputHessian, start: Tensor, num_iterations: int, tol: float, k: int = 1) -> Eigenvalues:
    """The eigenvalue of largest magnitude by power iteration u <- H u / ||H u||, the paper's method.

    Its magnitude is ||H u||, which is at most ||H|| and closer to it than the Rayleigh quotient |u'Hu|: an indefinite H
    (eigenvalues of both signs) can make that far too small. Its sign is that of u'Hu.

    Args:
        start: (N, ...), the first u up to scale.
        num_iterations: the most products to spend on an example.
        tol: the residual at which an example is done.
        k: must be 1, or ValueError is raised.
    """
    if k != 1:
        raise ValueError("the power method finds one eigenvalue; use method lanczos for more")
    found, rows = Eigenvalues.none_yet(len(start), 1), torch.arange(len(start))
    u = normalize(start.flatten(1))
    for m in range(num_iterations):
        product = hessian.product(u.view(-1, *start.shape[1:])).flatten(1)
        norm = norms(product)
        value = torch.where((u * product).sum(dim=1) < 0, -norm, norm)
        residual = norms(product - value[:, None] * u) / torch.where(norm > 0, norm, 1)
        residual = torch.where(norm > 0, residual.clamp_min(10 * getattr(hessian, "eps", 0.0)), residual)
        go_on = found.update(rows, *(x.cpu().double()[:, None] for x in (value, residual)), tol)
        if m + 1 == num_iterations or not go_on.any():
            break
        u = normalize(product)
        if not go_on.all():
            on_device = go_on.to(u.device)
            hessian.restrict(on_device)
            u, rows = u[on_device], rows[go_on]
    return found.to(start)


def lanczos(hessian: InputHessian, start: Tensor, num_iterations: int, tol: float, k: int = 1) -> Eigenvalues:
    """The k eigenvalues of largest magnitude by the Lanczos method with full reorthogonalization.

    After m products the basis Q of the Krylov space span(q, H q, ..., H^(m-1) q) has Q'HQ = T, tridiagonal, and
    H Q = Q T + beta q_(m+1) e_m'. An eigenpair (theta, s) of T gives u = Q s with residual ||H u - theta u|| =
    beta |s_m|: Parlett, "The Symmetric Eigenvalue Problem", chapter 13. These are the eigenvalues reported, except that
    the first one's magnitude is the norm of T with the row beta e_m' below it. That is the largest ||H u|| of all unit
    vectors in the Krylov space: at most ||H||, and never less than the power method finds there.

    A Krylov space holds equal eigenvalues once. Where it is exhausted, and more than one eigenvalue is wanted, the
    method restarts, and finds a repeated eigenvalue again. Until then it is reported once.

    Args:
        start: (N, ...), the first q up to scale.
        num_iterations: the most products to spend on an example.
        tol: the residual at which an eigenvalue is good; an example is done when its k are, twice in succession.
        k: how many eigenvalues, no more than H has, or ValueError is raised.
    """
    shape, dimension = start.shape[1:], start[0].numel()
    if k > dimension:
        raise ValueError(f"asked for {k} eigenvalues of a Hessian that has {dimension}")
    steps = min(num_iterations, dimension)
    eps = max(torch.finfo(start.dtype).eps, getattr(hessian, "eps", 0.0))
    found, rows = Eigenvalues.none_yet(len(start), k), torch.arange(len(start))
    basis = start.new_empty(len(start), min(steps, 16), dimension)  # row m is q_(m+1); grows when it is full
    tridiagonal = torch.zeros(len(start), 0, 0, dtype=torch.float64)
    scale = start.new_zeros(len(start))  # the largest ||H q|| so far
    last_beta = torch.zeros(len(start), dtype=torch.float64)
    was_small = torch.zeros(len(start), dtype=torch.bool)  # the residual, one product ago
    restarted = was_small.clone()
    q = normalize(start.flatten(1))
    for m in range(steps):
        if m == basis.shape[1]:
            basis = torch.cat([basis, torch.empty_like(basis)], dim=1)
        basis[:, m] = q
        product = hessian.product(q.view(-1, *shape)).flatten(1)
        alpha, scale = (product * q).sum(dim=1), torch.maximum(scale, norms(product))
        rest = orthogonalize(product, basis[:, : m + 1])
        beta = norms(rest)
        exhausted = beta <= 10 * eps * scale  # rounding is all that is left
        beta = torch.where(exhausted, 0, beta)

        tridiagonal = F.pad(tridiagonal, (0, 1, 0, 1))
        tridiagonal[:, m, m] = alpha.cpu().double()
        if m > 0:
            tridiagonal[:, m, m - 1] = tridiagonal[:, m - 1, m] = last_beta
        last_beta = beta.cpu().double()
        is_small = ~found.update(rows, *ritz_values(tridiagonal, last_beta, k, 10 * eps), tol)
        # One small residual may be that of a lesser eigenvector which the start leans to, seen before the top one has
        # grown out of the rounding; it does not last. An exhausted space has no more to show, except that of several
        # eigenvalues one may be there once more in another space.
        no_rest = last_beta == 0
        done = is_small & torch.where(no_rest, restarted | (k == 1), was_small)
        go_on = ~(done | ~last_beta.isfinite())
        was_small, restarted = is_small & ~no_rest, restarted | no_rest
        if m + 1 == steps or not go_on.any():
            break
        q = rest / torch.where(exhausted, 1, beta)[:, None]
        if exhausted.any():
            generator = torch.Generator().manual_seed(m)
            fresh = torch.randn(dimension, generator=generator, dtype=q.dtype).to(q.device).expand_as(q)
            fresh = normalize(orthogonalize(fresh, basis[:, : m + 1]))
            q = torch.where(exhausted[:, None], fresh, q)
        if not go_on.all():
            on_device = go_on.to(q.device)
            hessian.restrict(on_device)
            q, scale, basis = q[on_device], scale[on_device], basis[:, : m + 1][on_device]
            rows, tridiagonal, last_beta = rows[go_on], tridiagonal[go_on], last_beta[go_on]
            was_small, restarted = was_small[go_on], restarted[go_on]
    return found.to(start)


def orthogonalize(x: Tensor, basis: Tensor) -> Tensor:
    """(N, D) less its projection on the m orthonormal rows of basis (N, m, D); done twice, which is enough."""
    for _ in range(2):
        coefficients = torch.bmm(basis, x[:, :, None])
        x = x - torch.bmm(basis.transpose(1, 2), coefficients)[:, :, 0]
    return x


def ritz_values(tridiagonal: Tensor, beta: Tensor, k: int, rounding: float) -> tuple[Tensor, Tensor]:
    """(N, k) eigenvalues and relative residuals after m products, from T (N, m, m) and the last beta (N,).

    No residual is said to be below ``rounding``, that of the products: T would not show it. NaN where T is not finite;
    where m < k, NaN with an infinite residual for those not found yet.
    """
    finite = tridiagonal.isfinite().flatten(1).all(dim=1) & beta.isfinite()
    tridiagonal = torch.where(finite[:, None, None], tridiagonal, 0)
    beta = torch.where(finite, beta, 0)
    theta, s = torch.linalg.eigh(tridiagonal)
    order = theta.abs().argsort(dim=1, descending=True)[:, :k]
    value = theta.gather(1, order)
    residual = beta[:, None] * s[:, -1].abs().gather(1, order)

    last_row = F.pad(beta[:, None, None], (tridiagonal.shape[1] - 1, 0))
    norm = torch.linalg.matrix_norm(torch.cat([tridiagonal, last_row], dim=1), ord=2)
    residual[:, 0] = torch.hypot(residual[:, 0], norm - value[:, 0].abs())  # of the value reported
    value[:, 0] = torch.where(value[:, 0] < 0, -norm, norm)

    # relative to each eigenvalue's own magnitude, but what is zero beside the first can only be told to be that
    scale = torch.maximum(value.abs(), ZERO_BESIDE_FIRST * norm[:, None])
    residual = torch.where(scale > 0, (residual / scale).clamp_min(rounding), 0)
    missing = (0, k - value.shape[1])
    value, residual = F.pad(value, missing, value=torch.nan), F.pad(residual, missing, value=torch.inf)
    value[~finite] = residual[~finite] = torch.nan
    return value, residual


class ProbeEstimates(NamedTuple):
    """Means over random signs v and their standard errors: (N,) each."""

    trace: Tensor  # of v'Hv (Hutchinson, 1990)
    trace_error: Tensor
    curvature_score: Tensor  # of ||Hv||, which scores memorization (Garg and Roy, CVPR 2023)
    curvature_score_error: Tensor
    frobenius_norm: Tensor  # the root of the mean of ||Hv||^2, whose expectation is the sum of H's squared entries
    frobenius_norm_error: Tensor  # to first order: that of the mean over twice the root


def probe(hessian: InputHessian, num_probes: int, draw: Callable[[], Tensor]) -> ProbeEstimates:
    """What products with random signs tell of H.

    Args:
        num_probes: products to spend on each; 2 or more for standard errors, which otherwise are NaN.
        draw: gives (N, ...) entries of +1 or -1.
    """

    def mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
        error = samples.std(dim=0) / num_probes**0.5 if num_probes > 1 else torch.full_like(samples[0], torch.nan)
        return samples.mean(dim=0), error

    signs = (draw() for _ in range(num_probes))
    products = ((v, hessian.product(v)) for v in signs)
    forms, lengths = zip(*(((v * hv).flatten(1).sum(dim=1), norms(hv)) for v, hv in products), strict=True)
    lengths = torch.stack(lengths)
    scale = lengths.amax(dim=0)  # squares of very small numbers would be lost
    scale = torch.where(scale > 0, scale, 1)
    mean, error = mean_and_error((lengths / scale).square())
    root = mean.sqrt()
    frobenius_error = scale * error / torch.where(root > 0, 2 * root, 1)
    return ProbeEstimates(*mean_and_error(torch.stack(forms)), *mean_and_error(lengths), scale * root, frobenius_error)


methods = {"lanczos": lanczos, "power": power_method}
