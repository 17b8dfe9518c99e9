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
from torch.linalg import vecdot

from bayes_svdo.inference.exact_regression_curves import Curves, Piece

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
# After a Newton step that was to gain g and gained g + e, the next gains 2.25 e²/g, were there but
# one weight. As there are more, e²/g must be this small a part of the tolerance, and g, so that two
# errors cannot cancel in e, no larger a multiple of it.
_LEFT, _GAINED = 1e-4, 100.0


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
    least_squares: Tensor | None  # (B, D), loc without a prior, where it is known
    curves: Curves
    first_row: Tensor | None  # (B, 1, 1), of a problem in a list of all rows; None: one problem

    def take(self, index: Tensor) -> Problems:
        """The problems at ``index``."""
        x_rows = self.x_rows[index]
        return replace(
            self,
            x_rows=x_rows,
            first_row=first_rows(x_rows),
            target=self.target[index],
            gram=None if self.gram is None else self.gram[index],
            moment=self.moment[index],
            least_squares=None,  # it has been used
            noise_precision=None if self.noise_precision is None else self.noise_precision[index],
        )


class State(NamedTuple):
    """Active weights with their ``log_alpha``, and all that follows from them."""

    log_alpha: Tensor  # (B, S, D), inf where pruned
    kept: Tensor  # (B, S, D), whether it is not
    loc: Tensor  # (B, S, D)
    noise_precision: Tensor  # (B, S)
    elbo: Tensor  # (B, S), -inf where the factorisation failed
    residual: Tensor  # (B, S, M)
    active: Tensor  # (B, S, A), indices of the active weights; of pruned ones in unused slots
    filled: Tensor  # (B, S, A), whether the slot is used
    active_loc: Tensor  # (B, S, A), 0 in unused slots
    active_log_alpha: Tensor  # (B, S, A), inf in unused slots
    active_alpha: Tensor  # (B, S, A), huge in unused slots
    active_pull: Tensor  # (B, S, A), alpha loc, which is x_active' residual
    active_kl: Tensor  # (B, S, A)
    position: Tensor  # (B, S, A), of active_log_alpha on the curve of h = -dKL / d log_alpha
    slope_coefficients: Tensor  # (B, S, A, 4)
    rows: Tensor  # (B, S, A, D), x_active' x, or where there is no gram (B, S, A, M), x_active'
    whitener: Tensor  # (B, S, A, A), inverse Cholesky factor of x_active' x_active + diag(alpha)
    at_rest: Tensor  # (B, S), whether the Newton step that led here leaves nothing to another


def evaluate(problems: Problems, log_alpha: Tensor) -> State:
    """``loc`` and ``beta`` at their optimum for given ``log_alpha`` (B, S, D), and the ELBO."""
    kept = log_alpha < torch.inf
    size = max(int(kept.sum(-1).max()), 1)
    active_log_alpha, active = log_alpha.topk(size, largest=False)
    filled = active_log_alpha < torch.inf
    # So large in unused slots that what these columns do to the others is less than rounding.
    active_alpha = active_log_alpha.clamp(max=_LOG_ALPHA_OF_UNUSED).exp_()

    if problems.gram is None:
        rows = _rows(problems, problems.x_rows, active)
        precision = rows @ rows.mT
    else:
        rows = _rows(problems, problems.gram, active)
        precision = _columns(rows, active)
    precision.diagonal(dim1=-2, dim2=-1).add_(active_alpha)
    factor, failed = torch.linalg.cholesky_ex(precision)
    # Its inverse costs no more than the products with it that follow, and makes them faster.
    whitener = torch.linalg.solve_triangular(factor, _identity(factor), upper=False)
    moment = problems.moment[:, None].expand_as(log_alpha).gather(-1, active)
    active_loc = ((moment[..., None, :] @ whitener.mT) @ whitener)[..., 0, :] * filled
    loc = torch.zeros_like(log_alpha).scatter_(-1, active, active_loc)
    residual = problems.target[:, None] - loc @ problems.x_rows

    active_pull = active_alpha * active_loc
    error = vecdot(residual, residual) + vecdot(active_pull, active_loc)
    noise_precision = best_noise_precision(problems, error)
    kl, slope = problems.curves.kl_pieces(active_log_alpha)
    active_kl = kl.value()
    elbo = objective(problems, error, noise_precision, active_kl.sum(-1))
    elbo = elbo.nan_to_num_(nan=-torch.inf).masked_fill_(failed > 0, -torch.inf)
    return State(
        log_alpha, kept, loc, noise_precision, elbo, residual, active, filled, active_loc,
        active_log_alpha, active_alpha, active_pull, active_kl, *slope, rows, whitener,
        torch.zeros_like(elbo, dtype=torch.bool),
    )  # fmt: skip


