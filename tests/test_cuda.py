"""Training on a GPU: nothing waits for the host."""

import pytest
import torch
from conftest import run_main

import train_models
from data.batches import Split, training_batches
from models.model_selector import model_architecture
from regularized_loss import regularizers
from training.attacks import PGD, adversarial_batches
from training.epoch import TrainingStep, build_optimizer, train_epoch
from utils.precision import PRECISIONS, autocast_to_bfloat16, training_settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("regularizer", regularizers)
@pytest.mark.parametrize("deterministic", [True, False])
def test_an_epoch_does_not_wait_for_the_host(precision, regularizer, deterministic):
    torch.manual_seed(0)
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8)
    data = Split(images, torch.arange(70) % 10).to(CUDA)
    model = model_architecture["resnet18lcnn"](10, 16).to(CUDA, memory_format=torch.channels_last)
    loss = regularizers[regularizer](model, train_models.build_parser().parse_args([]))
    if precision == "bf16":
        autocast_to_bfloat16(model, "cuda")
    step, optimizer = TrainingStep(loss), build_optimizer(loss, 0.01, 0.9, 5e-4)

    def watched():
        torch.cuda.set_sync_debug_mode("error")
        try:
            batches = training_batches(data, 16, 0, 2)
            yield from adversarial_batches(model, batches, PGD("l2", 0.1, 2, 0.05)) if precision == "fp32" else batches
        finally:
            torch.cuda.set_sync_debug_mode("default")

    with training_settings(precision, deterministic):
        train_epoch(step, optimizer, training_batches(data, 16, 0, 1))  # what libraries do once
        train_epoch(step, optimizer, watched())


@pytest.mark.parametrize("more", [[], ["--precision", "bf16", "--no-strong-determinism-wanted"]])
def test_a_run_on_a_gpu(photographs, tmp_path, capsys, more):
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 4]
    flags += ["--model-arch", "resnet18lcnn", "--regularizer", "curvature_and_gnorm", "--batch-size", 12, "--lr", 0.01]
    result = run_main(train_models, [*flags, *more, "--device", "cuda", "--output-dir", tmp_path], capsys)
    assert result.returncode == 0, result.stderr
    assert "epoch 4/4" in result.stdout
