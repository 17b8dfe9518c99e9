"""Data that the tests of several modules make."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch


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
