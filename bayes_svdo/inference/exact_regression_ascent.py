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

Shapes: B problems, S starts, D weights, A the largest number of active weights, M rows. Arrays are
those of :mod:`.exact_regression_arrays`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from bayes_svdo.inference.exact_regression_arrays import Array, Arrays
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

    x_rows: Array  # (B, D, M), the columns of x as rows
    target: Array  # (B, M)
    gram: Array | None  # (B, D, D), where it is no larger than x
    moment: Array  # (B, D), x' target
    num_data: float  # N, less one where an intercept has been integrated out
    kl_weight: float
    noise_precision: Array | None  # (B, 1), None: learned
    largest_noise_precision: float  # inf: no bound
    least_squares: Array | None  # (B, D), loc without a prior, where it is known
    curves: Curves

    @property
    def xp(self) -> Arrays:
        """The arrays that they are of."""
        return self.curves.xp

    def take(self, index: Array) -> Problems:
        """The problems at ``index``."""
        return replace(
            self,
            x_rows=self.x_rows[index],
            target=self.target[index],
            gram=None if self.gram is None else self.gram[index],
            moment=self.moment[index],
            least_squares=None,  # it has been used
            noise_precision=None if self.noise_precision is None else self.noise_precision[index],
        )


class State(NamedTuple):
    """Active weights with their ``log_alpha``, and all that follows from them."""

    log_alpha: Array  # (B, S, D), inf where pruned
    kept: Array  # (B, S, D), whether it is not
    loc: Array  # (B, S, D)
    noise_precision: Array  # (B, S)
    elbo: Array  # (B, S), -inf where the factorisation failed
    residual: Array  # (B, S, M)
    active: Array  # (B, S, A), indices of the active weights; of pruned ones in unused slots
    filled: Array  # (B, S, A), whether the slot is used
    active_loc: Array  # (B, S, A), 0 in unused slots
    active_log_alpha: Array  # (B, S, A), inf in unused slots
    active_alpha: Array  # (B, S, A), huge in unused slots
    active_pull: Array  # (B, S, A), alpha loc, which is x_active' residual
    active_kl: Array  # (B, S, A)
    position: Array  # (B, S, A), of active_log_alpha on the curve of h = -dKL / d log_alpha
    slope_coefficients: Array  # (B, S, A, 4)
    rows: Array  # (B, S, A, D), x_active' x, or where there is no gram (B, S, A, M), x_active'
    whitener: Array  # (B, S, A, A), inverse Cholesky factor of x_active' x_active + diag(alpha)
    at_rest: Array  # (B, S), whether the Newton step that led here leaves nothing to another


def evaluate(problems: Problems, log_alpha: Array) -> State:
    """``loc`` and ``beta`` at their optimum for given ``log_alpha`` (B, S, D), and the ELBO."""
    xp = problems.xp
    kept = log_alpha < math.inf
    size = max(int(kept.sum(-1).max()), 1)
    active_log_alpha, active = xp.smallest(log_alpha, size)
    filled = active_log_alpha < math.inf
    # So large in unused slots that what these columns do to the others is less than rounding.
    active_alpha = xp.exp(xp.at_most(active_log_alpha, _LOG_ALPHA_OF_UNUSED))

    if problems.gram is None:
        rows = _rows(problems, problems.x_rows, active)
        precision = rows @ rows.swapaxes(-1, -2)
    else:
        rows = _rows(problems, problems.gram, active)
        precision = _pairs(problems, problems.gram, active)
    diagonal = xp.diagonal(precision)
    diagonal += active_alpha
    factor, failed = xp.cholesky(precision)
    # Its inverse costs no more than the products with it that follow, and makes them faster.
    whitener = xp.inverse_of_lower(factor)
    moment = problems.moment.take(_of_problem(problems, active))[..., None, :]
    active_loc = ((moment @ whitener.swapaxes(-1, -2)) @ whitener)[..., 0, :] * filled
    loc = xp.replaced(xp.zeros_like(log_alpha), _positions(problems, active), active_loc)
    residual = problems.target[:, None] - loc @ problems.x_rows

    active_pull = active_alpha * active_loc
    error = xp.square(residual).sum(-1) + (active_pull * active_loc).sum(-1)
    noise_precision = best_noise_precision(problems, error)
    kl, slope = problems.curves.kl_pieces(active_log_alpha)
    active_kl = kl.value()
    elbo = objective(problems, error, noise_precision, active_kl.sum(-1))
    elbo = xp.where(failed | (elbo != elbo), -math.inf, elbo)  # NaN: it failed, too
    return State(
        log_alpha, kept, loc, noise_precision, elbo, residual, active, filled, active_loc,
        active_log_alpha, active_alpha, active_pull, active_kl, *slope, rows, whitener,
        xp.zeros_like(failed),
    )  # fmt: skip


