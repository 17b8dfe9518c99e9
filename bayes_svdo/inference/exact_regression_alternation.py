"""The alternation of the 2016 poster: ``loc`` given ``alpha``, then ``alpha`` given ``loc``.

Kept to compare with: it reaches the same optima as the joint updates, but with ``loc`` held fixed
the best ``alpha`` is always finite, so weights only shrink by a constant factor per iteration and
never arrive at 0. Units and shapes are those of :mod:`.exact_regression_ascent`.
"""

from __future__ import annotations

import math

from bayes_svdo.inference.exact_regression_arrays import Array
from bayes_svdo.inference.exact_regression_ascent import (
    Problems,
    State,
    evaluate,
    find_moves,
    objective,
)


def alternate(problems: Problems, state: State) -> tuple[State, list[Array]]:
    """One iteration; ``alpha``, then ``loc``, then ``beta``, and the ELBO after each, (B, S)."""
    xp = problems.xp
    energy = 0.5 * state.noise_precision[..., None] * xp.square(state.loc) / problems.kl_weight
    log_alpha = problems.curves.log_alpha_given_loc(energy)
    kl = problems.curves.kl(log_alpha).sum(-1)

    noise = xp.where(log_alpha < math.inf, xp.exp(log_alpha) * xp.square(state.loc), 0.0)
    error = xp.square(state.residual).sum(-1) + noise.sum(-1)
    after_alpha = objective(problems, error, state.noise_precision, kl)

    new = evaluate(problems, log_alpha)
    noise = new.active_alpha * xp.square(new.active_loc)
    error = xp.square(new.residual).sum(-1) + noise.sum(-1)
    after_loc = objective(problems, error, state.noise_precision, kl)
    return new, [after_alpha, after_loc, new.elbo]


def prune(problems: Problems, state: State) -> State:
    """Set weights with ``z² <= kl_weight`` to 0, unless the ELBO falls by more than rounding."""
    xp, moves = problems.xp, find_moves(problems, state)
    pruned = evaluate(problems, xp.replaced(state.log_alpha, moves.at, moves.joint))
    rounding = 10 * float(xp.finfo(state.elbo.dtype).eps) * abs(state.elbo)
    lowers = pruned.elbo < state.elbo - rounding
    return evaluate(problems, xp.where(lowers[..., None], state.log_alpha, pruned.log_alpha))
