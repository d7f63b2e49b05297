"""The optimizer, the schedule, and the statistics a low-curvature network starts from."""

import pytest
import torch
from conftest import TwoBlocks
from torch import nn

import train_models
from data.batches import Split, to_pixels
from data.datasets import ImageData
from regularized_loss import CELoss
from training.epoch import TrainingStep, build_optimizer, evaluate, learning_rate, load_optimizer_state


def test_the_first_step_decays_weights_and_betas_and_nothing_else():
    """beta itself, so log beta by beta^2; log gamma, and what the loss owns, not at all."""
    torch.manual_seed(0)
    loss = CELoss(TwoBlocks(2, 4).double().eval())
    loss.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = build_optimizer(loss, lr=0.1, momentum=0.9, weight_decay=0.3, beta_weight_decay=0.7)
    before = {name: parameter.detach().clone() for name, parameter in loss.named_parameters()}
    output = loss.model(torch.rand(5, 3, 4, 4, dtype=torch.float64)).square().sum() * loss.scale
    gradients = dict(zip(before, torch.autograd.grad(output, list(loss.parameters()), retain_graph=True), strict=True))
    output.backward()
    optimizer.step()
    for name, parameter in loss.named_parameters():
        decay = 0.3 * before[name]
        if "log_beta" in name:
            decay = 0.7 * (2 * before[name]).exp()
        elif "log_gamma" in name or name == "scale":
            decay = 0.0
        assert torch.allclose(parameter, before[name] - 0.1 * (gradients[name] + decay), rtol=1e-12), name


def test_steps_are_those_of_torchs_plain_sgd_whose_state_may_be_loaded():
    """A weight may get its first gradient late, as a frozen one does; and the momenta in older checkpoints are laid out
    otherwise than the weights, which a fused optimizer would misread."""
    torch.manual_seed(0)
    model, plain = (nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(12, 2)) for _ in range(2))
    model.to(memory_format=torch.channels_last)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    ours = build_optimizer(CELoss(model), 0.1, 0.9, 5e-4)
    x = torch.rand(5, 4, 4, 4)
    for step, trained in enumerate((slice(0, 1), slice(0, 3), slice(1, 3), slice(0, 3))):
        for network, optimizer in ((plain, theirs), (model, ours)) if step else ((plain, theirs),):
            optimizer.zero_grad()
            network(x).square().sum().backward(inputs=list(network[trained].parameters()))
            optimizer.step()
        if not step:
            model.load_state_dict(plain.state_dict())
            load_optimizer_state(ours, theirs.state_dict())
    for own, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("num_epochs", [5, 7, 8, 20, 200])
def test_the_schedule_is_torchs_multistep_but_for_short_runs(num_epochs):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    milestones = [int(0.75 * num_epochs), int(0.875 * num_epochs)]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for epoch in range(1, num_epochs + 1):
        assert learning_rate(0.1, epoch, num_epochs) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    for rates in ([1], [1, 0.1], [1, 0.1, 0.01], [1, 1, 0.1, 0.01]):  # they pass through each rate
        assert [learning_rate(1.0, epoch, len(rates)) for epoch in range(1, len(rates) + 1)] == pytest.approx(rates)


def test_calibrated_statistics_are_those_of_each_layers_input():
    """But for a layer that keeps none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), TwoBlocks(10, 8)).train()
    images = torch.rand(8, 3, 8, 8)
    train_models.calibrate_batchnorm(model, images)
    assert model.training
    checked = []

    def check(norm, inputs):
        torch.testing.assert_close(norm.running_mean, inputs[0].mean(dim=(0, 2, 3)))
        torch.testing.assert_close(norm.running_var, inputs[0].var(dim=(0, 2, 3)))
        checked.append(norm)

    norms = [module for module in model[1].modules() if isinstance(module, nn.BatchNorm2d)]
    assert not any(norm._forward_pre_hooks for norm in norms)  # its own are gone
    for norm in norms:
        norm.register_forward_pre_hook(check)
    with torch.no_grad():
        model.eval()(images)  # in eval each layer sees what the statistics were set from
    assert len(checked) == len(norms) == 6


def test_flags_reach_the_first_statistics_and_the_rate():
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.arange(8) % 2)
    data = ImageData(split, split, ["a", "b"], flip=True)
    flags = "--model-arch conftest:TwoBlocks --calibrate-batchnorm --bn-momentum 0.3 --num-epochs 3 --reg-warmup 2"
    flags = train_models.build_parser().parse_args([*flags.split(), "--device", "cpu"])
    network = train_models.build_trained_network(flags, data)
    conv, norm = network.stem[0], network.stem[1]
    assert norm.momentum == 0.3
    torch.testing.assert_close(norm.running_mean, conv.eval()(to_pixels(images)).mean(dim=(0, 2, 3)))
    optimizer = build_optimizer(loss := CELoss(network), 0.1, 0.9, 0.0)
    row = train_models.train_one_epoch(flags, 2, data, TrainingStep(loss), optimizer)
    assert (loss.epoch, loss.num_epochs, loss.warmup_epochs) == (2, 3, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [row["learning_rate"]] * 2 == pytest.approx([0.01] * 2)


def test_evaluate_counts_by_hand():
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.tensor([0, 1, 0, 1, 1, 0, 0]))
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).double()
    logits = model.eval()(images.double() / 255)
    loss, accuracy = evaluate(model.train(), split, batch_size=3)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item())
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).double().mean().item())
