"""The alternation of the 2016 poster: ``loc`` given ``alpha``, then ``alpha`` given ``loc``.

Kept to compare with: it reaches the same optima as the joint updates, but with ``loc`` held fixed
the best ``alpha`` is always finite, so weights only shrink by a constant factor per iteration and
never arrive at 0. Units and shapes are those of :mod:`.exact_regression_ascent`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bayes_svdo.inference.exact_regression_ascent import (
    Problems,
    State,
    evaluate,
    find_moves,
    objective,
)


def alternate(problems: Problems, state: State) -> tuple[State, list[Tensor]]:
    """One iteration; ``alpha``, then ``loc``, then ``beta``, and the ELBO after each, (B, S)."""
    energy = 0.5 * state.noise_precision[..., None] * state.loc.square() / problems.kl_weight
    log_alpha = problems.curves.log_alpha_given_loc(energy)
    kl = problems.curves.kl(log_alpha).sum(-1)

    noise = torch.where(log_alpha.isfinite(), log_alpha.exp() * state.loc.square(), 0.0)
    error = state.residual.square().sum(-1) + noise.sum(-1)
    after_alpha = objective(problems, error, state.noise_precision, kl)

    new = evaluate(problems, log_alpha)
    noise = new.active_alpha * new.active_loc.square()
    error = new.residual.square().sum(-1) + noise.sum(-1)
    after_loc = objective(problems, error, state.noise_precision, kl)
    return new, [after_alpha, after_loc, new.elbo]


def prune(problems: Problems, state: State) -> State:
    """Set weights with ``z² <= kl_weight`` to 0, unless the ELBO falls by more than rounding."""
    pruned = evaluate(problems, _joint_optima(problems, state))
    rounding = 10 * torch.finfo(state.elbo.dtype).eps * state.elbo.abs()
    lowers = pruned.elbo < state.elbo - rounding
    keeps = torch.where(lowers[..., None], state.log_alpha, pruned.log_alpha)
    return evaluate(problems, keeps)


def _joint_optima(problems: Problems, state: State) -> Tensor:  # (B, S, D)
    joint = find_moves(problems, state).joint
    return state.log_alpha.scatter(-1, state.active, joint)
