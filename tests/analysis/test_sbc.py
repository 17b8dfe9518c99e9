from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from bayes_svdo.analysis import SimulatedCalibration, simulation_based_calibration

DRAWS = 99
NOISE = 0.5


def simulate():
    """Two weights from N(0, 1), each seen once through noise."""
    truth = torch.randn(2)
    return truth, truth + NOISE * torch.randn(2)


def posterior(narrow=1.0, shift=0.0):
    """The exact one for 1 and 0."""
    precision = 1 + 1 / NOISE**2

    def infer(data):
        mean = data / NOISE**2 / precision + shift
        return mean + narrow * precision**-0.5 * torch.randn(DRAWS, 2)

    return infer


def test_ranks_of_an_exact_posterior_are_uniform():
    """The smaller of two p-values above 1e-4: fails for 1 seed in 5,000."""
    found = simulation_based_calibration(simulate, posterior(), 400, seed=0)
    assert found.ranks.shape == (400, 2)
    assert found.num_draws == DRAWS
    assert found.pvalues().min() > 1e-4
    for level in (0.5, 0.9):
        assert abs(found.coverage(level) - level) < 4 * found.coverage_error(level)


def test_ranks_of_a_narrow_posterior_are_at_the_ends():
    found = simulation_based_calibration(simulate, posterior(0.4), 200, seed=0)
    assert found.pvalues().max() < 1e-6
    assert found.coverage(0.9) < 0.65
    counts = found.histogram(10)
    assert counts[0] + counts[-1] > 0.4 * 400


def test_ranks_of_a_wide_posterior_are_in_the_middle():
    found = simulation_based_calibration(simulate, posterior(3.0), 200, seed=0)
    assert found.coverage(0.5) > 0.8


def test_ranks_of_a_shifted_posterior_are_on_one_side():
    found = simulation_based_calibration(simulate, posterior(shift=1.0), 100, seed=0)
    assert found.ranks.mean() < 0.2 * DRAWS


def test_ranks_count_draws_below_and_break_ties_at_random():
    found = simulation_based_calibration(
        lambda: (torch.tensor([0.5, 0.0]), None),
        lambda data: torch.stack([torch.linspace(0, 1, 99), torch.zeros(99)], 1)[
            torch.randperm(99)
        ],
        200,
        seed=0,
    )  # 0.5 is the middle one of 99: 49 below, one tie
    assert set(found.ranks[:, 0]) == {49, 50}
    assert scipy.stats.kstest(found.ranks[:, 1] / 99, "uniform").pvalue > 1e-4


def test_uniform_ranks_have_the_coverage_and_the_pvalue():
    found = SimulatedCalibration(np.tile(np.arange(200), 5)[:, None], 199)
    assert found.coverage(0.5) == 0.5
    assert found.coverage(0.95) == 0.95
    assert found.histogram(20).tolist() == [50] * 20
    assert found.pvalues(20).tolist() == [1.0]


def test_bins_that_do_not_divide_the_ranks_are_weighed_by_what_they_hold():
    found = SimulatedCalibration(np.tile(np.arange(10), 30)[:, None], 9)
    assert found.histogram(3).tolist() == [90, 120, 90]
    assert found.pvalues(3).tolist() == [1.0]


def test_the_pvalue_is_that_of_scipy():
    ranks = np.random.default_rng(0).integers(0, 100, (300, 2))
    found = SimulatedCalibration(ranks, 99)
    for weight, p in enumerate(found.pvalues(10)):
        counts = found.histogram(10, weight)
        assert p == pytest.approx(scipy.stats.chisquare(counts).pvalue)


def test_the_error_of_the_coverage_is_that_of_repetitions():
    """Weights that are always covered together count once."""
    together = SimulatedCalibration(np.repeat([[50], [0], [50], [0]], 100, axis=1), 99)
    assert together.coverage(0.5) == 0.5
    assert together.coverage_error(0.5) == pytest.approx(np.std([1, 0, 1, 0], ddof=1) / 2)
    assert np.isnan(SimulatedCalibration(np.zeros((1, 3), int), 99).coverage_error(0.5))


def test_a_seed_reproduces_it_and_leaves_the_state():
    state = torch.get_rng_state()
    first, again = (simulation_based_calibration(simulate, posterior(), 5, seed=1) for _ in "ab")
    np.testing.assert_array_equal(first.ranks, again.ranks)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_is_refused():
    good = posterior()
    with pytest.raises(ValueError, match="repetitions must be an integer of at least 1"):
        simulation_based_calibration(simulate, good, 0)
    with pytest.raises(ValueError, match=r"they gave \(2,\) and \(9, 3\)"):
        simulation_based_calibration(simulate, lambda data: torch.zeros(9, 3), 1)
    sizes = iter([9, 10])
    with pytest.raises(ValueError, match="but gave 9, then 10"):
        simulation_based_calibration(simulate, lambda data: torch.zeros(next(sizes), 2), 2)
    with pytest.raises(ValueError, match="the draws"):
        simulation_based_calibration(simulate, lambda data: torch.full((9, 2), torch.nan), 1)
    found = SimulatedCalibration(np.zeros((2, 1), int), 9)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, but is 1"):
        found.coverage(1)
    for bins in (1, 11):
        with pytest.raises(ValueError, match=f"bins must lie in 2..10, but is {bins}"):
            found.histogram(bins)
