"""The curvature score and the Frobenius norm against dense matrices and dense Hessians in float64."""

import itertools

import pandas as pd
import pytest
import torch
from conftest import assert_one_line_error, run_main
from test_curvature import dense_eigenvalues, examples, seeded, small_model
from test_eigenvalues import Dense, random_symmetric

from curvature.eigenvalues import probe
from curvature.estimate import estimate_curvature
from experiments import label_errors


@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_all_signs_give_the_expectations_exactly(scale):
    """The mean of ||Hv||^2 over all sign vectors is ||H||_F^2, that of v'Hv the trace. 1e-200 squared would be 0."""
    matrices = random_symmetric(3, 6) * scale
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    rows = iter(signs)
    found = probe(Dense(matrices), len(signs), lambda: next(rows).expand(3, 6))
    torch.testing.assert_close(found.frobenius_norm / scale, (matrices / scale).norm(dim=(1, 2)))
    torch.testing.assert_close(found.trace, matrices.diagonal(dim1=1, dim2=2).sum(dim=1))
    lengths = (signs @ (matrices / scale)).norm(dim=2) * scale  # (3, 64)
    torch.testing.assert_close(found.curvature_score, lengths.mean(dim=1))
    torch.testing.assert_close(found.curvature_score_error, lengths.std(dim=1) / 8)


def test_standard_errors_are_those_of_repetitions():
    matrix, generator = random_symmetric(1, 30).expand(300, 30, 30), torch.Generator().manual_seed(3)
    found = probe(Dense(matrix), 50, lambda: torch.randn(300, 30, dtype=torch.float64, generator=generator).sign())
    for name in ("curvature_score", "frobenius_norm"):
        spread, error = getattr(found, name).std(), getattr(found, f"{name}_error").mean()
        assert error.item() == pytest.approx(spread.item(), rel=0.15), name


def test_of_a_network_against_its_dense_hessian():
    model, (x, y) = small_model(), examples(3)
    estimate = estimate_curvature(model, x, y, generator=seeded(), trace_probes=400)
    for i in range(len(x)):
        exact = dense_eigenvalues(model, x[i], y[i]).norm()
        assert (estimate.frobenius_norm[i] - exact).abs() < 4 * estimate.frobenius_norm_error[i]
        assert estimate.curvature_score[i] <= estimate.frobenius_norm[i]


def test_rows_do_not_go_where_the_picture_goes(tmp_path, capsys):
    result = run_main(label_errors, ["--output", tmp_path / "found.png"], capsys)
    assert_one_line_error(result, 2, "found.png", "must end in .csv")


@pytest.mark.long
def test_exchanged_labels_and_their_rows(tmp_path, capsys):
    labels = torch.arange(1000) % 10
    noisy, exchanged = label_errors.exchange_labels(labels, 0.05, 10, seed=1)
    assert exchanged.sum() == 50
    assert torch.equal(noisy != labels, exchanged)
    flags = ["--num-epochs", 1, "--trace-probes", 1, "--model-arch", "vgg11", "--output", tmp_path / "found.csv"]
    result = run_main(label_errors, flags, capsys)
    assert result.returncode == 0, result.stderr
    assert "AUROC of finding them" in result.stdout
    rows = pd.read_csv(tmp_path / "found.csv")
    assert rows["exchanged"].sum() == 72  # of 1437
    assert (rows["curvature_score"] > 0).all()
    assert (tmp_path / "found.png").read_bytes().startswith(b"\x89PNG")
