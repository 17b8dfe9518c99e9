"""Data that the tests of several modules make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, TraceAnalyticKL_ELBO
from bayes_svdo.inference.compiled import compile_objective
from bayes_svdo.inference.exact_regression_arrays import TorchArrays
from bayes_svdo.inference.exact_regression_curves import tabulate
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical


@pytest.fixture(scope="session")
def problem():
    """A function that makes a regression: correlated columns, three of which matter."""

    def make(num=80, dim=12, seed=0, correlation=0.5, noise=0.7):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(num, dim, generator=generator, dtype=torch.float64)
        for d in range(1, dim):
            x[:, d] = correlation * x[:, d - 1] + math.sqrt(1 - correlation**2) * x[:, d]
        w = torch.zeros(dim, dtype=torch.float64)
        w[[0, 3, 5]] = torch.tensor([1.0, -0.6, 0.3], dtype=torch.float64)
        y = x @ w + noise * torch.randn(num, generator=generator, dtype=torch.float64) + 2.0
        return x, y

    return make


@pytest.fixture(scope="session")
def noisy():
    """A function that makes labelled tensors; the classes differ in the first feature."""

    def make(num_classes, n=60, p=8):
        generator = torch.Generator().manual_seed(num_classes)
        x = torch.randn(n, p, generator=generator, dtype=torch.float64)
        y = torch.randint(num_classes, (n,), generator=generator)
        y[:num_classes] = torch.arange(num_classes)
        x[:, 0] += y
        return x, y

    return make


@pytest.fixture(scope="session")
def correlated():
    """A function that makes labelled arrays; features share two factors, correlations near 0.7."""

    def make(n, p, num_classes, seed=0):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(n, p)) + rng.normal(size=(n, 2)) @ rng.normal(size=(2, p))
        coef = np.zeros((num_classes, p))
        coef[:, :5] = rng.normal(size=(num_classes, 5))
        y = (x @ coef.T + rng.gumbel(size=(n, num_classes))).argmax(1)
        return x, y

    return make


@pytest.fixture
def torch_arrays(monkeypatch):
    """VD-ARD regression computes with torch's arrays on a CPU too, as on other devices."""
    tabulate.cache_clear()
    monkeypatch.setattr(
        "bayes_svdo.inference.exact_regression_curves.arrays_on", lambda device: TorchArrays
    )
    yield
    tabulate.cache_clear()


@pytest.fixture
def traced_only(monkeypatch):
    """What is traced runs as it is: compilers take their time."""
    monkeypatch.setattr("bayes_svdo.inference.graphs._compiled", lambda graph, *_: graph)


@pytest.fixture(scope="session")
def make_compiled():
    """A function that compiles the objective of a classifier."""

    def make(net, backend="inductor", sigma="weight", **elbo):
        torch.manual_seed(0)
        model = BayesianNetwork(net, Categorical(), num_data=1000)
        guide = AdditiveNoiseGuide(model, init_log_sigma2=-3.0, sigma=sigma)
        return compile_objective(TraceAnalyticKL_ELBO(**elbo), model, guide, backend=backend)

    return make


@pytest.fixture(scope="session")
def evaluate():
    """A function to an objective's value and gradients, of the same random numbers every time."""

    def evaluate(objective, kl_weight, *batch):
        objective.zero_grad()
        torch.manual_seed(5)
        with local_parameters():
            value = objective(kl_weight, *batch)
            value.loss.backward()
        return value, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}

    return evaluate


@pytest.fixture(scope="session")
def check_same_as_eager(evaluate):
    """A function that finds the same value and gradients as without compilation."""

    def check(compiled, *batch, rtol=1e-5):
        full = torch.ones((), dtype=torch.float64)
        for kl_weight in (full, 0.1 * full):
            found, gradients = evaluate(compiled, kl_weight, *batch)
            expected, others = evaluate(compiled.objective, kl_weight, *batch)
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)
            assert {f"objective.{name}" for name in others} == set(gradients)
            for name, other in others.items():
                error = (gradients[f"objective.{name}"] - other).norm()
                assert error <= rtol * other.norm() + 1e-6, name

    return check


@pytest.fixture
def branching():
    """A network that goes either way, depending on a value."""

    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(64, 10)

        def forward(self, x):
            output = self.inner(x)
            return output if output.sum() > 0 else -output

    return Branching()
