"""One draw of a weight, made as late as possible, and once."""

from __future__ import annotations

import math
import sys
from types import FrameType
from typing import Any, Literal, get_args

import torch
import torch.utils.checkpoint
from torch import Tensor

from bayes_svdo.distributions.additive_noise import AdditiveNoiseNormal
from bayes_svdo.distributions.special import signed

# More would overflow a sum of float32 variances; the KL still sees the true value.
_MAX_LOG_VARIANCE = 40.0

# Says whether hooks such as a checkpoint's are in place; torch has it since 2.8.
_top_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)

Reuse = Literal["draw", "independent"]


def check_reuse(reuse: Reuse) -> Reuse:
    """``reuse``, if it is known.

    Raises:
        ValueError: It is not.
    """
    if reuse not in get_args(Reuse):
        raise ValueError(f'reuse must be "draw" or "independent", but is {reuse!r}.')
    return reuse


class WeightReused(Exception):
    """A weight whose noise goes into one operation's output is needed in another way.

    Two uses share one weight, so they cannot have independent noise: the weight must be drawn. Our
    objectives catch this, draw the site ``name`` from then on, and start the pass again.
    """

    # Not a RuntimeError: poutine.trace replaces those by new ones, made from their message.

    def __init__(self, name: str, use: str = "more than once in one forward pass") -> None:
        super().__init__(
            f'the weight of site "{name}" is used {use}, so its noise cannot be drawn in the '
            "output of one operation.\n"
            f'  Try LocalReparameterization(drawn={{"{name}"}}), which draws this weight once, or '
            'reuse="independent" if independent noise at each use is what you want.'
        )
        self.name = name


@signed
class _BoundedExp(torch.autograd.Function):
    """``exp(x)``, at most ``exp(bound)``; its gradient is the bounded value, never zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.exp().clamp_(max=math.exp(bound))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (output,) = ctx.saved_tensors
        return grad * output, None


def _may_be_checkpointed() -> bool:
    """Whether a checkpoint may be under way: a quick look that spares one at the whole stack."""
    if _top_hooks is None:
        return torch.is_grad_enabled()  # a checkpoint does nothing without gradients
    return _top_hooks(True) is not None


class Draw:
    """The one draw that an undrawn weight and its transposes stand for."""

    def __init__(self, name: str, q: AdditiveNoiseNormal, reuse: Reuse) -> None:
        self.name, self.q, self.reuse = name, q, check_reuse(reuse)
        self.grad_enabled = torch.is_grad_enabled()
        self.used = False
        self.value: Tensor | None = None

    def _exp(self, scale: float) -> Tensor:
        """``sigma ** (2 * scale)``, in float32 or float64."""
        log_sigma2 = self.q.log_sigma2
        # In float16 the variance would underflow below log_sigma2 = -16.6.
        if log_sigma2.dtype in (torch.float16, torch.bfloat16):
            log_sigma2 = log_sigma2.float()
        if scale != 1:  # else a pass over the weights for nothing, and one in the gradient
            log_sigma2 = scale * log_sigma2
        exp: Tensor = _BoundedExp.apply(log_sigma2, scale * _MAX_LOG_VARIANCE)
        return exp

    def claim(self) -> None:
        """Take the weight for local reparameterization, which can be had once."""
        self.check_gradients()
        if self.used and self.reuse == "draw":
            raise WeightReused(self.name)
        if _may_be_checkpointed():
            self._refuse_checkpoints()
        self.used = True

    def claim_moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, for local reparameterization."""
        self.claim()
        return self.q.loc, self._exp(1.0)

    def draw(self) -> Tensor:
        """The draw, made at the first call."""
        self.check_gradients()
        if self.value is None:
            self.claim()
            # By exp(log_sigma2 / 2): the root of a variance that underflows has no gradient.
            sigma = self._exp(0.5).to(self.q.loc.dtype)
            self.value = torch.addcmul(self.q.loc, sigma, torch.randn_like(self.q.loc))
        return self.value

    def check_gradients(self) -> None:
        """Refuse uses whose gradient would not arrive here.

        A custom ``autograd.Function`` runs its forward inside ``no_grad``, and sees by the sample
        itself, which is no function of ``loc``, that it need not go back.
        """
        if self.grad_enabled and not torch.is_grad_enabled():
            self._refuse_checkpoints()
            raise WeightReused(self.name, "inside torch.no_grad or a custom autograd.Function")

    def _refuse_checkpoints(self) -> None:
        """A checkpoint runs its part again in the backward pass, when other weights are in place.

        Raises:
            NotImplementedError: This is called from within one.
        """
        frame: FrameType | None = sys._getframe()
        while frame is not None:
            if frame.f_code.co_filename == torch.utils.checkpoint.__file__:
                raise NotImplementedError(
                    f'the weight of site "{self.name}" is used inside of torch.utils.checkpoint, '
                    "which runs the network again after its sampled weights are gone.\n"
                    "  Try the network without checkpoints, or smaller batches."
                )
            frame = frame.f_back
