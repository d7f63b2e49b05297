"""The optimizer, the schedule, and the statistics a low-curvature network starts from."""

import pytest
import torch
from torch import nn

from data.batches import Split
from models.layers import CenteredSoftplus, LipschitzBatchNorm2d
from models.model_selector import model_architecture
from regularized_loss import CELoss
from training.epoch import build_optimizer, calibrate_batchnorm, evaluate, learning_rate, load_optimizer_state


def test_beta_and_gamma_have_no_weight_decay_and_everything_else_has():
    model = model_architecture["vgg11lcnn"](10, 16)
    optimizer = build_optimizer(CELoss(model), lr=0.1, momentum=0.9, weight_decay=5e-4)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0 if "log_beta" in name or "log_gamma" in name else 5e-4), name
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


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


def test_momenta_of_an_optimizer_that_was_not_fused_go_on():
    """Older checkpoints have them laid out otherwise than the weights, which a fused optimizer would misread."""
    torch.manual_seed(0)
    old = nn.Conv2d(4, 3, 3)
    new = nn.Conv2d(4, 3, 3).to(memory_format=torch.channels_last)
    new.load_state_dict(old.state_dict())
    optimizers = [torch.optim.SGD(old.parameters(), lr=0.1, momentum=0.9), build_optimizer(CELoss(new), 0.1, 0.9, 0.0)]
    gradients = [torch.randn_like(p) for p in old.parameters()]
    for step in range(2):
        for model, optimizer in zip((old, new), optimizers, strict=True):
            for p, gradient in zip(model.parameters(), gradients, strict=True):
                p.grad = torch.empty_like(p).copy_(gradient)
            if step or model is old:
                optimizer.step()
        if not step:
            load_optimizer_state(optimizers[1], optimizers[0].state_dict())
            new.load_state_dict(old.state_dict())
    for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_weight_may_get_its_first_gradient_after_the_first_step():
    """As with layers that are frozen at first, or dropped at random."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    plain.load_state_dict(model.state_dict())
    pairs = (
        (model, build_optimizer(CELoss(model), 0.1, 0.9, 5e-4)),
        (plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)),
    )
    x = torch.randn(5, 3)
    for trained in (slice(1, 2), slice(0, 2), slice(0, 1), slice(0, 2)):
        for network, optimizer in pairs:
            optimizer.zero_grad()
            parameters = list(network[trained].parameters())
            for p, gradient in zip(parameters, torch.autograd.grad(network(x).square().sum(), parameters), strict=True):
                p.grad = gradient
            optimizer.step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_calibration_passes_over_batchnorms_that_keep_no_statistics():
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3))
    images = torch.rand(8, 3, 4, 4)
    calibrate_batchnorm(model, images)
    torch.testing.assert_close(model[1].running_mean, model[0](images).mean(dim=(0, 2, 3)))


def test_calibrated_statistics_are_those_of_each_layers_input():
    torch.manual_seed(0)
    model = model_architecture["resnet18lcnn"](10, 16).train()
    images = torch.rand(8, 3, 16, 16)
    calibrate_batchnorm(model, images)
    assert model.training
    checked = []

    def check(norm, inputs):
        torch.testing.assert_close(norm.running_mean, inputs[0].mean(dim=(0, 2, 3)))
        torch.testing.assert_close(norm.running_var, inputs[0].var(dim=(0, 2, 3)))
        checked.append(norm)

    norms = [module for module in model.modules() if isinstance(module, LipschitzBatchNorm2d)]
    for norm in norms:
        norm.register_forward_pre_hook(check)
    with torch.no_grad():
        model.eval()(images)  # in eval each layer sees what the statistics were set from
    assert len(checked) == len(norms) == 20
    assert all(not norm._forward_pre_hooks or len(norm._forward_pre_hooks) == 1 for norm in norms)  # its own are gone


def test_evaluate_counts_by_hand():
    images = torch.randint(0, 256, (7, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(images, torch.tensor([0, 1, 0, 1, 1, 0, 0]))
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).double()
    logits = model(images.double() / 255)
    loss, accuracy = evaluate(model, split, batch_size=3)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, split.labels).item())
    assert accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).double().mean().item())


def test_weight_decay_on_beta_is_on_beta_itself():
    """One step without momentum: log beta falls by lr * (its gradient + weight * beta^2); the rest is not touched."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), CenteredSoftplus(3.0), nn.Linear(4, 2), CenteredSoftplus(0.2)).double()
    x = torch.rand(5, 3, dtype=torch.float64)
    gradients = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(CELoss(model), lr=0.1, momentum=0.0, weight_decay=0.0, beta_weight_decay=0.7)
    model(x).square().sum().backward()
    optimizer.step()
    for (name, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        decay = 0.7 * (2 * before[name]).exp() if "log_beta" in name else 0.0
        assert torch.allclose(parameter, before[name] - 0.1 * (gradient + decay), rtol=1e-12), name