def _of_problem(problems: Problems, index: Array) -> Array:  # (B, S, K)
    """Positions of weights in a flattened (B, D)."""
    num, dim = problems.moment.shape
    return index if num == 1 else index + problems.xp.count(num, index, dim)[:, None, None]


def _positions(problems: Problems, index: Array) -> Array:  # (B, S, K)
    """Positions of weights in a flattened (B, S, D)."""
    num, starts, _ = index.shape
    if num * starts == 1:
        return index
    first = problems.xp.count(num * starts, index, problems.moment.shape[-1])
    return index + first.reshape(num, starts, 1)


def _rows(problems: Problems, matrix: Array, index: Array) -> Array:  # (B, D, K) -> (B, S, A, K)
    return matrix.reshape(-1, matrix.shape[-1])[_of_problem(problems, index)]


def _pairs(problems: Problems, matrix: Array, index: Array) -> Array:  # (B, D, D) -> (B, S, A, A)
    row = _of_problem(problems, index) * matrix.shape[-1]
    return matrix.take(row[..., :, None] + index[..., None, :])


def objective(problems: Problems, error: Array, noise_precision: Array, kl: Array) -> Array:
    """The ELBO from ``E``, ``beta`` and the sum of the KLs, all of the same shape."""
    likelihood = 0.5 * problems.num_data * problems.xp.log(noise_precision / (2 * math.pi))
    return likelihood - 0.5 * noise_precision * error - problems.kl_weight * kl


def best_noise_precision(problems: Problems, error: Array) -> Array:  # (B, S) -> (B, S)
    """The optimal ``beta`` for the error ``E``, within its bound."""
    xp, bound = problems.xp, problems.largest_noise_precision
    if problems.noise_precision is not None:
        return xp.broadcast_to(problems.noise_precision, error.shape)
    found = problems.num_data / error
    return found if bound == math.inf else xp.at_most(found, bound)


def start(problems: Problems, names: tuple[str, ...]) -> State:
    """The state of each start; see :func:`fit_vdard_regression` for their meaning."""
    xp = problems.xp
    error = xp.square(problems.target).sum(-1)[:, None]  # without any weight
    noise_precision = best_noise_precision(problems, error)
    scale = noise_precision / problems.kl_weight
    excess = {
        "zero": lambda: scale * xp.square(problems.moment) - 1.0,
        "ridge": lambda: problems.moment,
        "ols": lambda: _excess_at_least_squares(problems),
    }
    log_alpha = problems.curves.optimal_log_alpha(xp.stack([excess[name]() for name in names], 1))
    for i, name in enumerate(names):
        if name == "zero":
            log_alpha[:, i] = _first_to_enter(problems, log_alpha[:, i])
        elif name == "ridge":
            log_alpha[:, i] = xp.where(problems.moment == 0.0, math.inf, 0.0)
    state = evaluate(problems, log_alpha)
    failed = state.elbo == -math.inf  # collinear columns, nearly without noise
    if "zero" in names:  # what enters together may gain less than nothing
        nothing = objective(problems, error, noise_precision, xp.zeros_like(error))
        zero = names.index("zero")
        failed[:, zero] |= state.elbo[:, zero] < nothing[:, 0]
    if failed.any():
        state = evaluate(problems, xp.where(failed[..., None], math.inf, log_alpha))
    return state


def _first_to_enter(problems: Problems, alone: Array) -> Array:  # (B, D)
    """Of weights with the ``log_alpha`` that each would have alone, those that enter first."""
    xp = problems.xp
    first, movers = xp.smallest(alone[:, None], min(_FIRST_TO_ENTER, alone.shape[-1]))
    goes = _without_clashes(problems, movers, first < math.inf)
    none = xp.full_like(alone, math.inf)
    return xp.replaced(none, _of_problem(problems, movers), xp.where(goes, first, math.inf))