def first_rows(x_rows: Tensor) -> Tensor | None:
    """``first_row`` of :class:`Problems`."""
    num, dim = x_rows.shape[:2]
    if num == 1:
        return None
    return torch.arange(0, num * dim, dim, device=x_rows.device)[:, None, None]


def _rows(problems: Problems, matrix: Tensor, index: Tensor) -> Tensor:  # (B, D, K) -> (B, S, A, K)
    rows = index if problems.first_row is None else index + problems.first_row
    found = matrix.flatten(0, 1).index_select(0, rows.flatten())
    return found.view(*index.shape, matrix.shape[-1])


def _columns(rows: Tensor, index: Tensor) -> Tensor:  # (B, S, A, D), (B, S, A) -> (B, S, A, A)
    return rows.gather(-1, index[..., None, :].expand(*rows.shape[:-1], index.shape[-1]))


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def objective(problems: Problems, error: Tensor, noise_precision: Tensor, kl: Tensor) -> Tensor:
    """The ELBO from ``E``, ``beta`` and the sum of the KLs, all of the same shape."""
    elbo = (noise_precision / (2 * math.pi)).log_().mul_(0.5 * problems.num_data)
    return elbo.addcmul_(noise_precision, error, value=-0.5).sub_(kl, alpha=problems.kl_weight)


def best_noise_precision(problems: Problems, error: Tensor) -> Tensor:  # (B, S) -> (B, S)
    """The optimal ``beta`` for the error ``E``, within its bound."""
    if problems.noise_precision is not None:
        return problems.noise_precision.expand_as(error)
    found = error.reciprocal().mul_(problems.num_data)
    bound = problems.largest_noise_precision
    return found if bound == math.inf else found.clamp_(max=bound)


def start(problems: Problems, names: tuple[str, ...]) -> State:
    """The state of each start; see :func:`fit_vdard_regression` for their meaning."""
    error = vecdot(problems.target, problems.target)[:, None]  # without any weight
    noise_precision = best_noise_precision(problems, error)
    scale = noise_precision / problems.kl_weight
    excess = {
        "zero": lambda: scale * problems.moment.square() - 1,
        "ridge": lambda: problems.moment,
        "ols": lambda: _excess_at_least_squares(problems),
    }
    log_alpha = problems.curves.optimal_log_alpha(
        torch.stack([excess[name]() for name in names], 1)
    )
    for i, name in enumerate(names):
        if name == "zero":
            log_alpha[:, i] = _first_to_enter(problems, log_alpha[:, i])
        elif name == "ridge":
            log_alpha[:, i] = torch.where(problems.moment == 0, torch.inf, 0.0)
    state = evaluate(problems, log_alpha)
    failed = state.elbo == -torch.inf  # collinear columns, nearly without noise
    if "zero" in names:  # what enters together may gain less than nothing
        nothing = objective(problems, error, noise_precision, torch.zeros_like(error))
        zero = names.index("zero")
        failed[:, zero] |= state.elbo[:, zero] < nothing[:, 0]
    if failed.any():
        state = evaluate(problems, torch.where(failed[..., None], torch.inf, log_alpha))
    return state


