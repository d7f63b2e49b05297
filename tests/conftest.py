"""What several test files share: real images on disk, and the scripts run as a user runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # images and golden numbers too large for the repository

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """20 x 20 patches of two real photographs (scikit-learn's): classes china and flower, 12 train and 6 test each."""
    root = tmp_path_factory.mktemp("photographs")
    sample = load_sample_images()
    rng = np.random.default_rng(0)
    for photograph, filename in zip(sample.images, sample.filenames, strict=True):
        name = Path(filename).stem
        for split, count in (("train", 12), ("test", 6)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                top, left = rng.integers(0, [photograph.shape[0] - 20, photograph.shape[1] - 20])
                Image.fromarray(photograph[top : top + 20, left : left + 20]).save(folder / f"{i}.png")
    return root


def run_script(script: str, *arguments, cwd: Path | None = None, check: int | None = 0) -> subprocess.CompletedProcess:
    """Run an entry script in a process of its own; unless check is None, insist on that exit code."""
    command = [sys.executable, str((cwd or ROOT) / script), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=cwd or ROOT, timeout=300)
    assert check is None or result.returncode == check, result.stdout + result.stderr
    return result


def assert_one_line_error(result: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """The exit code, exactly one line on stderr, no traceback, and the words that name the problem and the remedy."""
    assert result.returncode == code, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    for word in words:
        assert word in result.stderr, result.stderr
