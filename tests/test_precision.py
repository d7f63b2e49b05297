"""bfloat16 where it is meant to be, and nowhere else."""

import copy

import pytest
import torch
from conftest import assert_one_line_error, run_main
from torch import nn

import train_models
from models.checkpoint import read_checkpoint
from models.layers import LCNN
from models.model_selector import model_architecture
from models.resnet import ResNet
from regularized_loss import regularizers
from training.epoch import TrainingStep
from utils.precision import autocast_to_bfloat16, denormals_flushed, training_settings


def batch():
    return torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


@pytest.fixture(params=["vgg11lcnn", "vgg11"])
def models(request):
    """The same network twice: in float32, and prepared for bfloat16."""
    torch.manual_seed(0)
    model = model_architecture[request.param](10, 16)
    other = copy.deepcopy(model)
    autocast_to_bfloat16(other, "cpu")
    return model.train(), other.train()


def test_convolutions_are_in_bfloat16_and_power_iterations_in_float32(models):
    model, half = models
    dtypes = set()
    for module in half.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    images, _ = batch()
    reference, logits = model(images), half(images)
    assert dtypes == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - reference).norm() / reference.norm() < 0.1
    for (name, ours), theirs in zip(half.named_buffers(), model.buffers(), strict=True):
        if name.split(".")[-1] in ("u", "v", "_u", "_v"):
            assert torch.equal(ours, theirs), name


def test_what_is_evaluated_is_float32_and_a_copy_computes_with_its_own_weights(models):
    model, half = models
    images, _ = batch()
    copied, expected = copy.deepcopy(half).eval(), half.eval()(images)
    with torch.no_grad():
        assert torch.equal(model.eval()(images), half(images))
        for tensor in (*half.parameters(), *half.buffers()):
            tensor.zero_()
    assert torch.equal(copied(x=images), expected)
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_gradients_are_float32_and_near_those_in_float64():
    torch.manual_seed(0)
    half = ResNet(LCNN, (1, 1, 1, 1), 10, 16)
    double = copy.deepcopy(half).double()
    autocast_to_bfloat16(half, "cpu")
    images, labels = batch()
    flags = train_models.build_parser().parse_args([])
    for name in ("none", "curvature_and_gnorm"):
        gradients = []
        for model, x in ((half, images), (double, images.double())):
            model.train().zero_grad()
            TrainingStep(regularizers[name](model, flags))(x, labels)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        found, truth = gradients
        assert found.dtype == torch.float32
        assert 1e-4 < (found - truth).norm() / truth.norm() < 0.2, name


def test_every_thread_flushes_denormals_whatever_ran_before():
    denormals, threads = torch.full((1_000_000,), 1e-39), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert (denormals * 1.0).all()  # and the worker threads are there
        with denormals_flushed():
            assert not (denormals * 1.0).any()
        assert (denormals * 1.0).all()
    finally:
        torch.set_num_threads(threads)


def test_training_puts_the_settings_of_the_process_back():
    def settings():
        tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return *tf32, torch.get_deterministic_debug_mode(), torch.backends.cudnn.benchmark, fill

    before = settings()
    for precision, deterministic in (("tf32", True), ("fp32", False)):
        with training_settings(precision, deterministic):
            assert settings()[:4] == (*[precision == "tf32"] * 2, 2 * deterministic, not deterministic)
        assert settings() == before


def test_a_run_in_bfloat16_is_of_its_own_kind(photographs, tmp_path, capsys):
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 1]
    flags += ["--model-arch", "vgg11lcnn", "--batch-size", 12, "--lr", 0.01]
    flags += ["--device", "cpu", "--output-dir", tmp_path]
    result = run_main(train_models, [*flags, "--precision", "bf16"], capsys)
    assert result.returncode == 0, result.stderr
    checkpoint = read_checkpoint(tmp_path / "vgg11lcnn_imagefolder.pt")
    assert checkpoint["flags"]["precision"] == "bf16"
    assert all(t.dtype in (torch.float32, torch.int64) for t in checkpoint["model"].values())
    assert_one_line_error(run_main(train_models, [*flags, "--resume"], capsys), 2, "--precision bf16")
