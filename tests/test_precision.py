"""bfloat16 where it is meant to be, and nowhere else."""

import copy

import pytest
import torch
from conftest import TwoBlocks, assert_one_line_error, run_main
from torch import nn

import train_models
from regularized_loss import regularizers
from training.epoch import TrainingStep
from utils.precision import check_precision, denormals_flushed, training_settings


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module]:
    """The same network twice: in float32, and prepared for bfloat16. Its classifier has torch's own spectral norm."""
    torch.manual_seed(0)
    model = TwoBlocks(10)
    flags = train_models.build_parser().parse_args(["--precision", "bf16", "--device", "cpu"])
    half = train_models.build_loss(flags, copy.deepcopy(model)).model
    return model.train(), half.train()


IMAGES, LABELS = torch.rand(16, 3, 16, 16, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 10


def test_convolutions_are_in_bfloat16_and_power_iterations_in_float32(models):
    model, half = models
    dtypes = set()
    for module in half.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    reference, logits = model(IMAGES), half(IMAGES)
    assert dtypes == {torch.bfloat16}
    assert logits.dtype == torch.float32
    assert 1e-5 < (logits - reference).norm() / reference.norm() < 0.1
    iterates = [name for name, _ in model.named_buffers() if name.split(".")[-1] in ("u", "v", "_u", "_v")]
    assert len(iterates) == 14
    for name in iterates:
        assert torch.equal(half.get_buffer(name), model.get_buffer(name)), name


def test_what_is_evaluated_is_float32_and_a_copy_computes_with_its_own_weights(models):
    model, half = models
    copied, expected = copy.deepcopy(half).eval(), half.eval()(IMAGES)
    with torch.no_grad():
        assert torch.equal(model.eval()(IMAGES), half(IMAGES))
        for tensor in (*half.parameters(), *half.buffers()):
            tensor.zero_()
    assert torch.equal(copied(x=IMAGES), expected)
    assert copied.state_dict().keys() == model.state_dict().keys()


def test_gradients_are_float32_and_near_those_in_float64(models):
    flags = train_models.build_parser().parse_args([])
    double, half = models[0].double(), models[1]
    for name in ("none", "curvature_and_gnorm"):
        gradients = []
        for model, x in ((half, IMAGES), (double, IMAGES.double())):
            model.train().zero_grad()
            TrainingStep(regularizers[name](model, flags))(x, LABELS)
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        found, truth = gradients
        assert found.dtype == torch.float32
        assert 1e-4 < (found - truth).norm() / truth.norm() < 0.2, name


def test_what_a_device_has_not_is_refused_or_said_to_be_slow(monkeypatch, capsys):
    result = run_main(train_models, ["--precision", "tf32", "--device", "cpu"], capsys)
    assert_one_line_error(result, 2, "CUDA device")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for precision, fast, said in (("bf16", False, True), ("bf16", True, False), ("fp32", False, False)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        check_precision(precision, torch.device("cpu"))
        assert ("16 times as long" in capsys.readouterr().out) is said


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