def _first_to_enter(problems: Problems, alone: Tensor) -> Tensor:  # (B, D), (B, D)
    """Of weights with the ``log_alpha`` that each would have alone, those that enter first."""
    first, movers = alone.topk(min(_FIRST_TO_ENTER, alone.shape[-1]), largest=False)
    goes = _without_clashes(problems, movers[:, None], (first < torch.inf)[:, None])[:, 0]
    none = torch.full_like(alone, torch.inf)
    return none.scatter_(-1, movers, first.where(goes, torch.inf))


def _excess_at_least_squares(problems: Problems) -> Tensor:  # (B, D)
    loc = problems.least_squares
    if loc is None:
        gram = problems.gram
        gram = problems.x_rows @ problems.x_rows.mT if gram is None else gram.clone()
        # A trace of ridge, so that collinear columns share their weight instead of failing.
        gram.diagonal(dim1=-2, dim2=-1).add_(torch.finfo(gram.dtype).eps ** 0.5)
        factor = torch.linalg.cholesky(gram)
        loc = torch.cholesky_solve(problems.moment[..., None], factor)[..., 0]
    residual = problems.target - (loc[:, None] @ problems.x_rows)[:, 0]
    noise_precision = best_noise_precision(problems, residual.square().sum(-1, keepdim=True))
    if problems.noise_precision is None:  # less one degree of freedom per feature, as for z-scores
        noise_precision = noise_precision * (1 - loc.shape[-1] / problems.num_data)
    return noise_precision * loc.square() / problems.kl_weight - 1


class Moves(NamedTuple):
    """What single weights could do."""

    joint: Tensor  # (B, S, A), log_alpha at the joint optimum of (loc, alpha), all else fixed
    inverse: Tensor  # (B, S, A, A), of x_active' x_active + diag(alpha)
    refitted: Tensor  # (B, S, D), log_alpha of the best move of alpha, all loc refitted
    stays: Tensor  # (B, S, D), whether that leaves the weight in
    gain: Tensor  # (B, S, D), by which that move raises the ELBO, in nats


def find_moves(problems: Problems, state: State) -> Moves:
    """The best single moves from ``state``, with ``beta`` held fixed.

    With all loc refitted, alpha_d adds ``free / (2 (unexplained + alpha)) - KL(alpha)`` to the
    ELBO over kl_weight: ``unexplained`` is the squared norm of column d that the other active
    columns (shrunk as they are) leave, ``free`` its relevance once they have adapted.
    """
    scale = (state.noise_precision / problems.kl_weight)[..., None]
    relevance = (state.active_pull + state.active_loc).square_().mul_(scale)
    inverse = state.whitener.mT @ state.whitener
    variance = inverse.diagonal(dim1=-2, dim2=-1)
    adapted = state.active_loc / variance

    explained = state.whitener @ state.rows
    if problems.gram is None:
        explained = explained @ problems.x_rows.mT[:, None]
    left = explained.square_().sum(-2).neg_().add_(1.0)  # not 1 - ..., which goes through Python
    unexplained = _put(left, state, variance.reciprocal().sub_(state.active_alpha))
    unexplained.clamp_(torch.finfo(scale.dtype).eps, 1.0)
    free = _put(state.residual @ problems.x_rows.mT, state, adapted).square_().mul_(scale)
    excess = torch.cat((free, relevance), -1).sub_(1.0)
    optimal = problems.curves.optimal_log_alpha(excess)
    dim = free.shape[-1]
    alone, joint = optimal[..., :dim], optimal[..., dim:]

    # Two candidates, whose gains are exact: the optimum of a weight that is alone, and, correlated
    # with others, that of the empirical-Bayes KL, a root of a quadratic, times a rough factor.
    slope = free.sub(unexplained, alpha=2.0)
    square = unexplained.square()
    root = slope.square().addcmul_(excess[..., :dim], square, value=4.0).sqrt_()
    rough = square.mul_(2.7).div_(slope.add_(root))  # negative, NaN: none
    candidates = torch.stack((alone, rough.log_().nan_to_num_(torch.inf, torch.inf)))
    value = free.mul(0.5).div(candidates.exp().add_(unexplained))
    value, which = value.sub_(problems.curves.kl(candidates)).max(0)
    stays = value > 0.0
    refitted = torch.where(which == 0, alone, rough).masked_fill_(~stays, torch.inf)
    now = adapted.mul_(scale).mul_(state.active_loc).mul_(0.5)
    now = now.sub_(state.active_kl).mul_(state.filled)
    now = torch.zeros_like(value).scatter_(-1, state.active, now)
    gain = value.clamp_min_(0.0).sub_(now).mul_(problems.kl_weight)
    return Moves(joint, inverse, refitted, stays, gain)


