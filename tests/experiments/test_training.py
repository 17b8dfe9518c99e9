"""Networks and data by name: the same seed gives the same run, and errors are what they say."""

import math

import pytest
import torch

from bayes_svdo import data
from bayes_svdo.data import DataSet
from bayes_svdo.distributions import EmpiricalBayes, LogUniform
from bayes_svdo.experiments.training import KLS, Settings, evaluate, make_task, train

TINY = Settings("64-6-10", "digits", epochs=2, batch_size=1437, lr=0.01, device="cpu")


@pytest.fixture(scope="module")
def digits():
    return make_task(data.load("digits"))


def with_(**changes):
    return Settings(**{**vars(TINY), **changes})


def parameters(posterior):
    return torch.cat([p.detach().flatten() for p in posterior.guide.parameters()])


def test_the_seed_decides_all_and_the_global_random_state_nothing(digits):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = parameters(train(TINY, digits))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(parameters(train(TINY, digits)), one)
    assert not torch.equal(parameters(train(with_(seed=1), digits)), one)


def test_the_seed_decides_the_initial_weights(digits):
    untrained = [parameters(train(with_(epochs=0, seed=seed), digits)) for seed in (0, 0, 1)]
    assert torch.equal(untrained[0], untrained[1])
    assert not torch.equal(untrained[0], untrained[2])


def test_every_setting_reaches_the_fit(digits):
    settings = with_(
        epochs=4,
        batch_size=400,
        lr=0.02,
        sigma_lr=0.5,
        kl="exact",
        kl_warmup=(0.5, 0.75),
        init_log_sigma2=-4.0,
        threshold=-2.0,
        prune_while_training=True,
    )
    posterior = train(settings, digits)
    history = posterior.history
    assert [row["step"] for row in history] == [4, 8, 12, 16]
    # The last steps of the epochs are at 3/16, 7/16, 11/16 and 15/16 of training.
    assert history.column("kl_weight") == pytest.approx([0, 0, 0.75, 1])
    assert history[0]["lr"] == 0.02
    assert posterior.model.prior.kl == "exact"
    assert posterior.guide.init_log_sigma2 == -4.0
    assert posterior.threshold == -2.0
    assert any(log_alpha.isinf().any() for log_alpha in posterior.log_alpha().values())
    _, log_sigma2 = train(with_(epochs=1, sigma_lr=0.5), digits).guide.parameters_of("fc1.weight")
    # Adam's first step has the size of its rate, with either sign.
    assert (log_sigma2 + 10).abs().max().item() == pytest.approx(0.5, rel=1e-3)


def test_double_precision(digits):
    settings = with_(epochs=1, precision="64-true")
    posterior = train(settings, digits)
    assert parameters(posterior).dtype == torch.float64
    assert math.isfinite(evaluate(posterior, digits)["after_pruning"]["nll"])


@pytest.mark.parametrize("kl", KLS)
def test_every_kl_by_name(digits, kl):
    prior = train(with_(epochs=0, kl=kl), digits).model.prior
    if kl == "empirical_bayes":
        assert isinstance(prior, EmpiricalBayes)
    else:
        assert isinstance(prior, LogUniform)
        assert prior.kl == kl


def test_an_unknown_kl_gives_the_closest_match(digits):
    with pytest.raises(ValueError, match=r'unknown kl "exakt".*"exact".*empirical_bayes'):
        train(with_(kl="exakt"), digits)


def test_the_kl_that_cannot_prune_is_refused(digits):
    with pytest.raises(ValueError, match=r"(?s)holds for alpha <= 1 only.*extrapolate=True"):
        train(with_(kl="kingma2015"), digits)


def test_a_seed_of_more_than_64_bits_is_refused(digits):
    with pytest.raises(ValueError, match="seed must be an integer of 64 bits"):
        train(with_(seed=10**20), digits)


def test_the_test_set_is_not_looked_at_while_training(digits):
    history = train(TINY, digits).history
    assert not [name for name in history.columns if "val" in name or "test" in name]


def test_errors_are_those_of_the_plain_networks(digits):
    """The mean network, and the same with zeros, both without anything of ours."""
    posterior = train(with_(epochs=20, kl_warmup=(0.0, 0.0), threshold=-3.0), digits)
    found = evaluate(posterior, digits)
    x, y = digits.test
    for when, threshold in (("before_pruning", math.inf), ("after_pruning", -3.0)):
        net = posterior.prune(threshold)
        logits = net(x)
        wrong = int((logits.argmax(-1) != y).sum())
        weights = sum(int(p.count_nonzero()) for name, p in net.named_parameters() if "w" in name)
        assert found[when]["error_percent"] == pytest.approx(100 * wrong / 360)
        nll = torch.nn.functional.cross_entropy(logits, y).item()
        assert found[when]["nll"] == pytest.approx(nll, rel=1e-5)
        assert found[when]["weights"] == weights
    assert found["after_pruning"]["weights"] < found["before_pruning"]["weights"] == 64 * 6 + 60


def test_regression_is_reported_in_the_units_of_the_target():
    """A linear regression starts at zero: it predicts the mean, with its standard deviation."""
    diabetes = data.load("diabetes")
    task = make_task(diabetes)
    settings = with_(model="linear-regression", data="diabetes", epochs=0, batch_size=50)
    found = evaluate(train(settings, task), task)["after_pruning"]
    mean, sd = diabetes.y_train.mean(), diabetes.y_train.std(correction=0)
    rmse = (diabetes.y_test - mean).square().mean().sqrt()
    assert found["rmse"] == pytest.approx(rmse.item(), rel=1e-6)
    nll = -torch.distributions.Normal(mean, sd).log_prob(diabetes.y_test).mean()
    assert found["nll"] == pytest.approx(nll.item(), rel=1e-6)


def test_regression_data_are_standardised_by_the_training_set():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 3, generator=generator, dtype=torch.float64) * 7 + 2
    x[:, 1] = 4.0  # a constant column stays finite
    y = 100 * x[:, 0] + 5
    task = make_task(DataSet("made-up", x[:40], y[:40], x[40:], y[40:]))
    (x_train, y_train), (x_test, _) = task.train, task.test
    assert x_train.mean(0).tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    assert x_train.std(0, correction=0).tolist() == pytest.approx([1, 0, 1], abs=1e-6)
    assert y_train.shape == (40, 1)
    assert y_train.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    scale = torch.tensor(task.scaling["x_scale"], dtype=torch.float64)
    back = x_test.double() * scale + torch.tensor(task.scaling["x_mean"], dtype=torch.float64)
    assert torch.allclose(back, x[40:], atol=1e-5)  # float32 of numbers below 30
    assert make_task(DataSet("m", x, y, x, y), "64-true").train[0].dtype == torch.float64


def test_regression_learns():
    diabetes = data.load("diabetes")
    task = make_task(diabetes)
    settings = with_(model="linear-regression", data="diabetes", epochs=30, batch_size=353, lr=0.1)
    found = evaluate(train(settings, task), task)["after_pruning"]
    untrained = evaluate(train(with_(**{**vars(settings), "epochs": 0}), task), task)
    assert found["rmse"] < 0.85 * untrained["after_pruning"]["rmse"]
    assert found["nll"] < untrained["after_pruning"]["nll"]