def _excess_at_least_squares(problems: Problems) -> Array:  # (B, D)
    xp, loc = problems.xp, problems.least_squares
    if loc is None:
        gram = problems.gram
        gram = problems.x_rows @ problems.x_rows.swapaxes(-1, -2) if gram is None else xp.copy(gram)
        # A trace of ridge, so that collinear columns share their weight instead of failing.
        diagonal = xp.diagonal(gram)
        diagonal += float(xp.finfo(gram.dtype).eps) ** 0.5
        factor, failed = xp.cholesky(gram)
        loc = xp.cholesky_solve(factor, problems.moment)
        loc = xp.where(failed[:, None], 0.0, loc)
    residual = problems.target - (loc[:, None] @ problems.x_rows)[:, 0]
    noise_precision = best_noise_precision(problems, xp.square(residual).sum(-1)[:, None])
    if problems.noise_precision is None:  # less one degree of freedom per feature, as for z-scores
        noise_precision = noise_precision * (1 - loc.shape[-1] / problems.num_data)
    return noise_precision * xp.square(loc) / problems.kl_weight - 1.0


class Moves(NamedTuple):
    """What single weights could do."""

    at: Array  # (B, S, A), positions of the active weights in a flattened (B, S, D)
    joint: Array  # (B, S, A), log_alpha at the joint optimum of (loc, alpha), all else fixed
    inverse: Array  # (B, S, A, A), of x_active' x_active + diag(alpha)
    refitted: Array  # (B, S, D), log_alpha of the best move of alpha, all loc refitted
    stays: Array  # (B, S, D), whether that leaves the weight in
    gain: Array  # (B, S, D), by which that move raises the ELBO, in nats


def find_moves(problems: Problems, state: State) -> Moves:
    """The best single moves from ``state``, with ``beta`` held fixed.

    With all loc refitted, alpha_d adds ``free / (2 (unexplained + alpha)) - KL(alpha)`` to the
    ELBO over kl_weight: ``unexplained`` is the squared norm of column d that the other active
    columns (shrunk as they are) leave, ``free`` its relevance once they have adapted.
    """
    xp = problems.xp
    at = _positions(problems, state.active)
    scale = (state.noise_precision / problems.kl_weight)[..., None]
    relevance = scale * xp.square(state.active_pull + state.active_loc)
    inverse = state.whitener.swapaxes(-1, -2) @ state.whitener
    variance = xp.diagonal(inverse)
    adapted = state.active_loc / variance

    columns = problems.x_rows.swapaxes(-1, -2)
    explained = state.whitener @ state.rows
    if problems.gram is None:
        explained = explained @ columns[:, None]

    def with_active(values: Array, active_values: Array) -> Array:
        # Unused slots write to pruned weights.
        return xp.where(state.kept, xp.replaced(values, at, active_values), values)

    left = 1.0 - xp.square(explained).sum(-2)
    unexplained = with_active(left, 1.0 / variance - state.active_alpha)
    unexplained = xp.at_most(xp.at_least(unexplained, float(xp.finfo(scale.dtype).eps)), 1.0)
    free = scale * xp.square(with_active(state.residual @ columns, adapted))
    dim = free.shape[-1]
    excess = xp.concatenate((free, relevance), -1) - 1.0
    optimal = problems.curves.optimal_log_alpha(excess)
    alone, joint = optimal[..., :dim], optimal[..., dim:]

    # Two candidates, whose gains are exact: the optimum of a weight that is alone, and, correlated
    # with others, that of the empirical-Bayes KL, a root of a quadratic, times a rough factor.
    slope = free - 2.0 * unexplained
    square = xp.square(unexplained)
    root = xp.sqrt(xp.square(slope) + 4.0 * excess[..., :dim] * square)
    rough = 2.7 * square / (slope + root)  # negative, NaN: none
    rough = xp.where(rough > 0.0, xp.log(rough), math.inf)
    candidates = xp.stack((alone, rough))
    value = 0.5 * free / (xp.exp(candidates) + unexplained) - problems.curves.kl(candidates)
    first = value[0] >= value[1]
    value = xp.where(first, value[0], value[1])
    stays = value > 0.0
    refitted = xp.where(stays, xp.where(first, alone, rough), math.inf)
    now = (0.5 * scale * adapted * state.active_loc - state.active_kl) * state.filled
    now = xp.replaced(xp.zeros_like(value), at, now)
    gain = problems.kl_weight * (xp.at_least(value, 0.0) - now)
    return Moves(at, joint, inverse, refitted, stays, gain)