def _put(values: Tensor, state: State, active_values: Tensor) -> Tensor:
    """``values`` (B, S, D) with those of the active weights replaced."""
    # Unused slots write to pruned weights.
    return torch.where(state.kept, values.scatter(-1, state.active, active_values), values)


def newton_step(
    problems: Problems, state: State, moves: Moves
) -> tuple[Tensor, Tensor]:  # (B, S, A), (B, S)
    """``log_alpha`` of the active weights after a Newton step, ``loc`` and ``beta`` eliminated.

    And what it is to gain where the ELBO is as curved as here.

    The step is taken in ``log(alpha / (1 + alpha))``: like ``log alpha`` for weights that stay,
    and like the shrinkage factor ``1 / (1 + alpha)``, in which the ELBO is quadratic, for weights
    that hardly do. Where the ELBO curves upwards, it climbs by at least a set length, so that no
    saddle holds it. Weights with ``z² <= kl_weight`` are pruned on the way.
    """
    beta = state.noise_precision[..., None]
    pull, loc = state.active_pull, state.active_loc
    energy = (beta * pull).mul_(loc).mul_(0.5)
    h = Piece(state.position, state.slope_coefficients)
    gradient = h.value().mul_(problems.kl_weight).sub_(energy).mul_(state.filled)
    keeps = torch.sigmoid(state.active_log_alpha)
    bend = h.slope().mul_(-problems.kl_weight / problems.curves.kl.width)

    inverse = moves.inverse
    if problems.noise_precision is None:  # it follows
        follows = (0.5 / problems.num_data) * beta
        if problems.largest_noise_precision < math.inf:
            follows = follows * (beta < problems.largest_noise_precision)
        inverse = inverse.addcmul(loc[..., :, None], (follows * loc)[..., None, :])
    hessian = ((-beta * pull)[..., :, None] * inverse).mul_(pull[..., None, :])
    diagonal = (energy + bend).addcmul_(gradient, keeps, value=-1.0)
    # No step in unused slots.
    hessian.diagonal(dim1=-2, dim2=-1).add_(diagonal.masked_fill_(~state.filled, 1.0))

    factor, failed = torch.linalg.cholesky_ex(hessian)
    step = torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    saddle = failed > 0
    if saddle.any():
        scale = energy + bend.abs() + ~state.filled
        step[saddle] = _climb(hessian[saddle], gradient[saddle], scale[saddle])
    log_share = torch.nn.functional.logsigmoid(state.active_log_alpha)
    change = step.addcmul(step, keeps, value=-1.0).nan_to_num_(nan=0.0).clamp_(min=-_LARGEST_STEP)
    # 1/(1 + alpha) falls by no more than a factor of 4 at a time.
    log_share = torch.minimum(change.add_(log_share), log_share.mul(0.25))
    moved = log_share - (-log_share.expm1()).log_()
    pruned = (moves.joint == torch.inf) | (moved > _LARGEST_LOG_ALPHA)
    return moved.masked_fill_(pruned, torch.inf), vecdot(gradient, step).mul_(0.5)


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
    # A weight that leaves does so alone, and only if nothing that enters gains more.
    leaves = state.kept > moves.stays
    gain = moves.gain.masked_fill(state.kept & moves.stays, 0.0)
    limit = state.filled.sum(-1, keepdim=True).clamp_(min=_FIRST_TO_ENTER)
    limit = torch.minimum(limit, (gain > tolerance).sum(-1, keepdim=True))
    width = int(limit.max())
    movers = gain.topk(width)[1]
    rank = torch.arange(width, device=gain.device)
    goes = (rank < limit) & ((rank == 0) | ~leaves.gather(-1, movers))
    goes = _without_clashes(problems, movers, goes)
    values = torch.where(goes, moves.refitted.gather(-1, movers), log_alpha.gather(-1, movers))
    return log_alpha.scatter(-1, movers, values)


