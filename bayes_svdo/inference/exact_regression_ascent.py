"""Exact ascent of the VD-ARD regression objective, many problems and starts at once.

Everything is in natural units: columns of ``x`` and the target have norm 1, so that with
``N`` observations and the precision ``beta`` of the noise::

    ELBO = N/2 log(beta / 2 pi) - beta/2 E - kl_weight sum_d KL(alpha_d)
    E    = |t - X loc|² + sum_d alpha_d loc_d²

``loc`` is eliminated exactly (a ridge regression on the active weights) and ``beta`` in closed
form, so a state is the set of active weights with their ``log_alpha``; every other ``alpha`` is
infinite and its weight exactly 0. An iteration proposes new ``log_alpha`` and keeps the first
proposal that does not lower the ELBO:

1. While much is to gain from weights that enter or leave: several of them at once, and the active
   ones at their joint optimum over (loc, alpha), which prunes where ``z² <= kl_weight``. Later, a
   Newton step of the active ones, with ``loc`` and ``beta`` eliminated.
2. A quarter of that step, then the joint optima of the active weights, in parallel.
3. The one weight whose entering, leaving or new ``alpha`` raises the ELBO most, all other weights
   refitted. This cannot fail but for rounding.

Shapes: B problems, S starts, D weights, A the largest number of active weights, M rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_svdo.inference.exact_regression_curves import Curves

# The active weights move by Newton steps once no single one can enter or leave for more nats.
_SMALL_CHANGE = 0.1
# Columns more correlated than this do not enter in the same step.
_LARGEST_CORRELATION = 0.3
# As many may enter at once as are active, and this many to begin with.
_FIRST_TO_ENTER = 8
# Starts that shrink no weight more differently than this are on the way to the same maximum: so it
# was in 480 designs with correlations up to 0.97. At 0.25 it was not in 2 of 360.
_SAME_SHARE = 0.15
# Beyond it a weight is shrunk to less than rounding, and may as well be pruned.
_LARGEST_LOG_ALPHA = 40.0
_LOG_ALPHA_OF_UNUSED = 69.0
# A Newton step lowers log(alpha / (1 + alpha)) by at most this.
_LARGEST_STEP = 2.0
# Along a direction of ascent with the wrong curvature, a step of at least this size.
_SMALLEST_ESCAPE = 0.5


@dataclass(frozen=True)
class Problems:
    """B regressions in natural units: what does not change during the ascent."""

    x_rows: Tensor  # (B, D, M), the columns of x as rows
    target: Tensor  # (B, M)
    gram: Tensor | None  # (B, D, D), where it is no larger than x
    moment: Tensor  # (B, D), x' target
    num_data: float  # N, less one where an intercept has been integrated out
    kl_weight: float
    noise_precision: Tensor | None  # (B, 1), None: learned
    largest_noise_precision: float  # inf: no bound
    curves: Curves

    def take(self, index: Tensor) -> Problems:
        """The problems at ``index``."""
        return replace(
            self,
            x_rows=self.x_rows[index],
            target=self.target[index],
            gram=None if self.gram is None else self.gram[index],
            moment=self.moment[index],
            noise_precision=None if self.noise_precision is None else self.noise_precision[index],
        )


class State(NamedTuple):
    """Active weights with their ``log_alpha``, and all that follows from them."""

    log_alpha: Tensor  # (B, S, D), inf where pruned
    loc: Tensor  # (B, S, D)
    noise_precision: Tensor  # (B, S)
    elbo: Tensor  # (B, S), -inf where the factorisation failed
    residual: Tensor  # (B, S, M)
    active: Tensor  # (B, S, A), indices of the active weights; of pruned ones in unused slots
    filled: Tensor  # (B, S, A), whether the slot is used
    active_loc: Tensor  # (B, S, A), 0 in unused slots
    active_log_alpha: Tensor  # (B, S, A), inf in unused slots
    active_alpha: Tensor  # (B, S, A), huge in unused slots
    active_kl: Tensor  # (B, S, A)
    rows: Tensor  # (B, S, A, D), x_active' x, or where there is no gram (B, S, A, M), x_active'
    whitener: Tensor  # (B, S, A, A), inverse Cholesky factor of x_active' x_active + diag(alpha)


def evaluate(problems: Problems, log_alpha: Tensor) -> State:
    """``loc`` and ``beta`` at their optimum for given ``log_alpha`` (B, S, D), and the ELBO."""
    size = max(int((log_alpha < torch.inf).sum(-1).max()), 1)
    active_log_alpha, active = log_alpha.topk(size, largest=False)
    filled = active_log_alpha < torch.inf
    # So large in unused slots that what these columns do to the others is less than rounding.
    active_alpha = active_log_alpha.clamp(max=_LOG_ALPHA_OF_UNUSED).exp_()

    if problems.gram is None:
        rows = _rows(problems.x_rows, active)
        precision = rows @ rows.mT
    else:
        rows = _rows(problems.gram, active)
        precision = rows.gather(-1, active[..., None, :].expand(*active.shape, size))
    precision.diagonal(dim1=-2, dim2=-1).add_(active_alpha)
    factor, failed = torch.linalg.cholesky_ex(precision)
    # Its inverse costs no more than the products with it that follow, and makes them faster.
    whitener = torch.linalg.solve_triangular(factor, _identity(factor), upper=False)
    moment = problems.moment[:, None].expand_as(log_alpha).gather(-1, active)
    active_loc = (whitener.mT @ (whitener @ moment[..., None]))[..., 0] * filled
    loc = torch.zeros_like(log_alpha).scatter_(-1, active, active_loc)
    residual = problems.target[:, None] - loc @ problems.x_rows

    error = residual.square().sum(-1) + (active_alpha * active_loc.square()).sum(-1)
    noise_precision = best_noise_precision(problems, error)
    active_kl = problems.curves.kl(active_log_alpha)
    elbo = objective(problems, error, noise_precision, active_kl.sum(-1))
    elbo = elbo.nan_to_num(nan=-torch.inf).masked_fill_(failed > 0, -torch.inf)
    return State(
        log_alpha, loc, noise_precision, elbo, residual, active, filled, active_loc,
        active_log_alpha, active_alpha, active_kl, rows, whitener,
    )  # fmt: skip


def _rows(matrix: Tensor, active: Tensor) -> Tensor:  # (B, D, K), (B, S, A) -> (B, S, A, K)
    num, dim, length = matrix.shape
    first = torch.arange(0, num * dim, dim, device=active.device)[:, None, None]
    found = matrix.reshape(num * dim, length).index_select(0, (active + first).flatten())
    return found.view(*active.shape, length)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def objective(problems: Problems, error: Tensor, noise_precision: Tensor, kl: Tensor) -> Tensor:
    """The ELBO from ``E``, ``beta`` and the sum of the KLs, all of the same shape."""
    log_scale = 0.5 * problems.num_data * (noise_precision / (2 * math.pi)).log()
    return log_scale - 0.5 * noise_precision * error - problems.kl_weight * kl


def best_noise_precision(problems: Problems, error: Tensor) -> Tensor:  # (B, S) -> (B, S)
    """The optimal ``beta`` for the error ``E``, within its bound."""
    if problems.noise_precision is not None:
        return problems.noise_precision.expand_as(error)
    return (problems.num_data / error).clamp_(max=problems.largest_noise_precision)


def start(problems: Problems, names: tuple[str, ...]) -> State:
    """The state of each start; see :func:`fit_vdard_regression` for their meaning."""
    choices = {
        "zero": lambda: torch.full_like(problems.moment, torch.inf),
        "ridge": lambda: torch.where(problems.moment == 0, torch.inf, problems.moment * 0),
        "ols": lambda: _from_least_squares(problems),
    }
    log_alpha = torch.stack([choices[name]() for name in names], 1)
    state = evaluate(problems, log_alpha)
    failed = state.elbo == -torch.inf
    if failed.any():  # collinear columns, nearly without noise
        state = evaluate(problems, torch.where(failed[..., None], torch.inf, log_alpha))
    return state


def _from_least_squares(problems: Problems) -> Tensor:  # (B, D)
    gram = problems.gram
    if gram is None:
        gram = problems.x_rows @ problems.x_rows.mT
    # A trace of ridge, so that collinear columns share their weight instead of failing.
    tiny = torch.finfo(gram.dtype).eps ** 0.5
    factor = torch.linalg.cholesky(gram + tiny * _identity(gram))
    loc = torch.cholesky_solve(problems.moment[..., None], factor)[..., 0]
    residual = problems.target - (loc[:, None] @ problems.x_rows)[:, 0]
    noise_precision = best_noise_precision(problems, residual.square().sum(-1, keepdim=True))
    excess = noise_precision * loc.square() / problems.kl_weight - 1
    return problems.curves.optimal_log_alpha(excess)


class Moves(NamedTuple):
    """What single weights could do."""

    joint: Tensor  # (B, S, A), log_alpha at the joint optimum of (loc, alpha), all else fixed
    inverse: Tensor  # (B, S, A, A), of x_active' x_active + diag(alpha)
    refitted: Tensor  # (B, S, D), log_alpha of the best move of alpha, all loc refitted
    gain: Tensor  # (B, S, D), by which that move raises the ELBO, in nats


def find_moves(problems: Problems, state: State) -> Moves:
    """The best single moves from ``state``, with ``beta`` held fixed.

    With all loc refitted, alpha_d adds ``free / (2 (unexplained + alpha)) - KL(alpha)`` to the
    ELBO over kl_weight: ``unexplained`` is the squared norm of column d that the other active
    columns (shrunk as they are) leave, ``free`` its relevance once they have adapted.
    """
    scale = (state.noise_precision / problems.kl_weight)[..., None]
    correlation = state.residual @ problems.x_rows.mT
    active_correlation = correlation.gather(-1, state.active)
    relevance = scale * (active_correlation + state.active_loc).square() * state.filled
    inverse = state.whitener.mT @ state.whitener

    size = state.active.shape[-1]
    variance = inverse.diagonal(dim1=-2, dim2=-1)
    explained = state.whitener @ state.rows
    if problems.gram is None:
        explained = explained @ problems.x_rows.mT[:, None]
    unexplained = _put(1 - explained.square().sum(-2), state, 1 / variance - state.active_alpha)
    unexplained = unexplained.clamp_(torch.finfo(scale.dtype).eps, 1.0)
    free = scale * _put(correlation, state, state.active_loc / variance).square_()
    optimal = problems.curves.optimal_log_alpha(torch.cat((free, relevance), -1) - 1)
    alone, joint = optimal.split((free.shape[-1], size), -1)

    # Two candidates, whose gains are exact: the optimum of a weight that is alone, and, correlated
    # with others, that of the empirical-Bayes KL, a root of a quadratic, times a rough factor.
    slope = free - 2 * unexplained
    square = unexplained.square()
    bottom = slope + (slope.square() + 4 * (free - 1) * square).sqrt_()  # negative, NaN: none
    rough = (2.7 * square / bottom).log_().nan_to_num_(torch.inf, torch.inf)
    candidates = torch.stack((alone, rough))
    value = 0.5 * free / (unexplained + candidates.exp()) - problems.curves.kl(candidates)
    value, which = value.max(0)
    refitted = torch.where(which == 0, alone, rough).masked_fill_(value <= 0, torch.inf)
    now = (0.5 * free.gather(-1, state.active) * variance - state.active_kl) * state.filled
    now = torch.zeros_like(value).scatter_(-1, state.active, now)
    gain = problems.kl_weight * (value.clamp_min(0) - now)
    return Moves(joint, inverse, refitted, gain)


def _put(values: Tensor, state: State, active_values: Tensor) -> Tensor:
    """``values`` (B, S, D) with those of the active weights replaced."""
    old = values.gather(-1, state.active)
    return values.scatter(-1, state.active, torch.where(state.filled, active_values, old))


def newton_step(problems: Problems, state: State, moves: Moves) -> Tensor:  # (B, S, A)
    """``log_alpha`` of the active weights after a Newton step, ``loc`` and ``beta`` eliminated.

    The step is taken in ``log(alpha / (1 + alpha))``: like ``log alpha`` for weights that stay,
    and like the shrinkage factor ``1 / (1 + alpha)``, in which the ELBO is quadratic, for weights
    that hardly do. Where the ELBO curves upwards, it climbs by at least a set length, so that no
    saddle holds it. Weights with ``z² <= kl_weight`` are pruned on the way.
    """
    beta = state.noise_precision[..., None]
    used = state.filled.to(beta.dtype)
    h, h_slope = problems.curves.negative_slope.with_slope(state.active_log_alpha)
    pull = state.active_alpha * state.active_loc
    energy = 0.5 * beta * pull * state.active_loc
    gradient = (problems.kl_weight * h - energy) * used
    keeps = state.active_alpha / (1 + state.active_alpha)

    root = beta.sqrt() * pull
    hessian = -root[..., :, None] * moves.inverse * root[..., None, :]
    if problems.noise_precision is None:
        shared = energy * (beta < problems.largest_noise_precision)
        hessian -= (2 / problems.num_data) * shared[..., :, None] * shared[..., None, :]
    bend = problems.kl_weight * h_slope
    hessian.diagonal(dim1=-2, dim2=-1).add_(energy - bend - gradient * keeps + (1 - used))

    factor, failed = torch.linalg.cholesky_ex(hessian)
    step = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    saddle = failed > 0
    if saddle.any():
        scale = energy + bend.abs() + (1 - used)
        step[saddle] = _climb(hessian[saddle], gradient[saddle], scale[saddle])
    log_share = torch.nn.functional.logsigmoid(state.active_log_alpha)
    change = (step * (1 - keeps)).nan_to_num_(nan=0.0).clamp_(min=-_LARGEST_STEP)
    # 1/(1 + alpha) falls by no more than a factor of 4 at a time.
    log_share = torch.minimum(log_share + change, 0.25 * log_share)
    moved = log_share - torch.log(-torch.expm1(log_share))
    return moved.masked_fill_((moves.joint == torch.inf) | (moved > _LARGEST_LOG_ALPHA), torch.inf)


def _climb(hessian: Tensor, gradient: Tensor, scale: Tensor) -> Tensor:  # (K, A, A), (K, A), (K, A)
    root = scale.clamp_min(torch.finfo(scale.dtype).tiny).rsqrt()
    curvature, basis = torch.linalg.eigh(root[..., :, None] * hessian * root[..., None, :])
    slope = (basis.mT @ (root * gradient)[..., None])[..., 0]
    step = slope.abs() / curvature.abs().clamp_min(0.02)
    step = torch.maximum(step, torch.where(curvature < 0, _SMALLEST_ESCAPE, 0.0))
    step = torch.where(slope < 0, -step, step)
    climbed: Tensor = root * (basis @ step[..., None])[..., 0]
    return climbed


def change_set(
    problems: Problems, state: State, moves: Moves, log_alpha: Tensor, tolerance: float
) -> Tensor:  # (B, S, D)
    """``log_alpha`` with several weights entering that are little correlated, or one leaving."""
    pruned = state.log_alpha == torch.inf
    # A weight that leaves does so alone, and only if nothing that enters gains more.
    leaves = (moves.refitted == torch.inf) > pruned
    gain = torch.where(pruned | leaves, moves.gain, 0.0)
    limit = state.filled.sum(-1, keepdim=True).clamp_(min=_FIRST_TO_ENTER)
    limit = torch.minimum(limit, (gain > tolerance).sum(-1, keepdim=True))
    width = int(limit.max())
    gain, movers = gain.topk(width)
    rank = torch.arange(width, device=gain.device)
    goes = rank < limit
    if width > 1:
        goes &= (rank == 0) | ~leaves.gather(-1, movers)
        columns = _rows(problems.x_rows, movers)
        clash = (columns @ columns.mT).abs_().tril_(-1) > _LARGEST_CORRELATION
        goes &= ~(clash & goes[..., None, :]).any(-1)
    values = torch.where(goes, moves.refitted.gather(-1, movers), log_alpha.gather(-1, movers))
    return log_alpha.scatter(-1, movers, values)


def single_move(state: State, moves: Moves) -> Tensor:  # (B, S, D)
    """``log_alpha`` after the one move of the largest gain."""
    best = moves.gain.argmax(-1, keepdim=True)
    return state.log_alpha.scatter(-1, best, moves.refitted.gather(-1, best))


def join(state: State, finished: Tensor) -> tuple[State, Tensor]:
    """The best start alone, if all starts of every problem have come close to it.

    Close: no weight is shrunk differently by more than ``_SAME_SHARE``; the others would follow.
    """
    num, starts = state.elbo.shape
    if starts == 1:
        return state, finished
    best = state.elbo.argmax(-1)
    best += torch.arange(0, num * starts, starts, device=best.device)
    share = torch.sigmoid(-state.log_alpha)
    if ((share - _only(share, best)).abs_() > _SAME_SHARE).any():
        return state, finished
    return State(*(_only(field, best) for field in state)), _only(finished, best)


def _only(field: Tensor, rows: Tensor) -> Tensor:  # (B, S, ...), (B,) -> (B, 1, ...)
    return field.flatten(0, 1).index_select(0, rows)[:, None]


def iterate(
    problems: Problems, state: State, finished: Tensor, tolerance: float
) -> tuple[State, Tensor]:
    """One iteration for all problems and starts but the finished (B, S); the ELBO of none falls.

    Finished is what gained no more than the tolerance, with nothing found to enter or leave.
    """
    moves = find_moves(problems, state)
    changes = (state.log_alpha == torch.inf) != (moves.refitted == torch.inf)
    best_change = (moves.gain * changes).amax(-1)
    grows = best_change > tolerance

    proposal = moves.joint
    near = best_change < _SMALL_CHANGE
    if near.any():
        proposal = torch.where(near[..., None], newton_step(problems, state, moves), proposal)
    proposal = state.log_alpha.scatter(-1, state.active, proposal)
    if grows.any():
        grown = change_set(problems, state, moves, proposal, tolerance)
        proposal = torch.where(grows[..., None], grown, proposal)
    if finished.any():
        proposal = torch.where(finished[..., None], state.log_alpha, proposal)
    new = evaluate(problems, proposal)
    accepted = (new.elbo >= state.elbo + 0.5 * best_change * grows) | finished
    if not accepted.all():
        new = _fall_back(problems, state, moves, proposal, accepted, grows)
    # Where something grows, but by less than rounding, there is nothing left to gain either.
    return new, finished | (new.elbo - state.elbo <= tolerance * ~grows)


def _fall_back(
    problems: Problems,
    state: State,
    moves: Moves,
    proposal: Tensor,
    accepted: Tensor,
    grows: Tensor,
) -> State:
    """The first of the safer proposals that does not lower the ELBO, where one was refused."""
    values = proposal.gather(-1, state.active)
    stays = state.filled & (values < torch.inf)  # an unused slot may hold one that would enter
    part = torch.lerp(state.active_log_alpha, values, 0.25).where(stays, torch.inf)
    shorter = state.log_alpha.scatter(-1, state.active, part)
    joint = state.log_alpha.scatter(-1, state.active, moves.joint)
    one = single_move(state, moves)
    new = state
    for fallback in (shorter, torch.where(grows[..., None], one, joint), one, state.log_alpha):
        proposal = torch.where(accepted[..., None], proposal, fallback)
        new = evaluate(problems, proposal)
        accepted = accepted | (new.elbo >= state.elbo)
        if accepted.all():
            break
    return new
