"""VD-ARD linear regression in closed form, without sampling and without step sizes.

The model is ``y = x w + b + noise`` with the log-uniform prior on every weight, a flat prior on
the intercept and a factorised Gaussian posterior ``q(w_d) = N(loc_d, alpha_d loc_d²)``. For a
linear model with Gaussian noise the objective of sparse variational dropout is explicit::

    ELBO = N/2 log(beta / 2 pi) - beta/2 (|y - X loc|² + sum_d s_d alpha_d loc_d²)
           - kl_weight sum_d KL(alpha_d),                            s_d = sum_n x_nd²

and so is its maximum over one weight (loc_d, alpha_d): with ``z²`` the squared z-score of the
weight against the residual that leaves it out, the weight is pruned, loc_d = 0 and alpha_d = inf,
if and only if ``z² <= kl_weight``. Hence no threshold on log_alpha, exact zeros, and a pruned
weight may come back.

The corrected formulas of the 2016 poster by Molchanov, Ashukha and Vetrov ("Dropout-based automatic
relevance determination"), with the exact KL. The log-uniform prior is improper: the ELBO is an
objective, and no evidence to compare models with different priors by.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from bayes_svdo.inference.exact_regression_alternation import alternate, prune
from bayes_svdo.inference.exact_regression_arrays import Array, Arrays
from bayes_svdo.inference.exact_regression_ascent import (
    Problems,
    State,
    evaluate,
    iterate,
    join,
    of_start,
    start,
)
from bayes_svdo.inference.exact_regression_curves import KL
from bayes_svdo.inference.exact_regression_data import (
    Method,
    NaturalUnits,
    Start,
    check_beside,
    check_constant,
    check_options,
    check_precision,
    checked_data,
    checked_inputs,
    given_precision,
    kl_weight_of,
    natural_units,
    problems_of,
    start_names,
)
from bayes_svdo.inference.exact_regression_degenerate import (
    DegenerateObjectiveError,
    NoiseCollapseWarning,
    check_interpolation,
    check_noise,
    warn_of_collapse,
)

__all__ = [
    "DegenerateObjectiveError",
    "NoiseCollapseWarning",
    "VDARDRegression",
    "fit_vdard_regression",
]


@dataclass(frozen=True)
class VDARDRegression:
    """A fitted VD-ARD regression, or a batch of them.

    Attributes:
        loc: Posterior means of the weights, (..., D); exactly 0 where pruned.
        log_alpha: log of the noise-to-signal ratio sigma²/loc², (..., D); inf where pruned.
        sigma2: Posterior variances of the weights, (..., D); 0 where pruned. They may overflow or
            underflow where ``sigma`` does not.
        relevance: z² of each weight, (..., D): its squared z-score against the residual that
            leaves it out. A weight is kept if it exceeds ``kl_weight``.
        intercept: Posterior mean of the intercept, (...); 0 if none was fitted.
        beta: Precision of the noise, (...).
        kl_weight: The weight of the KL, as a number.
        elbo: The objective at the solution, in nats, (...).
        elbo_trace: The objective after every update, from the chosen start on, (..., T); repeats
            the last value where other problems of the batch took longer.
        n_iter: Iterations of the chosen start, (...).
        converged: Whether it stopped because nothing more was to gain, (...).
        starts: The names of the starts that were tried.
        start_elbo: The objective each of them reached, (..., S). Starts that came close to each
            other went on as the better one.
        x_mean: Mean of each feature, (..., D); 0 without an intercept.
        num_data: Number of observations N.
        fit_intercept: Whether there is an intercept.
    """

    loc: Tensor
    log_alpha: Tensor
    sigma2: Tensor
    relevance: Tensor
    intercept: Tensor
    beta: Tensor
    kl_weight: float
    elbo: Tensor
    elbo_trace: Tensor
    n_iter: Tensor
    converged: Tensor
    starts: tuple[str, ...]
    start_elbo: Tensor
    x_mean: Tensor
    num_data: int
    fit_intercept: bool

    @property
    def kept(self) -> Tensor:  # (..., D)
        """Which weights are not pruned."""
        return self.log_alpha.isfinite()

    @property
    def sigma(self) -> Tensor:  # (..., D)
        """Posterior standard deviations of the weights; 0 where pruned."""
        return torch.where(self.kept, (0.5 * self.log_alpha).exp() * self.loc.abs(), 0.0)

    @property
    def start(self) -> Tensor:  # (...)
        """The start that reached the highest ELBO, as an index into ``starts``."""
        return self.start_elbo.argmax(-1)

    @overload
    def predict(self, x: Tensor, return_std: Literal[False] = False) -> Tensor: ...

    @overload
    def predict(self, x: Tensor, return_std: Literal[True]) -> tuple[Tensor, Tensor]: ...

    def predict(
        self, x: Tensor, return_std: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:  # (..., M, D) -> (..., M)
        """The mean of the predictive distribution, and its standard deviation if asked for.

        The predictive distribution is Gaussian; its variance is that of the noise, of the
        intercept given the weights (1/(N beta), exact under its flat prior) and of the weights.

        Args:
            x: Inputs, (..., M, D).
            return_std: Also return the standard deviation, (..., M).

        Raises:
            TypeError: ``x`` is not a dense real tensor.
            ValueError: ``x`` has another number of features, leading dimensions that do not
                broadcast with those of the fit, NaN or infinite values, or is on another device.
        """
        x = checked_inputs(x, self.loc.shape[-1], self.loc.dtype)
        check_beside(x, self.loc)
        mean = (x @ self.loc[..., None])[..., 0] + self.intercept[..., None]
        if not return_std:
            return mean
        centred = x - self.x_mean[..., None, :]
        # Multiplied before they are squared: the unit of x drops out, and its square may overflow.
        variance = (centred * self.sigma[..., None, :]).square().sum(-1)
        noise = (1 + self.fit_intercept / self.num_data) / self.beta
        return mean, (variance + noise[..., None]).sqrt()


def fit_vdard_regression(
    x: Tensor,
    y: Tensor,
    *,
    kl: KL = "exact",
    kl_weight: float | str = 1.0,
    method: Method = "joint",
    fit_intercept: bool = True,
    starts: Sequence[Start] | None = None,
    noise_precision: float | Tensor | None = None,
    min_noise: float = 0.0,
    max_iter: int = 1000,
    tol: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> VDARDRegression:  # (..., N, D), (..., N)
    """Fit ``y = x w + b + noise`` under the log-uniform prior, exactly.

    The result does not depend on the units of ``y`` or of any column of ``x``. It is a local
    maximum that no change of a single weight improves, even with all other means refitted; the
    best of several starts is kept. On a CPU the arithmetic is NumPy's, with the threads of its BLAS
    (``OMP_NUM_THREADS``, threadpoolctl), on other devices torch's.

    Args:
        x: Inputs, (..., N, D), any real dtype; leading dimensions are separate problems.
        y: Targets, (..., N); leading dimensions broadcast with those of ``x``.
        kl: The KL of a weight: ``"exact"``, ``"molchanov2017"``, ``"poster2016"`` (see
            :func:`bayes_svdo.distributions.kl_log_uniform`) or ``"empirical_bayes"``, with which
            the kept weights shrink as in a relevance vector machine. The pruning rule is the same.
        kl_weight: How many nats a nat of KL costs. It is also the threshold of the pruning rule
            ``z² <= kl_weight``, where z² is chi-square with one degree of freedom for a weight
            that is truly 0: 1.0 is the ELBO itself and keeps 32 % of them in an orthogonal design,
            ``"aic"`` is 2 (16 %), ``"bic"`` is log N, and ``"5%"`` (any percentage) is the
            threshold that keeps 5 %.
        method: ``"joint"``, joint optima of (loc, alpha) with a Newton method, or
            ``"alternating"``, the poster's alternation of loc given alpha and alpha given loc,
            to compare: the same optima in many more iterations.
        fit_intercept: Integrate out an intercept with a flat prior: its posterior given w is
            exactly N(mean(y) - mean(x) w, 1/(N beta)), and one degree of freedom goes to it, so N
            becomes N - 1 in the ELBO and in the estimate of the noise.
        starts: Where to start: ``"zero"`` (no weights but the few that enter first), ``"ols"``
            (least squares; needs fewer features than observations) or ``"ridge"`` (alpha = 1 for
            all). Default: ``("zero", "ols")`` as far as possible, for the alternation ``("ols",)``
            or else ``("ridge",)``.
        noise_precision: beta, a number or a tensor (...); None: learned.
        min_noise: Smallest standard deviation of the noise that may be learned, as a fraction of
            the standard deviation of ``y``. With 0, a perfect fit is an error.
        max_iter: Largest number of iterations per start.
        tol: Stop when an iteration gains less than this many nats per observation; default 1e-9,
            in float32 1e-6.
        dtype: float64 or float32: what is computed in, and the dtype of the result.

    Raises:
        TypeError: ``x`` or ``y`` is not a dense real tensor, they are on different devices, or an
            option is of the wrong type.
        ValueError: Wrong shapes, NaN or infinite values, too few observations, or an option out of
            range.
        DegenerateObjectiveError: The objective has no maximum, because the data can be fitted
            without error at too low a price: a constant ``y``, a ``y`` that is an exact linear
            function of few features, or no fewer features than observations with ``kl_weight``
            of 1 or less.

    Warns:
        NoiseCollapseWarning: There are no fewer features than observations, ``kl_weight`` is
            little above 1, and what was kept explains noise; the message has the remedy.

    >>> x = torch.eye(4, dtype=torch.float64).repeat(25, 1)
    >>> y = x @ torch.tensor([2.0, -1.0, 0.0, 0.0], dtype=torch.float64)
    >>> y = y + 0.1 * torch.linspace(-1, 1, 100, dtype=torch.float64)
    >>> fit_vdard_regression(x, y, kl_weight="bic", fit_intercept=False).kept
    tensor([ True,  True, False, False])
    """
    fit_intercept = check_options(kl, method, fit_intercept, min_noise, max_iter, tol)
    min_noise = float(min_noise)  # NumPy's scalars would decide the precision of the result
    x, y = checked_data(x, y, dtype)
    num_data, dim = x.shape[-2:]
    degrees = num_data - fit_intercept
    weight = kl_weight_of(kl_weight, num_data)
    if degrees < 1:
        raise ValueError(
            f"x has {num_data} observation(s), n_samples = {num_data}; an intercept and a noise "
            "level need at least 2."
        )
    names = start_names(starts, method, dim, degrees)
    with torch.inference_mode(), np.errstate(all="ignore"):
        data = natural_units(x.flatten(0, -3), y.flatten(0, -2), fit_intercept)
        precision = given_precision(noise_precision, y.shape[:-1], data.y_scale)
        if precision is None:
            check_constant(data)
        problems = problems_of(data, degrees, weight, precision, min_noise, kl)
        if precision is None and min_noise == 0 and weight <= 1 and dim >= degrees:
            check_interpolation(problems, num_data)
        rate = (1e-9 if dtype == torch.float64 else 1e-6) if tol is None else float(tol)
        ends, trace = _run(problems, names, method, max_iter, rate * num_data)
        if method == "alternating":
            ends, trace = _pruned(problems, ends, trace)
    # Not inference mode: users may go on with autograd.
    with torch.no_grad(), np.errstate(all="ignore"):
        found = _best(problems, data, ends, trace, num_data if fit_intercept else None)
    if precision is None:
        check_precision(found["beta"], data.y_scale)
        warn_of_collapse(
            found["log_alpha"], found["beta"], data.y_scale, degrees, weight, min_noise
        )
    batch = x.shape[1:-2]
    shaped = {name: value.view((*batch, *value.shape[1:])) for name, value in found.items()}
    for name in ("loc", "log_alpha", "sigma2", "relevance", "x_mean"):
        shaped[name] = shaped[name][..., :dim]  # a problem without features was given one
    return VDARDRegression(
        **shaped,
        kl_weight=weight,
        starts=names,
        num_data=num_data,
        fit_intercept=fit_intercept,
    )


class _Ends(NamedTuple):
    """Where the starts of every problem ended; (B, 1, ...) where all starts have become one."""

    log_alpha: Array  # (B, S, D)
    loc: Array  # (B, S, D)
    residual: Array  # (B, S, M)
    noise_precision: Array  # (B, S)
    n_iter: Array  # (B, S)
    converged: Array  # (B, S)

    @classmethod
    def of(cls, state: State, n_iter: Array, converged: Array) -> _Ends:
        """Those of a state."""
        return cls(
            state.log_alpha, state.loc, state.residual, state.noise_precision, n_iter, converged
        )

    def store(self, index: Array, rows: _Ends) -> None:
        """Write those of the problems at ``index``."""
        for field, values in zip(self, rows, strict=True):
            field[index] = values


def _run(
    problems: Problems, names: tuple[str, ...], method: Method, max_iter: int, tolerance: float
) -> tuple[_Ends, Array]:  # and the objectives on the way there, (B, S, T)
    xp = problems.xp
    state = start(problems, names)
    finished = state.elbo != state.elbo  # none yet
    learns_noise = problems.noise_precision is None and math.isinf(problems.largest_noise_precision)
    num = len(state.elbo)
    index = xp.count(num, state.elbo)  # problems still at work
    n_iter = xp.zeros_like(state.active[..., 0])
    trace = [(index, state.elbo)]
    ends: _Ends | None = None  # once a problem has ended before the others
    for _ in range(max_iter):
        n_iter = n_iter + ~finished
        if method == "joint":
            state, finished = join(xp, *iterate(problems, state, finished, tolerance))
            trace.append((index, state.elbo))
        else:
            before = state.elbo
            state, objectives = alternate(problems, state)
            finished = finished | (state.elbo - before <= tolerance)
            trace += [(index, elbo) for elbo in objectives]
        if learns_noise:
            check_noise(problems, state, index, num)
        if finished.all():
            break
        live = ~finished.all(-1)
        # So that a few slow problems do not hold up the others.
        if len(live) > 1 and int(live.sum()) <= len(live) // 2:
            found = _Ends.of(state, n_iter, finished)
            if ends is None:
                ends = _Ends(*map(xp.empty_like, found))
            ends.store(index, found)
            problems, index, n_iter = problems.take(live), index[live], n_iter[live]
            state = State(*(field[live] for field in state))
            finished = finished[live]
    found = _Ends.of(state, n_iter, finished)
    if ends is None:
        return found, _joined(xp, trace)
    ends.store(index, found)
    return ends, _joined(xp, trace)


def _joined(xp: Arrays, trace: list[tuple[Array, Array]]) -> Array:  # (B, S, T)
    """The objectives of all problems, each with its last value repeated."""
    values = [trace[0][1]]
    for index, elbo in trace[1:]:
        last = values[-1]
        elbo = xp.broadcast_to(elbo, (len(elbo), last.shape[1]))
        if len(elbo) < len(last):
            now = xp.copy(last)
            now[index] = elbo
            elbo = now
        values.append(elbo)
    return xp.stack(values, -1)


def _pruned(problems: Problems, ends: _Ends, trace: Array) -> tuple[_Ends, Array]:
    """The pruning rule, applied where the alternation has come to rest."""
    state = prune(problems, evaluate(problems, ends.log_alpha))
    trace = problems.xp.concatenate((trace, state.elbo[..., None]), -1)
    return _Ends.of(state, ends.n_iter, ends.converged), trace


def _best(
    problems: Problems, data: NaturalUnits, ends: _Ends, trace: Array, integrated: int | None
) -> dict[str, Tensor]:
    """The best start of each problem, in the units of the data."""
    xp = problems.xp
    x_mean, y_mean, x_scale, y_scale = map(
        xp.array, (data.x_mean, data.y_mean, data.x_scale, data.y_scale)
    )
    units = -problems.num_data * xp.log(y_scale)
    if integrated is not None:
        units = units - 0.5 * math.log(integrated)
    trace = trace + units[:, None, None]

    best = trace[..., -1].argmax(-1)
    log_alpha, loc, residual, beta, n_iter, converged = (of_start(xp, each, best) for each in ends)
    correlation = (problems.x_rows @ residual[..., None])[..., 0]
    relevance = beta[:, None] * xp.square(correlation + loc)
    loc = loc * (y_scale[:, None] / x_scale)
    elbo_trace = of_start(xp, trace, best)
    found = {
        "loc": loc,
        "log_alpha": log_alpha,
        "sigma2": xp.where(log_alpha < math.inf, xp.exp(log_alpha) * xp.square(loc), 0.0),
        "relevance": relevance,
        "intercept": y_mean - (x_mean * loc).sum(-1),
        "beta": beta / xp.square(y_scale),
        "elbo": elbo_trace[:, -1],
        "elbo_trace": elbo_trace,
        "n_iter": n_iter,
        "converged": converged,
        "start_elbo": trace[..., -1],
        "x_mean": x_mean,
    }
    return {name: xp.tensor(xp.copy(value)) for name, value in found.items()}
