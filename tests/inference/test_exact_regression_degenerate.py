"""Where the noise vanishes, and where it only seems to."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from bayes_svdo.inference.exact_regression import (
    DegenerateObjectiveError,
    NoiseCollapseWarning,
    fit_vdard_regression,
)
from bayes_svdo.inference.exact_regression_data import natural_units, problems_of
from bayes_svdo.inference.exact_regression_degenerate import check_interpolation


@pytest.mark.parametrize("kl_weight", [0.5, 1.0])
def test_as_many_features_as_observations_need_a_kl_weight_above_one(
    kl_weight: float, problem
) -> None:
    x, y = problem(num=40, dim=60)
    with pytest.raises(
        DegenerateObjectiveError, match=r"(?s)60 features fit y .*kl_weight above 1"
    ):
        fit_vdard_regression(x, y, kl_weight=kl_weight)
    for remedy in ({"kl_weight": "aic"}, {"noise_precision": 2.0}, {"min_noise": 0.1}):
        fit = fit_vdard_regression(x, y, **({"kl_weight": kl_weight} | remedy))  # type: ignore[arg-type]
        assert fit.converged
        assert fit.kept[0]


def test_many_features_of_low_rank_are_not_degenerate(problem) -> None:
    x, y = problem(num=40, dim=10)
    fit = fit_vdard_regression(x.repeat(1, 6), y)
    assert fit.converged
    assert int(fit.kept.sum()) <= 10


@pytest.mark.parametrize("method", ["joint", "alternating"])
def test_a_perfect_fit_is_reported_with_what_to_do(method: str, problem) -> None:
    x, _ = problem()
    y = 2 * x[:, 0] - x[:, 4] + 1
    with pytest.raises(DegenerateObjectiveError, match=r"(?s)fit y without error.*noise_precision"):
        fit_vdard_regression(x, y, method=method)  # type: ignore[arg-type]
    fit = fit_vdard_regression(x, y, min_noise=1e-4, method=method)  # type: ignore[arg-type]
    assert torch.allclose(
        fit.loc, torch.eye(12).double()[0] * 2 - torch.eye(12).double()[4], atol=1e-4
    )
    assert torch.allclose(fit.beta, 1 / (1e-8 * y.var()), rtol=1e-9)


def test_noise_of_a_billionth_is_no_perfect_fit(problem) -> None:
    x, y = problem()
    y = 2 * x[:, 0] - x[:, 4] + 1e-9 * y
    fit = fit_vdard_regression(x, y, kl_weight="bic")
    assert fit.kept[[0, 4]].all()
    assert abs(float(fit.loc[0]) - 2) < 1e-8


def test_the_problems_at_fault_are_named(problem) -> None:
    x, y = problem()
    with pytest.raises(DegenerateObjectiveError, match=r"constant in problem\(s\) 1, 2"):
        fit_vdard_regression(x, torch.stack((y, 0 * y, 0 * y + 3)))
    with pytest.raises(DegenerateObjectiveError, match=r"without error in problem\(s\) 1:"):
        fit_vdard_regression(x, torch.stack((y, x[:, 2])))


def test_interpolation_is_found_where_the_features_span_the_target(problem) -> None:
    x, y = problem(num=20, dim=30)
    full = problems_of(natural_units(x[None], y[None], True), 19, 1.0, None, 0.0, "exact")
    with pytest.raises(DegenerateObjectiveError, match="30 features fit y without error"):
        check_interpolation(full, 20)
    thin = torch.cat((x[:, :5], x[:, :5] @ x[:5, :25]), 1)
    check_interpolation(
        problems_of(natural_units(thin[None], y[None], True), 19, 1.0, None, 0.0, "exact"), 20
    )


@pytest.mark.parametrize("kl_weight", [1.001, 1.01, 1.05, 1.1])
@pytest.mark.parametrize("seed", range(3))
def test_noise_taken_for_signal_is_told_with_a_remedy_that_works(kl_weight: float, seed) -> None:
    """Ten of 200 features matter for 100 observations; the noise is 0.5."""
    x, y, x_new, y_new = many_features(seed, num=100, dim=200, relevant=10, noise=0.5)
    words = r"(?s)collapsed: with kl_weight = 1\.\d+, \d+ of 200 .*Try kl_weight of 2 or more"
    with pytest.warns(NoiseCollapseWarning, match=words):
        found = fit_vdard_regression(x, y, kl_weight=kl_weight)
    assert deviations(found, x_new, y_new) > 2.2
    assert deviations(fit_vdard_regression(x, y, kl_weight=2.0), x_new, y_new) < 1.3


@pytest.mark.parametrize(("num", "dim"), [(50, 200), (30, 300), (60, 600)])
def test_many_more_features_need_a_larger_kl_weight(num: int, dim: int) -> None:
    x, y, x_new, y_new = many_features(0, num=num, dim=dim, relevant=num // 5, noise=0.5)
    with pytest.warns(NoiseCollapseWarning) as seen:
        fit_vdard_regression(x, y, kl_weight=1.05)
    remedy = float(str(seen[0].message).split("kl_weight of ")[1].split()[0])
    assert 2 < remedy < 5
    assert deviations(fit_vdard_regression(x, y, kl_weight=remedy), x_new, y_new) < 1.8


@pytest.mark.parametrize(
    "settings",
    [
        {"relevant": 3, "noise": 1e-6, "kl_weight": "aic"},
        {"relevant": 3, "noise": 1e-6, "kl_weight": "bic"},
        {"relevant": 25, "noise": 0.1, "kl_weight": 2.0},
        {"relevant": 25, "noise": 0.1, "kl_weight": 1.5},
        {"relevant": 10, "noise": 0.5, "kl_weight": 1.5},
        {"relevant": 0, "noise": 1.0, "kl_weight": 1.5},
        {"relevant": 25, "noise": 0.1, "kl_weight": 1.01, "dim": 100},
        {"relevant": 10, "noise": 0.5, "kl_weight": 1.01, "dim": 100},
        {"relevant": 3, "noise": 0.0, "kl_weight": 1.05, "min_noise": 1e-3},
        {"relevant": 30, "noise": 1e-3, "kl_weight": "aic", "dim": 100},
    ],
    ids=str,
)
def test_a_sparse_truth_is_no_false_alarm_however_little_its_noise(settings) -> None:
    options = {key: settings[key] for key in ("kl_weight", "min_noise") if key in settings}
    dim = settings.get("dim", 200)
    x, y, x_new, y_new = many_features(
        0, num=100, dim=dim, relevant=settings["relevant"], noise=settings["noise"]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fit_vdard_regression(x, y, **options)
    assert found.kept[: min(settings["relevant"], 3)].all()
    assert settings["noise"] == 0 or deviations(found, x_new, y_new) < 1.8


def test_the_collapse_of_one_problem_in_a_batch_is_told_apart() -> None:
    x, y, _, _ = many_features(0, num=100, dim=200, relevant=3, noise=1.0)
    exact = torch.cat((x[:, :3], x[:, :3] @ x[:3, :197]), 1)  # of rank 3
    with pytest.warns(NoiseCollapseWarning, match=r"collapsed in problem\(s\) 1: "):
        fit_vdard_regression(torch.stack((exact, x)), y, kl_weight=1.01)


def many_features(seed: int, *, num: int, dim: int, relevant: int, noise: float) -> tuple:
    """Standard normal features, the first with weights of 1; also 500 to test on."""
    rng = np.random.default_rng(seed)
    x, e = rng.standard_normal((num, dim)), noise * rng.standard_normal(num)
    x_new, e_new = rng.standard_normal((500, dim)), noise * rng.standard_normal(500)
    w = (np.arange(dim) < relevant) * 1.0
    return tuple(torch.from_numpy(v) for v in (x, x @ w + e, x_new, x_new @ w + e_new))


def deviations(found, x: torch.Tensor, y: torch.Tensor) -> float:
    """Root mean square of the errors in predictive standard deviations: 1 if these are right."""
    mean, std = found.predict(x, return_std=True)
    return float(((y - mean) / std).square().mean().sqrt())
