"""torch's fused Adam, without what its every step looks up again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Group(NamedTuple):
    """A parameter group's tensors, in the order of its parameters."""

    parameters: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]
    all_steps: Tensor  # whose elements they are


class Adam(torch.optim.Adam):
    """``torch.optim.Adam(params, lr, fused=True)``, the same to the last bit.

    torch sorts parameters by device and dtype in every step and counts the steps of each by
    itself, which takes as long as half of the update of a small network. Here the one is done
    once, and the other for all together. Where a step is out of the ordinary (the first one, a
    parameter without a gradient, a scaled loss), it is torch's own.

    Args:
        params: Parameters, or groups of them; each group on one device and of one dtype.
        lr: Learning rate of groups that have none of their own.
    """

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr, fused=True)
        self._sorted: list[_Group] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._sorted = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        super().add_param_group(param_group)
        self._sorted = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update, as torch's."""
        if self._sorted is None or closure is not None or hasattr(self, "grad_scale"):
            return self._step_and_sort(closure)
        gradients: list[Any] = [[p.grad for p in group.parameters] for group in self._sorted]
        if any(gradient is None for of_group in gradients for gradient in of_group):
            return super().step(closure)
        for group, sorted_, of_group in zip(
            self.param_groups, self._sorted, gradients, strict=True
        ):
            sorted_.all_steps.add_(1)
            beta1, beta2 = group["betas"]
            torch._fused_adam_(
                sorted_.parameters, of_group, sorted_.means, sorted_.squares, [], sorted_.steps,
                lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
                eps=group["eps"], amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
            )  # fmt: skip
        return None

    def _step_and_sort(self, closure: Callable[[], Any] | None) -> Any:
        loss = super().step(closure)
        states = [[self.state[p] for p in group["params"]] for group in self.param_groups]
        alike = all(
            len({(p.device, p.dtype) for p in group["params"]}) == 1 for group in self.param_groups
        )
        complete = all(states_of_group and all(states_of_group) for states_of_group in states)
        if self._sorted is None and alike and complete:
            self._sorted = [
                _sort(group["params"], of)
                for group, of in zip(self.param_groups, states, strict=True)
            ]
        return loss


def _sort(parameters: list[Tensor], states: list[dict[str, Tensor]]) -> _Group:
    """The tensors of a group; their steps become elements of one tensor."""
    all_steps = torch.stack([state["step"] for state in states])
    for state, step in zip(states, all_steps.unbind(), strict=True):
        state["step"] = step
    means, squares, steps = (
        [state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step")
    )
    return _Group(list(parameters), means, squares, steps, all_steps)
