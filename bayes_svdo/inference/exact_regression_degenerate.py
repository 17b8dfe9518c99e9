"""Where the objective of VD-ARD regression has no maximum, or one that takes noise for signal."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from bayes_svdo.inference.exact_regression_arrays import Array
from bayes_svdo.inference.exact_regression_ascent import Problems, State

# Of the degrees of freedom, that weights may use up (see warn_of_collapse); less where features
# that mean nothing would by themselves be kept in so large a number. Chosen on made-up data with
# 1 to 10 times as many features as observations, 0 to 80 % of the observations relevant.
_LARGEST_SHARE = 0.35
_SUSPECT_SHARE, _MUCH_NOISE = 0.3, 0.55


class DegenerateObjectiveError(ValueError):
    """The objective has no maximum: the noise would vanish and the ELBO grow without bound."""


class NoiseCollapseWarning(UserWarning):
    """The noise is underestimated: too many of the observations went into choosing features."""


def chi_square_threshold(share: float) -> float:
    """The ``kl_weight`` that keeps this share of weights that are truly 0."""
    # The quantile of chi-square with one degree of freedom.
    return 2 * float(torch.erfinv(torch.tensor(1 - share, dtype=torch.float64)).square())


def which(problems: Tensor) -> str:
    """Which problems of a batch are concerned, for an error message."""
    if problems.numel() == 1:
        return ""
    index = problems.nonzero().flatten().tolist()
    return f" in problem(s) {', '.join(map(str, index[:5]))}{', ...' if len(index) > 5 else ''}"


_REMEDY = (
    "noise_precision if the noise is known, or min_noise=1e-3 to bound it from below by a fraction "
    "of the standard deviation of y."
)


def check_interpolation(problems: Problems, num_data: int) -> None:
    """With as many degrees of freedom as data, the noise vanishes at no price in the KL."""
    x_rows, target = problems.xp.tensor(problems.x_rows), problems.xp.tensor(problems.target)
    basis, size, _ = torch.linalg.svd(x_rows.mT, full_matrices=False)
    eps = torch.finfo(size.dtype).eps * max(x_rows.shape[-2:])
    basis = basis * (size > eps * size[..., :1])[..., None, :]
    left = target - (basis @ (basis.mT @ target[..., None]))[..., 0]
    perfect = left.norm(dim=-1) <= _noise_floor(problems)
    if perfect.any():
        dim = x_rows.shape[-2]
        raise DegenerateObjectiveError(
            f"the {dim} features fit y without error{which(perfect)}, n_samples = {num_data}, and "
            f"with kl_weight = {problems.kl_weight:g} <= 1 that costs no more than it gains: the "
            "ELBO has no maximum as the noise goes to 0.\n  Try kl_weight above 1, better "
            f"{_sufficient_kl_weight(dim, problems.num_data):g} or more, {_REMEDY}"
        )


def _sufficient_kl_weight(dim: int, degrees: float) -> float:
    """A ``kl_weight`` from which on the noise was underestimated by no more than a third.

    With that many features, of which those that mean nothing would by themselves take up a third
    of the degrees of freedom; and 2 or more. Rounded up.
    """
    share = min(degrees / (3 * dim), 0.5)
    return max(2.0, math.ceil(10 * chi_square_threshold(share)) / 10)


def warn_of_collapse(
    log_alpha: Tensor,
    beta: Tensor,
    y_scale: Tensor,
    degrees: int,
    weight: float,
    min_noise: float,
) -> None:
    """Warn where features, as many as degrees of freedom, explain noise as if it were signal.

    The kept weights then use up a large part of the degrees of freedom, ``sum 1 / (1 + alpha)``,
    and the more the noise shrinks, the more significant they look. Few relevant features use up
    little, however small the noise: what is suspect is the number of them, not an exact fit. This
    is a rule of thumb, chosen for the exact KL: neither an alarm nor its absence is proof.
    ``benchmarks/noise_collapse.py`` counts how often it is right.

    Args:
        log_alpha: Of the fit, (B, D).
        beta: Precision of the noise, (B,).
        y_scale: Norm of the target about its mean, (B,).
        degrees: Degrees of freedom.
        weight: The weight of the KL.
        min_noise: Bound of the noise; where it is reached, it is the user's and not our answer.
    """
    dim = log_alpha.shape[-1]
    if dim < degrees:
        return
    enough = _sufficient_kl_weight(dim, degrees)
    from_noise = dim / degrees * math.erfc(math.sqrt(weight / 2))  # of orthogonal features
    used = torch.sigmoid(-log_alpha).sum(-1) / degrees
    collapsed = used > (_SUSPECT_SHARE if from_noise > _MUCH_NOISE else _LARGEST_SHARE)
    noise = (degrees / beta).sqrt() / y_scale
    collapsed &= noise > 1.001 * min_noise
    if weight >= enough or not collapsed.any():
        return
    worst = int((used * collapsed).argmax())
    warnings.warn(
        f"the noise may have collapsed{which(collapsed)}: with kl_weight = {weight:g}, "
        f"{int(log_alpha[worst].isfinite().sum())} of {dim} features are kept and use up "
        f"{float(used[worst]):.0%} of {degrees} degrees of freedom; the noise that is left is "
        f"{float(noise[worst]):.2g} of the standard deviation of y. Predictive deviations may be "
        f"far too small.\n  Try kl_weight of {enough:g} or more, or noise_precision where known.",
        NoiseCollapseWarning,
        stacklevel=3,
    )


def _noise_floor(problems: Problems) -> float:
    """Root of the noise's share of the target, below which it is taken for rounding."""
    return 1e3 * float(problems.xp.finfo(problems.target.dtype).eps)


def check_noise(problems: Problems, state: State, index: Array, num: int) -> None:
    """Stop an ascent that has no end."""
    bound = problems.num_data / _noise_floor(problems) ** 2
    if float(state.noise_precision.max()) >= bound:
        vanished = (state.noise_precision >= bound).any(-1)
        all_problems = torch.zeros(num, dtype=torch.bool, device="cpu")
        all_problems[problems.xp.tensor(index).cpu()] = problems.xp.tensor(vanished).cpu()
        size = int(state.kept.sum(-1)[vanished].min())
        raise DegenerateObjectiveError(
            f"{size} features fit y without error{which(all_problems)}: the ELBO grows without "
            f"bound as the noise goes to 0.\n  Try {_REMEDY}"
        )
