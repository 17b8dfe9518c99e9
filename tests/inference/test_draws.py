"""Outputs at draws of the weights: functions of all inputs, in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, Posterior
from bayes_svdo.inference import draws
from bayes_svdo.models import Categorical, Gaussian, dense


class Pooled(nn.Module):
    """Every weight meets an input at many positions, which are averaged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).flatten(2).mean(2)


class PerToken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).mean(1)


def posterior_of(net: nn.Module, log_sigma2: float = 0.0, likelihood: Any = None) -> Posterior:
    model = BayesianNetwork(net, likelihood or Gaussian(), num_data=8)
    return Posterior(model, AdditiveNoiseGuide(model, init_log_sigma2=log_sigma2))


@pytest.mark.parametrize(
    ("net", "x", "sd"),
    [
        (Pooled(nn.Conv2d(1, 1, 3, bias=False)), torch.ones(2, 1, 18, 18), 3.0),
        (Pooled(nn.Conv1d(2, 1, 2, bias=False)), torch.ones(2, 2, 30), 2.0),
        (PerToken(), torch.ones(2, 50, 4), 2.0),
        (nn.Linear(9, 1, bias=False), torch.ones(2, 9), 3.0),
    ],
    ids=["conv2d", "conv1d", "tokens", "linear"],
)
def test_the_spread_is_that_of_shared_weights(net: nn.Module, x: Tensor, sd: float) -> None:
    """The root of the number of weights: whatever is pooled, they are the same weights."""
    torch.manual_seed(0)
    found = posterior_of(net).predict(x, 2000).std(0)
    assert found.tolist() == [pytest.approx([sd], rel=5 / math.sqrt(2 * 2000))] * 2


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_draw_is_one_function_of_all_inputs(batch_size: int) -> None:
    torch.manual_seed(0)
    posterior = posterior_of(nn.Linear(1, 1, bias=False))
    x = torch.tensor([[-1.0], [1.0], [2.0]])
    values = posterior.predict(x, 100, batch_size=batch_size)[..., 0]
    torch.testing.assert_close(values[:, 0], -values[:, 1])
    torch.testing.assert_close(values[:, 2], 2 * values[:, 1])


def test_draws_do_not_depend_on_the_size_of_batches() -> None:
    posterior = posterior_of(dense((5, 7, 3)), -3.0, Categorical())
    x = torch.randn(20, 5)
    found = []
    for batch_size in (1, 7, 1000):
        torch.manual_seed(3)
        found.append(posterior.predict(x, 70, batch_size=batch_size))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


class Branching(nn.Module):
    """Goes either way by a value, which vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        output = self.inner(x)
        return output if float(output.detach().sum()) > 0 else -output


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x[:, None].expand(-1, 4, -1))[0][:, -1]


NETWORKS = {
    "dense": lambda: dense((5, 7, 3)),
    "normalised": lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)),
    "dropout": lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3)),
    "branching": Branching,
    "recurrent": Recurrent,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_several_draws_at_once_are_those_one_by_one(name: str, monkeypatch: Any) -> None:
    posterior = posterior_of(NETWORKS[name](), -3.0, Categorical())
    x = torch.randn(20, 5)
    torch.manual_seed(3)
    found = posterior.predict(x, 10)
    monkeypatch.setattr(draws, "_vmapped", None)  # cannot be called
    torch.manual_seed(3)
    torch.testing.assert_close(posterior.predict(x, 10), found)


def test_dense_networks_are_called_once_for_many_draws() -> None:
    calls = []
    net = dense((5, 7, 3))
    net.register_forward_hook(lambda *args: calls.append(1))
    posterior = posterior_of(net, -3.0, Categorical())
    posterior.predict(torch.randn(10, 5), draws._MOST_DRAWS)
    assert len(calls) == 1


def test_a_batch_is_of_all_draws_together() -> None:
    sizes = []

    class Seen(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = super().forward(x)
            inner = output
            while torch._C._functorch.is_batchedtensor(inner):
                inner = torch._C._functorch.get_unwrapped(inner)
            sizes.append(inner.numel())
            return output

    posterior_of(Seen(5, 1), -3.0).predict(torch.randn(20, 5), 30, batch_size=60)
    assert sum(sizes) == 20 * 30
    assert max(sizes) == 60


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.numel = max(self.numel, result.numel())
        return result


def test_memory_does_not_grow_with_draws_or_data() -> None:
    """Beyond the result itself: one output, many hidden units."""
    posterior = posterior_of(dense((5, 100, 1)), -3.0)
    with Largest() as few:
        posterior.predict(torch.randn(100, 5), 64, batch_size=100)
    with Largest() as many:
        posterior.predict(torch.randn(150, 5), 128, batch_size=100)
    assert many.numel == few.numel <= draws._MOST_DRAWS * 5 * 100  # the weights themselves


class Averaging(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(0, keepdim=True)


@pytest.mark.parametrize("num_samples", [None, 1, 5])
def test_an_output_without_a_row_for_each_input_is_refused(num_samples: int | None) -> None:
    """A single data point without its batch dimension would come out once for each feature."""
    with pytest.raises(ValueError, match=r"one row for each of the 4 data points.*\n.*x\[None\]"):
        posterior_of(nn.Linear(4, 1)).predict(torch.randn(4), num_samples)
    with pytest.raises(ValueError, match=r"each of the 3 data points of x, but has shape \(1, 2\)"):
        posterior_of(Averaging(4, 2)).predict(torch.randn(3, 4), num_samples)


def test_draws_are_pruned_where_that_is_asked_for() -> None:
    torch.manual_seed(0)
    posterior = posterior_of(nn.Linear(4, 1))  # log sigma2 = 0: nearly all noise
    x = torch.randn(3, 4)
    assert posterior.predict(x, 50).std(0).min() > 0.1
    pruned = posterior.predict(x, 50, threshold=-100.0)
    assert torch.equal(pruned, posterior.predict(x, threshold=-100.0).expand(50, 3, 1))
    assert posterior.predict(x, 50).std(0).min() > 0.1
    with pytest.raises((TypeError, ValueError), match="threshold"):
        posterior.predict(x, 2, threshold="abc")  # type: ignore[arg-type]


def test_a_seed_makes_draws_repeatable_and_leaves_the_generator_alone() -> None:
    posterior = posterior_of(nn.Linear(4, 1))
    x = torch.randn(3, 4)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = posterior.predict(x, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(posterior.predict(x, 5, seed=1), first)
    assert not torch.equal(posterior.predict(x, 5, seed=2), first)


def test_a_network_that_takes_no_such_input_says_so() -> None:
    with pytest.raises(ValueError, match=r"cannot take x of shape \(20, 4\)"):
        posterior_of(dense((5, 7, 3)), -3.0, Categorical()).predict(torch.randn(20, 4), 10)
