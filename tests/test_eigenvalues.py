"""The eigenvalue methods and probes on dense symmetric operators, whose spectrum LAPACK knows."""

import itertools

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


def test_against_the_dense_spectrum_in_the_end_and_after_every_number_of_products():
    """Lanczos is never behind power: from the same start, its Krylov space holds the power method's vector."""
    matrices = random_symmetric(8, 40)
    spectrum = sorted_spectrum(matrices)
    truth = spectrum[:, 0].abs()
    for method in methods.values():
        found = method(Dense(matrices), start(8, 40), 3000, 1e-7)
        assert (found.residuals <= 1e-7).all()
        # the error of an eigenvalue is at most the residual, near its square over the gap
        torch.testing.assert_close(found.values[:, 0], spectrum[:, 0], rtol=1e-9, atol=0)
    largest = dict.fromkeys(methods, torch.zeros(8, dtype=torch.float64))
    for m in range(1, 13):
        for name, method in methods.items():
            found = method(Dense(matrices), start(8, 40), m, 0.0)
            value = found.values[:, 0]
            assert (value.abs() <= truth * (1 + 1e-12)).all()
            assert (value.abs() >= largest[name] * (1 - 1e-12)).all()  # more products, no worse
            largest[name] = value.abs()
            distance = (spectrum - value[:, None]).abs().amin(dim=1)
            assert (distance <= found.residuals[:, 0] * value.abs() * (1 + 1e-9) + 1e-15).all()
            assert (found.products == m).all()
        assert (largest["lanczos"] >= largest["power"] - 1e-12 * truth).all()
    shortfall = {name: (1 - value / truth).mean() for name, value in largest.items()}
    assert shortfall["lanczos"] < 0.1 * shortfall["power"]


def test_the_residual_is_that_of_the_value_reported():
    """By hand after two products, where the norm reported and the Ritz value of its vector still differ."""
    h, q = diagonal(3, -2, 1, 0.5).matrices[0], torch.ones(4, 1, dtype=torch.float64) / 2
    basis, _ = torch.linalg.qr(torch.cat([q, h @ q], dim=1))
    theta, s = torch.linalg.eigh(basis.T @ h @ basis)
    u, norm = basis @ s[:, theta.abs().argmax()], torch.linalg.matrix_norm(h @ basis, ord=2)
    found = lanczos(Dense(h[None]), q.T, 2, 0.0)
    assert found.values.item() == pytest.approx(norm.item(), rel=1e-12)  # the top Ritz value is positive
    assert found.residuals.item() == pytest.approx(((h @ u - norm * u).norm() / norm).item(), rel=1e-10)


def test_rounding():
    """x almost within the span: one pass would leave a part of it of the size of its rounding over what is left.

    No residual is said to be below rounding.
    """
    generator, eps = torch.Generator().manual_seed(0), torch.finfo(torch.float32).eps
    basis = torch.linalg.qr(torch.randn(1, 200, 30, generator=generator)).Q.mT
    rest = orthogonalize(basis.sum(dim=1) + 100 * eps * torch.randn(1, 200, generator=generator), basis)
    assert (basis[0] @ rest[0]).abs().max() < 4 * eps * rest.norm()
    found = lanczos(Dense(random_symmetric(8, 40).float()), start(8, 40).float(), 40, 0.0)
    assert ((found.residuals > 1e-7) & (found.residuals < 1e-4)).all()


@pytest.mark.parametrize("method", methods)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_scale_free(method, dtype, rtol):
    """In float32 too, where the squares of 1e-25 are 0; the reference's u / (||Hu|| + 1e-6) returns 0 there."""
    matrices, first = random_symmetric(4, 30).to(dtype), start(4, 30).to(dtype)
    plain = methods[method](Dense(matrices), first, 8, 1e-3)
    for scale in (1e-25, 1e-12, 1e12):
        scaled = methods[method](Dense(matrices * scale), first, 8, 1e-3)
        torch.testing.assert_close(scaled.values / scale, plain.values, rtol=rtol, atol=0)
        torch.testing.assert_close(scaled.residuals, plain.residuals, rtol=1e-2, atol=1e-5)
        assert torch.equal(scaled.products, plain.products)


@pytest.mark.parametrize("method", methods)
def test_indefinite_repeated_zero_and_negative_eigenvalues(method):
    # H = diag(1, -1): u'Hu of u = (1, 1) is 0, ||Hu|| is 1 at once, but u is no eigenvector: Hu is orthogonal to it
    found = methods[method](diagonal(1, -1), torch.ones(1, 2, dtype=torch.float64), 10, 1e-3)
    assert found.values.abs().item() == pytest.approx(1)
    assert found.residuals.item() == pytest.approx({"power": 2**0.5, "lanczos": 0}[method], abs=1e-12)
    for entries, top in (((2, 2, 0.1), 2), ((-3, 1, 0), -3), ((0, 0, 0), 0), ((1, 1, 1), 1)):
        found = methods[method](diagonal(*entries), start(1, 3), 60, 1e-10)
        assert found.values.item() == pytest.approx(top, abs=1e-12)
        assert found.residuals.item() == pytest.approx(0, abs=1e-10)
        assert top or found.products.item() == 1