def newton_step(
    problems: Problems, state: State, moves: Moves
) -> tuple[Array, Array]:  # (B, S, A), (B, S)
    """``log_alpha`` of the active weights after a Newton step, ``loc`` and ``beta`` eliminated.

    And what it is to gain where the ELBO is as curved as here.

    The step is taken in ``log(alpha / (1 + alpha))``: like ``log alpha`` for weights that stay,
    and like the shrinkage factor ``1 / (1 + alpha)``, in which the ELBO is quadratic, for weights
    that hardly do. Where the ELBO curves upwards, it climbs by at least a set length, so that no
    saddle holds it. Weights with ``z² <= kl_weight`` are pruned on the way.
    """
    xp = problems.xp
    beta = state.noise_precision[..., None]
    pull, loc = state.active_pull, state.active_loc
    energy = 0.5 * beta * pull * loc
    h = Piece(state.position, state.slope_coefficients)
    gradient = (problems.kl_weight * h.value() - energy) * state.filled
    keeps = state.active_alpha / (1.0 + state.active_alpha)
    bend = h.slope() * (-problems.kl_weight / problems.curves.kl.width)

    inverse = moves.inverse
    if problems.noise_precision is None:  # it follows
        follows = (0.5 / problems.num_data) * beta
        if problems.largest_noise_precision < math.inf:
            follows = follows * (beta < problems.largest_noise_precision)
        inverse = inverse + loc[..., :, None] * (follows * loc)[..., None, :]
    hessian = (-beta * pull)[..., :, None] * inverse * pull[..., None, :]
    # No step in unused slots.
    diagonal = xp.diagonal(hessian)
    diagonal += xp.where(state.filled, energy + bend - gradient * keeps, 1.0)

    factor, saddle = xp.cholesky(hessian)
    step = xp.cholesky_solve(factor, gradient)
    if saddle.any():
        scale = energy + abs(bend) + ~state.filled
        step[saddle] = _climb(xp, hessian[saddle], gradient[saddle], scale[saddle])
    log_alpha = state.active_log_alpha
    log_share = xp.at_most(log_alpha, 0.0) - xp.log1p(xp.exp(-abs(log_alpha)))
    change = step - step * keeps
    change = xp.at_least(xp.where(change != change, 0.0, change), -_LARGEST_STEP)
    # 1/(1 + alpha) falls by no more than a factor of 4 at a time.
    log_share = xp.minimum(log_share + change, 0.25 * log_share)
    moved = log_share - xp.log(-xp.expm1(log_share))
    pruned = (moves.joint == math.inf) | (moved > _LARGEST_LOG_ALPHA)
    return xp.where(pruned, math.inf, moved), 0.5 * (gradient * step).sum(-1)


def _climb(xp: Arrays, hessian: Array, gradient: Array, scale: Array) -> Array:
    # (K, A, A), (K, A), (K, A) -> (K, A)
    root = 1.0 / xp.sqrt(xp.at_least(scale, float(xp.finfo(scale.dtype).tiny)))
    curvature, basis = xp.eigh(root[..., :, None] * hessian * root[..., None, :])
    slope = (basis.swapaxes(-1, -2) @ (root * gradient)[..., None])[..., 0]
    step = abs(slope) / xp.at_least(abs(curvature), 0.02)
    step = xp.where(curvature < 0.0, xp.at_least(step, _SMALLEST_ESCAPE), step)
    step = xp.where(slope < 0.0, -step, step)
    return root * (basis @ step[..., None])[..., 0]


def change_set(
    problems: Problems, state: State, moves: Moves, log_alpha: Array, tolerance: float
) -> Array:  # (B, S, D)
    """``log_alpha`` with several weights entering that are little correlated, or one leaving."""
    # A weight that leaves does so alone, and only if nothing that enters gains more.
    xp = problems.xp
    leaves = state.kept & ~moves.stays
    gain = xp.where(state.kept & moves.stays, 0.0, moves.gain)
    limit = xp.at_least(state.filled.sum(-1), _FIRST_TO_ENTER)
    limit = xp.minimum(limit, (gain > tolerance).sum(-1))
    width = int(limit.max())
    movers = xp.smallest(-gain, width)[1]
    at = _positions(problems, movers)
    rank = xp.count(width, gain)
    goes = (rank < limit[..., None]) & ((rank == 0) | ~leaves.take(at))
    goes = _without_clashes(problems, movers, goes)
    values = xp.where(goes, moves.refitted.take(at), log_alpha.take(at))
    return xp.replaced(log_alpha, at, values)


def _without_clashes(problems: Problems, movers: Array, goes: Array) -> Array:  # (B, S, W)
    """Those of ``movers`` that go and are little correlated with all that go before them."""
    if problems.gram is None:
        columns = _rows(problems, problems.x_rows, movers)
        correlation = columns @ columns.swapaxes(-1, -2)
    else:
        correlation = _pairs(problems, problems.gram, movers)
    rank = problems.xp.count(movers.shape[-1], movers)
    clash = (abs(correlation) > _LARGEST_CORRELATION) & (rank[:, None] > rank)
    return goes & ~(clash & goes[..., None, :]).any(-1)


