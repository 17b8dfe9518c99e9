"""Adam is torch's fused one, to the last bit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayes_svdo.inference.adam import Adam


def groups(net: nn.Module) -> list[dict[str, Any]]:
    first, *others = net.parameters()
    return [{"params": [first], "lr": 0.1}, {"params": others, "lr": 0.02}]


@pytest.fixture
def pair() -> tuple[nn.Module, nn.Module, torch.optim.Adam, Adam]:
    torch.manual_seed(0)
    one = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    other = copy.deepcopy(one)
    return one, other, torch.optim.Adam(groups(one), fused=True), Adam(groups(other))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int, frozen: bool = False) -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    net(x).square().sum().backward()
    if frozen:
        next(net.parameters()).grad = None
    for group in optimizer.param_groups:
        group["lr"] *= 0.9
    optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_every_step_is_torchs(pair) -> None:
    one, other, theirs, ours = pair
    start = [p.clone() for p in one.parameters()]
    for seed in range(6):
        # A parameter may have no gradient, in the first step or a later one.
        for net, optimizer in ((one, theirs), (other, ours)):
            step(net, optimizer, seed, frozen=seed in (0, 3))
        assert same(one, other)
    assert ours._sorted is not None
    assert not any(torch.equal(a, b) for a, b in zip(start, one.parameters(), strict=True))


@pytest.mark.parametrize("ours_loads", [True, False])
def test_a_state_of_either_is_the_others_too(pair, ours_loads: bool) -> None:
    one, other, theirs, ours = pair
    begun, loads = ((one, theirs), (other, ours)) if ours_loads else ((other, ours), (one, theirs))
    for seed in range(3):
        step(*begun, seed)
    step(*loads, 0)
    for mine, given in zip(loads, begun, strict=True):
        mine.load_state_dict(copy.deepcopy(given.state_dict()))
    for seed in range(3, 6):
        step(*begun, seed)
        step(*loads, seed)
    assert same(one, other)


def test_a_copy_goes_on_by_itself(pair) -> None:
    one, other, theirs, ours = pair
    for seed in range(3):
        step(one, theirs, seed)
        step(other, ours, seed)
    copied, optimizer = copy.deepcopy((other, ours))
    for seed in range(3, 6):
        step(one, theirs, seed)
        step(copied, optimizer, seed)
    assert same(one, copied)
    assert {float(state["step"]) for state in optimizer.state.values()} == {6.0}
    assert {float(state["step"]) for state in ours.state.values()} == {3.0}


def test_a_group_may_be_added(pair) -> None:
    one, other, theirs, ours = pair
    added = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    for seed in range(4):
        for net, optimizer, extra in ((one, theirs, added[0]), (other, ours, added[1])):
            if seed == 2:
                optimizer.add_param_group({"params": [extra], "lr": 0.1})
            extra.grad = extra.detach() * seed
            step_with(net, optimizer, seed)
    assert same(one, other)
    assert torch.equal(*added)
    assert not torch.equal(added[0], torch.ones(3))


def step_with(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    net.zero_grad()
    net(x).square().sum().backward()
    optimizer.step()


def test_a_closure_and_dtypes_of_a_group_that_differ_are_left_to_torch(pair) -> None:
    one, other, theirs, ours = pair
    results = []
    for net, optimizer in ((one, theirs), (other, ours)):

        def closure(net: nn.Module = net) -> Tensor:
            net.zero_grad()
            loss: Tensor = net(torch.ones(1, 5)).square().sum()
            loss.backward()
            return loss

        results.append([optimizer.step(closure).item() for _ in range(3)])
    assert results[0] == results[1]
    mixed = [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.float64))]
    optimizer = Adam(mixed, lr=0.1)
    for _ in range(3):
        for parameter in mixed:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert optimizer._sorted is None
    torch.testing.assert_close(mixed[0].double(), mixed[1], rtol=1e-6, atol=0)
