"""Newton and FISTA, apart and together."""

from __future__ import annotations

import pytest
import torch

from bayes_svdo.inference.l1 import fit_l1_logistic


def test_newton_and_fista_find_the_same_minimum(correlated):
    x, y = map(torch.as_tensor, correlated(200, 15, 3))
    newton = fit_l1_logistic(x, y, C=0.5, tol=1e-10, solver="newton")
    fista = fit_l1_logistic(x, y, C=0.5, tol=1e-10, solver="fista")
    assert newton.objective == pytest.approx(fista.objective, rel=2e-10)
    assert torch.equal(newton.coef == 0.0, fista.coef == 0.0)
    assert newton.n_iter < 20 < fista.n_iter


def test_fista_hands_over_to_newton_when_its_system_has_become_affordable(monkeypatch, correlated):
    x, y = map(torch.as_tensor, correlated(200, 15, 3))
    alone = fit_l1_logistic(x, y, C=0.3, tol=1e-9, solver="fista")
    held = int(alone.coef.count_nonzero()) + 3
    monkeypatch.setattr("bayes_svdo.inference.l1_solver._LARGEST_SYSTEM", held + 1)
    both = fit_l1_logistic(x, y, C=0.3, tol=1e-9)
    assert held + 1 < alone.coef.numel()
    assert both.objective == pytest.approx(alone.objective, rel=2e-9)
    assert both.n_iter < alone.n_iter
