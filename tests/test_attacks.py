"""Attacks against the exact worst case of linear models, and inside their ball and [0, 1] on any."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TwoBlocks, run_main
from torch import nn

import train_models
from curvature.estimate import prepared
from data.batches import Batch
from experiments.robustness import auto_attack, strongest
from training.attacks import PGD, adversarial_batches, adversarial_images, project

SHAPE = (2, 3, 4)  # of an image: 24 pixels


def linear(classes: int, pixels: int = 24) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


def batch(n: int, classes: int, low: float = 0.3, high: float = 0.7, shape: tuple[int, int, int] = SHAPE):
    generator = torch.Generator().manual_seed(n)
    images = low + (high - low) * torch.rand(n, *shape, dtype=torch.float64, generator=generator)
    return images, torch.randint(0, classes, (n,), generator=generator)


def generators(n: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(n)]


def fooled(model, found: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return model(found).argmax(dim=1) != labels


def losses(model, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(images), labels, reduction="none")


def assert_inside(found: torch.Tensor, images: torch.Tensor, norm: str, eps: float) -> None:
    """In [0, 1], and in the ball but for a rounding in float32."""
    assert found.min() >= 0
    assert found.max() <= 1
    delta = (found - images).flatten(1)
    assert torch.linalg.vector_norm(delta, ord=float(norm.removeprefix("l")), dim=1).max() <= eps * (1 + 1e-5)


@pytest.mark.parametrize(("norm", "low", "high"), [("l2", 0.3, 0.7), ("linf", 0.3, 0.7), ("linf", 0.0, 1.0)])
def test_pgd_finds_the_exact_worst_case_of_a_linear_model(norm, low, high):
    """With two classes the cross-entropy is softplus(-m), m the margin of the true class: eps * (dual norm of its
    gradient) lower at worst. Where a pixel would leave [0, 1] it stops there, which has a closed form in l-infinity."""
    model, n = linear(2), 20
    images, _ = batch(n, 2, low, high)
    labels = model(images).argmax(dim=1)
    w = model[1].weight.detach()
    slope = (w[labels] - w[1 - labels]).view_as(images)
    margin = (model(images)[:, 0] - model(images)[:, 1]).detach() * (1 - 2 * labels)
    dual_norm = slope.flatten(1).norm(dim=1) if norm == "l2" else slope.flatten(1).abs().sum(dim=1)
    eps = float((margin / dual_norm).quantile(0.6))  # the distance to the other class, of most
    if norm == "l2":
        worst = images - eps * slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    else:
        worst = (images - eps * slope.sign()).clamp(0, 1)
    assert bool((worst == 0).any() or (worst == 1).any()) == (high == 1)
    expected = losses(model, worst, labels)

    # a step as long as the radius halves the angle to the worst point each time: 40 steps leave 1e-12
    attack = PGD(norm, eps, 40, step_size=eps)
    found = adversarial_images(model, images, labels, attack, generators(n))
    assert torch.allclose(losses(model, found, labels), expected, rtol=1e-9)

    with prepared(model) as network:
        found = strongest(network, images, labels, attack, 1, generators(n))
    stays = ~fooled(model, found, labels)
    assert torch.equal(~stays, fooled(model, worst, labels))  # exactly those that can be
    assert 0 < stays.sum() < n
    assert torch.allclose(losses(model, found, labels)[stays], expected[stays])


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize(("eps", "step_size"), [(0.05, None), (0.3, 10.0)])
def test_attacks_stay_in_the_ball_and_in_the_box(norm, eps, step_size):
    torch.manual_seed(0)
    model = TwoBlocks(10, 8).eval()
    images = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0)).round(decimals=1)  # 0 and 1, too
    labels, before = model(images).argmax(dim=1), images.clone()
    attack = PGD(norm, eps, 3, step_size)
    with prepared(model) as network:
        assert_inside(strongest(network, images, labels, attack, 2, generators(5)), images, norm, eps)
    for found in (adversarial_images(model, images, labels, attack), attack.random_start(images, None)):
        assert_inside(found, images, norm, eps)
        assert (found != images).flatten(1).any(dim=1).all()  # the random start and the climb do go somewhere
    assert torch.equal(images, before)


def test_the_loss_only_grows_and_an_attack_does_not_depend_on_its_batch():
    model, attack, n = linear(4), PGD("l2", 0.1, 5), 40
    images, labels = batch(n, 4)
    with prepared(model) as network, torch.no_grad():
        once, found = (strongest(network, images, labels, attack, restarts, generators(n)) for restarts in (1, 3))
        at_images, at_once, at_found = (losses(network, x, labels) for x in (images, once, found))
        assert (at_images <= at_once).all()
        assert (at_once <= at_found).all()
        wrong = fooled(network, images, labels)
        assert torch.equal(found[wrong], images[wrong])  # nothing is to be done there
        assert 0 < wrong.sum() < fooled(network, found, labels).sum() < n
        rows = torch.arange(n).split(1)
        alone = [strongest(network, images[i], labels[i], attack, 3, [generators(n)[i]]) for i in rows]
        assert torch.allclose(torch.cat(alone), found)


def test_restarts_find_what_one_start_does_not():
    """A loss with a local maximum near the image and a larger one elsewhere: some starts climb the wrong hill."""

    class TwoHills(nn.Module):
        def forward(self, x):
            z = x.flatten(1)[:, 0] - 0.5
            wrong = torch.exp(-(((z + 0.3) / 0.05) ** 2)) + 2 * torch.exp(-(((z - 0.3) / 0.1) ** 2))
            return torch.stack([torch.full_like(z, 1.5), wrong], dim=1)

    images, labels = torch.full((20, 1, 1, 1), 0.4, dtype=torch.float64), torch.zeros(20, dtype=torch.int64)
    attack = PGD("linf", 0.5, 10, 0.05)
    with prepared(TwoHills()) as network:
        found = [strongest(network, images, labels, attack, restarts, generators(20)) for restarts in (1, 10)]
    one, ten = (fooled(TwoHills(), x, labels).sum() for x in found)
    assert 0 < one < ten == 20


def test_a_model_in_training_is_attacked_in_eval_mode():
    model, seen = TwoBlocks(10, 8), []
    model.stem.register_forward_hook(lambda module, *_: seen.append(module.training))
    adversarial_images(model, torch.rand(2, 3, 8, 8), torch.tensor([1, 2]), PGD("l2", 0.1, 2))
    assert seen == [False, False]
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_adversarial_training_by_flag(thin_vgg, photographs, tmp_path, capsys, monkeypatch):
    """It trains on images moved by what the flags describe, each batch against the model as it is by then."""
    model, (images, labels) = linear(2), batch(3, 2)
    for found, its_labels, *_ in adversarial_batches(model, [Batch(images, labels, 3, 1.0)] * 2, PGD("linf", 0.1, 5)):
        w = model[1].weight.detach()
        assert torch.allclose(found, images - 0.1 * (w[labels] - w[1 - labels]).view_as(images).sign())
        assert its_labels is labels
        model[1].weight.data.neg_()  # the optimizer's step

    attacks = []
    monkeypatch.setattr(train_models, "adversarial_batches", lambda *a: attacks.append(a[2]) or adversarial_batches(*a))
    flags = ["--dataset", "imagefolder", "--data-dir", photographs, "--image-size", 16, "--num-epochs", 1]
    flags += ["--model-arch", "vgg11", "--regularizer", "gnorm", "--batch-size", 12, "--lr", 0.01]
    flags += ["--adversarial-training", "--adv-norm", "linf", "--adv-eps", "8/255", "--adv-steps", 2]
    result = run_main(train_models, [*flags, "--output-dir", tmp_path], capsys)
    assert result.returncode == 0, result.stderr
    assert attacks == [PGD("linf", 8 / 255, 2, 0.01)]
    assert (tmp_path / "vgg11_gnorm_adversarial_imagefolder.pt").is_file()


def test_projection_and_step():
    delta = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    assert torch.allclose(project(delta, "l2", 1.0), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))
    assert torch.allclose(project(delta, "linf", 0.35), torch.tensor([[0.35, 0.35], [0.3, 0.35], [0.0, 0.0]]))
    images = torch.full((1, 4), 0.5)  # a step is 2.5 * eps / steps long unless told otherwise
    assert torch.allclose(PGD("linf", 0.4, 10).step(images, images, torch.ones(1, 4)), images + 0.1)
    assert torch.allclose(PGD("linf", 0.4, 10, 0.2).step(images, images, torch.ones(1, 4)), images + 0.2)
    assert torch.allclose(PGD("l2", 0.4, 10).step(images, images, torch.ones(1, 4)), images + 0.05)
    torch.manual_seed(0)
    radii = (PGD("l2", 0.1, 1).random_start(torch.full((1000, 9), 0.5), None) - 0.5).norm(dim=1)
    assert torch.allclose(radii.sort().values, torch.linspace(0, 0.1, 1000), atol=0.01)  # uniform
    for wrong in (("l1", 0.1, 3), ("l2", 0.0, 3), ("l2", 0.1, 0), ("l2", 1, 1, -1)):
        with pytest.raises(ValueError, match=r"norm 'l1'|must be positive"):
            PGD(*wrong)


@pytest.mark.parametrize(("norm", "classes"), [pytest.param("l2", 4, marks=pytest.mark.long), ("linf", 2)])
def test_autoattack_finds_exactly_those_of_a_linear_model_that_can_be_fooled(norm, classes):
    """The distance to the nearest other class is known; eps is a little more than that for two, less for the rest."""
    model = linear(classes, 36).float()
    images = batch(4, classes, shape=(1, 6, 6))[0].float()  # its Square attack needs five rows
    labels = model(images).argmax(dim=1)
    logits, w = model(images).detach(), model[1].weight.detach()
    gap = logits.gather(1, labels[:, None]) - logits
    slope = w[labels][:, None] - w[None]
    dual = slope.norm(dim=2) if norm == "l2" else slope.abs().sum(dim=2)
    distance = (gap / dual).nan_to_num(torch.inf).scatter(1, labels[:, None], torch.inf).amin(dim=1)
    order = distance.sort().values
    eps = float((order[1] + order[2]) / 2)
    assert order[1] * 1.02 < eps < order[2] * 0.98
    assert eps < 0.3  # the box plays no part

    state = torch.get_rng_state()
    with prepared(model) as network:
        found = auto_attack(network, images, labels, norm, eps, seed=0)
    assert torch.equal(fooled(model, found, labels), distance < eps)
    assert torch.equal(torch.get_rng_state(), state)  # it seeds its own
    assert_inside(found, images, norm, eps)
