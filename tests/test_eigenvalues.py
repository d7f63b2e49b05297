"""The eigenvalue methods on dense symmetric operators, whose spectrum LAPACK knows."""

from functools import partial

import pytest
import torch

from curvature.eigenvalues import lanczos, methods, orthogonalize, power_method, probe


class Dense:
    """H v for a batch of dense symmetric matrices (N, D, D), counting the rows it multiplies."""

    def __init__(self, matrices: torch.Tensor):
        self.matrices, self.rows = matrices, 0

    def product(self, v):
        self.rows += len(v)
        return torch.einsum("nij,nj->ni", self.matrices, v.flatten(1)).view_as(v)

    def restrict(self, keep):
        self.matrices = self.matrices[keep]


def diagonal(*entries: float) -> Dense:
    return Dense(torch.diag(torch.tensor(entries, dtype=torch.float64))[None])


def random_symmetric(n: int, dimension: int) -> torch.Tensor:
    """Spectra that decay like those of input Hessians, with both signs."""
    generator = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(n, dimension, dimension, dtype=torch.float64, generator=generator))
    values = torch.randn(n, dimension, dtype=torch.float64, generator=generator) / torch.arange(1, dimension + 1)
    return (q * values[:, None]) @ q.mT


def start(n: int, dimension: int) -> torch.Tensor:
    return torch.randn(n, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def sorted_spectrum(matrices: torch.Tensor) -> torch.Tensor:
    """(N, D) eigenvalues, largest magnitude first."""
    values = torch.linalg.eigvalsh(matrices)
    return values.gather(1, values.abs().argsort(dim=1, descending=True))


@pytest.mark.parametrize("method", methods)
def test_against_the_dense_spectrum_in_the_end_and_after_every_number_of_products(method):
    matrices = random_symmetric(8, 40)
    spectrum = sorted_spectrum(matrices)
    found = methods[method](Dense(matrices), start(8, 40), 3000, 1e-7)
    assert (found.residuals <= 1e-7).all()
    # the error of an eigenvalue is at most the residual, near its square over the gap
    torch.testing.assert_close(found.values[:, 0], spectrum[:, 0], rtol=1e-9, atol=0)
    previous = torch.zeros(8, dtype=torch.float64)
    for m in range(1, 12):
        found = methods[method](Dense(matrices), start(8, 40), m, 0.0)
        value = found.values[:, 0]
        assert (value.abs() <= spectrum[:, 0].abs() * (1 + 1e-12)).all()
        assert (value.abs() >= previous * (1 - 1e-12)).all()  # more products, no worse
        distance = (spectrum - value[:, None]).abs().amin(dim=1)
        assert (distance <= found.residuals[:, 0] * value.abs() * (1 + 1e-9) + 1e-15).all()
        assert (found.products == m).all()
        previous = value.abs()


def test_the_residual_is_that_of_the_value_reported():
    """By hand after two products, where the norm reported and the Ritz value of its vector still differ."""
    h = diagonal(3, -2, 1, 0.5).matrices[0]
    q = torch.ones(4, 1, dtype=torch.float64) / 2
    basis, _ = torch.linalg.qr(torch.cat([q, h @ q], dim=1))
    theta, s = torch.linalg.eigh(basis.T @ h @ basis)
    top = theta.abs().argmax()
    norm = torch.linalg.matrix_norm(h @ basis, ord=2) * theta[top].sign()
    u = basis @ s[:, top]
    found = lanczos(Dense(h[None]), q.T, 2, 0.0)
    assert found.values.item() == pytest.approx(norm.item(), rel=1e-12)
    assert found.residuals.item() == pytest.approx(((h @ u - norm * u).norm() / norm.abs()).item(), rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orthogonal_to_rounding_also_where_little_is_left(dtype):
    """x almost within the span: one pass would leave a part of it of the size of its rounding over what is left."""
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(dtype).eps
    basis = torch.linalg.qr(torch.randn(1, 200, 30, dtype=dtype, generator=generator)).Q.mT
    rest = orthogonalize(basis.sum(dim=1) + 100 * eps * torch.randn(1, 200, dtype=dtype, generator=generator), basis)
    assert (basis[0] @ rest[0]).abs().max() < 4 * eps * rest.norm()


def test_lanczos_is_never_behind_power():
    """From the same start, after the same products: its Krylov space holds the power method's vector."""
    matrices = random_symmetric(16, 40)
    truth = sorted_spectrum(matrices)[:, 0].abs()
    for m in (2, 3, 5, 12):
        ours, power = (
            1 - method(Dense(matrices), start(16, 40), m, 0.0).values[:, 0].abs() / truth
            for method in (lanczos, power_method)
        )
        assert (ours <= power + 1e-12).all()
    assert ours.mean() < 0.1 * power.mean()


@pytest.mark.parametrize("method", methods)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_scale_free(method, dtype, scale):
    """In float32 too, where the squares of 1e-25 are 0; the reference's u / (||Hu|| + 1e-6) returns 0 there."""
    matrices, first = random_symmetric(4, 30).to(dtype), start(4, 30).to(dtype)
    plain = methods[method](Dense(matrices), first, 8, 1e-3)
    scaled = methods[method](Dense(matrices * scale), first, 8, 1e-3)
    rtol = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(scaled.values / scale, plain.values, rtol=rtol, atol=0)
    torch.testing.assert_close(scaled.residuals, plain.residuals, rtol=1e-2, atol=1e-5)
    assert torch.equal(scaled.products, plain.products)


def test_an_indefinite_hessian_is_not_underestimated():
    """H = diag(1, -1): u'Hu of u = (1, 1) is 0, ||Hu|| is 1 at once; the residual says u is no eigenvector."""
    u = torch.tensor([[1.0, 1.0]], dtype=torch.float64)
    # ||Hu - u|| with Hu orthogonal to u
    for method, residual in ((power_method, 2**0.5), (lanczos, 0)):
        found = method(diagonal(1, -1), u, 10, 1e-3)
        assert found.values.abs().item() == pytest.approx(1)
        assert found.residuals.item() == pytest.approx(residual, abs=1e-12)


@pytest.mark.parametrize("method", methods)
def test_repeated_zero_and_negative_eigenvalues(method):
    u = start(1, 3)
    for entries, top in (((2, 2, 0.1), 2), ((-3, 1, 0), -3), ((0, 0, 0), 0), ((1, 1, 1), 1)):
        found = methods[method](diagonal(*entries), u, 60, 1e-10)
        assert found.values.item() == pytest.approx(top, abs=1e-12)
        assert found.residuals.item() == pytest.approx(0, abs=1e-10)
    assert methods[method](diagonal(0, 0, 0), u, 60, 1e-10).products.item() == 1


def test_repeated_eigenvalues_all_count_in_the_top_k():
    """Also when the space of the start vector is exhausted before, as with the zeros of a Hessian of low rank."""
    u = start(1, 5)
    for k in (2, 3, 4):
        found = lanczos(diagonal(2, 2, -1, 0, 0), u, 60, 1e-10, k=k)
        assert found.values[0].tolist() == pytest.approx([2, 2, -1, 0][:k], rel=1e-7, abs=1e-12)
        assert (found.residuals < 1e-10).all()
    found = lanczos(diagonal(3, -2, 1, *[0] * 97), start(1, 100), 60, 1e-8, k=2)
    assert found.values[0].tolist() == pytest.approx([3, -2], rel=1e-7)
    assert found.products.item() <= 6  # another start, in the null space, and done
    with pytest.raises(ValueError, match="has 5"):
        lanczos(diagonal(2, 2, -1, 0, 0), u, 60, 1e-10, k=6)
    with pytest.raises(ValueError, match="lanczos"):
        power_method(diagonal(2, 1), u[:, :2], 60, 1e-10, k=2)


def test_top_k_against_the_dense_spectrum():
    matrices = random_symmetric(6, 50)
    found = lanczos(Dense(matrices), start(6, 50), 50, 1e-8, k=5)
    torch.testing.assert_close(found.values, sorted_spectrum(matrices)[:, :5], rtol=1e-9, atol=1e-12)
    few = lanczos(Dense(matrices), start(6, 50), 3, 1e-8, k=5)
    assert few.values.isnan().sum(dim=1).tolist() == [2] * 6  # three products give three values, and say so
    assert few.residuals[:, 3:].isinf().all()


def test_small_eigenvalues_beside_a_large_one_converge_to_their_own_digits():
    spectrum = torch.cat([torch.tensor([1.0, 0.02, -0.005, 0.004]), 1e-3 * torch.linspace(-1, 1, 60)]).double()
    q, _ = torch.linalg.qr(start(64, 64))
    found = lanczos(Dense(((q * spectrum) @ q.T)[None]), start(1, 64), 64, 1e-3, k=4)
    assert (found.residuals <= 1e-3).all()
    assert found.products.item() < 64
    torch.testing.assert_close(found.values[0], spectrum[:4], rtol=1e-3, atol=0)


def test_no_residual_is_said_to_be_below_rounding():
    found = lanczos(Dense(random_symmetric(8, 40).float()), start(8, 40).float(), 40, 0.0)
    assert ((found.residuals > 1e-7) & (found.residuals < 1e-4)).all()


@pytest.mark.parametrize("method", methods)
def test_examples_that_are_done_or_not_finite_cost_nothing_more_and_disturb_no_other(method):
    matrices = random_symmetric(7, 40)
    matrices[1] = torch.eye(40, dtype=torch.float64)  # done after one product
    matrices[4] = 0
    matrices[5, 2, 2] = torch.inf
    dense = Dense(matrices)
    found = methods[method](dense, start(7, 40), 50, 1e-3)
    assert dense.rows == found.products.sum()
    assert found.products[1] == found.products[4] == 1
    assert len(set(found.products.tolist())) > 2
    for column in (found.values, found.residuals):
        assert column.isnan().flatten().tolist() == [i == 5 for i in range(7)]
    for i in range(7):
        alone = methods[method](Dense(matrices[i : i + 1]), start(7, 40)[i : i + 1], 50, 1e-3)
        torch.testing.assert_close(alone.values[0], found.values[i], rtol=1e-10, atol=0, equal_nan=True)
        assert alone.products.item() == found.products[i]


def test_the_trace_and_its_standard_error():
    """Unbiased, with the standard error that repetitions show: var(v'Hv) = 2 sum of squared off-diagonal entries."""
    matrices, generator = random_symmetric(50, 30), torch.Generator().manual_seed(2)
    draw = partial(torch.randn, 50, 30, dtype=torch.float64, generator=generator)
    trace, error, *_ = probe(Dense(matrices), 400, lambda: draw().sign())
    diagonals = matrices.diagonal(dim1=1, dim2=2)
    expected = (2 * (matrices - torch.diag_embed(diagonals)).square().sum(dim=(1, 2)) / 400).sqrt()
    torch.testing.assert_close(error, expected, rtol=0.25, atol=0)  # a standard deviation from 400 values: 4 %
    z = (trace - diagonals.sum(dim=1)) / error
    assert z.abs().max() < 4
    assert 0.7 < z.std() < 1.3
    exact, *_ = probe(diagonal(3, -1, 2), 2, lambda: torch.ones(1, 3, dtype=torch.float64))
    assert exact.item() == 4