def _without_clashes(problems: Problems, movers: Tensor, goes: Tensor) -> Tensor:  # (B, S, W)
    """Those of ``movers`` that go and are little correlated with all that go before them."""
    if problems.gram is None:
        columns = _rows(problems, problems.x_rows, movers)
        correlation = columns @ columns.mT
    else:
        correlation = _columns(_rows(problems, problems.gram, movers), movers)
    clash = correlation.abs_().tril_(-1) > _LARGEST_CORRELATION
    return goes & ~(clash & goes[..., None, :]).any(-1)


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
    least, most = torch.sigmoid(state.log_alpha).aminmax(dim=1)
    if float((most - least).max()) > _SAME_SHARE:
        return state, finished
    best = state.elbo.argmax(-1)
    if num == 1:
        one = slice(int(best), int(best) + 1)
        return State(*(field[:, one] for field in state)), finished[:, one]
    return State(*(of_start(f, best)[:, None] for f in state)), of_start(finished, best)[:, None]


def of_start(field: Tensor, start: Tensor) -> Tensor:  # (B, S, ...), (B,) -> (B, ...)
    """Of each problem what belongs to one start, copied; the only one where all have become one."""
    num, starts = field.shape[:2]
    if starts == 1:
        return field[:, 0].clone()
    return field[torch.arange(num, device=field.device), start]


def iterate(
    problems: Problems, state: State, finished: Tensor, tolerance: float
) -> tuple[State, Tensor]:
    """One iteration for all problems and starts but the finished (B, S); the ELBO of none falls.

    Finished is what has nothing to enter or leave, and gained no more than the tolerance or was at
    rest when the iteration began.
    """
    moves = find_moves(problems, state)
    best_change = (moves.gain * (state.kept != moves.stays)).amax(-1)
    grows = best_change > tolerance
    finished = finished | (state.at_rest & ~grows)
    if finished.all():
        return state, finished

    proposal = moves.joint
    promised: Tensor | float = math.nan  # by the Newton step, where there is one
    near = best_change < _SMALL_CHANGE
    if near.any():
        moved, gain = newton_step(problems, state, moves)
        proposal = torch.where(near[..., None], moved, proposal)
        promised = gain.where(near, math.nan)
    proposal = state.log_alpha.scatter(-1, state.active, proposal)
    if grows.any():
        proposal = change_set(problems, state, moves, proposal, tolerance)
    if finished.any():
        proposal = torch.where(finished[..., None], state.log_alpha, proposal)
    new = evaluate(problems, proposal)
    gained = new.elbo - state.elbo
    accepted = (gained >= 0.5 * best_change * grows) | finished
    if not accepted.all():
        new = _fall_back(problems, state, moves, proposal, accepted, grows)
        gained = new.elbo - state.elbo
    left = (gained - promised).square() <= _LEFT * tolerance * promised
    at_rest = accepted & left & ~grows & (gained <= _GAINED * tolerance)
    # Where something grows, but by less than rounding, there is nothing left to gain either.
    return new._replace(at_rest=at_rest), finished | (gained <= tolerance * ~grows)


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