def test_top_k_against_the_dense_spectrum():
    matrices = random_symmetric(6, 50)
    found = lanczos(Dense(matrices), start(6, 50), 50, 1e-8, k=5)
    torch.testing.assert_close(found.values, sorted_spectrum(matrices)[:, :5], rtol=1e-9, atol=1e-12)
    few = lanczos(Dense(matrices), start(6, 50), 3, 1e-8, k=5)
    assert few.values.isnan().sum(dim=1).tolist() == [2] * 6  # three products give three values, and say so
    assert few.residuals[:, 3:].isinf().all()
    with pytest.raises(ValueError, match="has 5"):
        lanczos(diagonal(2, 2, -1, 0, 0), start(1, 5), 60, 1e-10, k=6)
    with pytest.raises(ValueError, match="lanczos"):
        power_method(diagonal(2, 1), start(1, 2), 60, 1e-10, k=2)


def test_repeated_eigenvalues_all_count_in_the_top_k():
    """Also when the space of the start vector is exhausted before, as with the zeros of a Hessian of low rank."""
    for k in (2, 3, 4):
        found = lanczos(diagonal(2, 2, -1, 0, 0), start(1, 5), 60, 1e-10, k=k)
        assert found.values[0].tolist() == pytest.approx([2, 2, -1, 0][:k], rel=1e-7, abs=1e-12)
        assert (found.residuals < 1e-10).all()
    found = lanczos(diagonal(3, -2, 1, *[0] * 97), start(1, 100), 60, 1e-8, k=2)
    assert found.values[0].tolist() == pytest.approx([3, -2], rel=1e-7)
    assert found.products.item() <= 6  # another start, in the null space, and done


def test_small_eigenvalues_beside_a_large_one_converge_to_their_own_digits():
    spectrum = torch.cat([torch.tensor([1.0, 0.02, -0.005, 0.004]), 1e-3 * torch.linspace(-1, 1, 60)]).double()
    q, _ = torch.linalg.qr(start(64, 64))
    found = lanczos(Dense(((q * spectrum) @ q.T)[None]), start(1, 64), 64, 1e-3, k=4)
    assert (found.residuals <= 1e-3).all()
    assert found.products.item() < 64
    torch.testing.assert_close(found.values[0], spectrum[:4], rtol=1e-5, atol=0)
    nearly_zero = (1e-8 * torch.linspace(-1, 1, 60)).tolist()  # these need not
    found = lanczos(diagonal(1, 0.5, *nearly_zero), start(1, 62), 20, 1e-3, k=3)
    assert (found.residuals <= 1e-3).all()


@pytest.mark.parametrize("method", methods)
def test_examples_that_are_done_or_not_finite_cost_nothing_more_and_disturb_no_other(method):
    matrices = random_symmetric(7, 40) * torch.logspace(0, -60, 7, dtype=torch.float64)[:, None, None]
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


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_all_signs_give_the_expectations_exactly(scale):
    """The mean of ||Hv||^2 over all sign vectors is ||H||_F^2, that of v'Hv the trace. 1e-200 squared would be 0."""
    matrices = random_symmetric(3, 6) * scale
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    rows = iter(signs)
    found = probe(Dense(matrices), len(signs), lambda: next(rows).expand(3, 6))
    torch.testing.assert_close(found.frobenius_norm / scale, (matrices / scale).norm(dim=(1, 2)))
    torch.testing.assert_close(found.trace / scale, (matrices / scale).diagonal(dim1=1, dim2=2).sum(dim=1))
    lengths = (signs @ (matrices / scale)).norm(dim=2)  # (3, 64)
    torch.testing.assert_close(found.curvature_score / scale, lengths.mean(dim=1))
    assert probe(Dense(matrices), 1, lambda: signs[:3]).trace_error.isnan().all()  # one tells none


def test_standard_errors_are_those_of_repetitions():
    matrix, generator = random_symmetric(1, 30).expand(300, 30, 30), torch.Generator().manual_seed(3)
    found = probe(Dense(matrix), 50, lambda: torch.randn(300, 30, dtype=torch.float64, generator=generator).sign())
    for name in ("trace", "curvature_score", "frobenius_norm"):
        spread, error = getattr(found, name).std(), getattr(found, f"{name}_error").mean()
        assert error.item() == pytest.approx(spread.item(), rel=0.15), name