def single_move(problems: Problems, state: State, moves: Moves) -> Array:  # (B, S, D)
    """``log_alpha`` after the one move of the largest gain."""
    best = _positions(problems, moves.gain.argmax(-1)[..., None])
    return problems.xp.replaced(state.log_alpha, best, moves.refitted.take(best))


def join(xp: Arrays, state: State, finished: Array) -> tuple[State, Array]:
    """The best start alone, if all starts of every problem have come close to it.

    Close: no weight is shrunk differently by more than ``_SAME_SHARE``; the others would follow.
    """
    num, starts = state.elbo.shape
    if starts == 1:
        return state, finished
    share = 1.0 / (1.0 + xp.exp(state.log_alpha))
    if float((xp.amax(share, 1) - xp.amin(share, 1)).max()) > _SAME_SHARE:
        return state, finished
    best = state.elbo.argmax(-1)
    if num == 1:
        one = slice(int(best[0]), int(best[0]) + 1)
        return State(*(field[:, one] for field in state)), finished[:, one]
    joined = State(*(of_start(xp, field, best)[:, None] for field in state))
    return joined, of_start(xp, finished, best)[:, None]


def of_start(xp: Arrays, field: Array, start: Array) -> Array:  # (B, S, ...), (B,) -> (B, ...)
    """Of each problem what belongs to one start; the only one where all have become one."""
    num, starts = field.shape[:2]
    return field[:, 0] if starts == 1 else field[xp.count(num, field), start]


def iterate(
    problems: Problems, state: State, finished: Array, tolerance: float
) -> tuple[State, Array]:
    """One iteration for all problems and starts but the finished (B, S); the ELBO of none falls.

    Finished is what has nothing to enter or leave, and gained no more than the tolerance or was at
    rest when the iteration began.
    """
    xp = problems.xp
    moves = find_moves(problems, state)
    best_change = xp.amax(moves.gain * (state.kept != moves.stays), -1)
    grows = best_change > tolerance
    finished = finished | (state.at_rest & ~grows)
    if finished.all():
        return state, finished

    proposal = moves.joint
    promised: Array | float = math.nan  # by the Newton step, where there is one
    near = best_change < _SMALL_CHANGE
    if near.any():
        moved, gain = newton_step(problems, state, moves)
        proposal = xp.where(near[..., None], moved, proposal)
        promised = xp.where(near, gain, math.nan)
    proposal = xp.replaced(state.log_alpha, moves.at, proposal)
    if grows.any():
        proposal = change_set(problems, state, moves, proposal, tolerance)
    if finished.any():
        proposal = xp.where(finished[..., None], state.log_alpha, proposal)
    new = evaluate(problems, proposal)
    gained = new.elbo - state.elbo
    accepted = (gained >= 0.5 * best_change * grows) | finished
    if not accepted.all():
        new = _fall_back(problems, state, moves, proposal, accepted, grows)
        gained = new.elbo - state.elbo
    left = xp.square(gained - promised) <= _LEFT * tolerance * promised
    at_rest = accepted & left & ~grows & (gained <= _GAINED * tolerance)
    # Where something grows, but by less than rounding, there is nothing left to gain either.
    return new._replace(at_rest=at_rest), finished | (gained <= tolerance * ~grows)


def _fall_back(
    problems: Problems,
    state: State,
    moves: Moves,
    proposal: Array,
    accepted: Array,
    grows: Array,
) -> State:
    """The first of the safer proposals that does not lower the ELBO, where one was refused."""
    xp = problems.xp
    values = proposal.take(moves.at)
    stays = state.filled & (values < math.inf)  # an unused slot may hold one that would enter
    part = state.active_log_alpha + 0.25 * (values - state.active_log_alpha)
    shorter = xp.replaced(state.log_alpha, moves.at, xp.where(stays, part, math.inf))
    joint = xp.replaced(state.log_alpha, moves.at, moves.joint)
    one = single_move(problems, state, moves)
    new = state
    for fallback in (shorter, xp.where(grows[..., None], one, joint), one, state.log_alpha):
        proposal = xp.where(accepted[..., None], proposal, fallback)
        new = evaluate(problems, proposal)
        accepted = accepted | (new.elbo >= state.elbo)
        if accepted.all():
            break
    return new
