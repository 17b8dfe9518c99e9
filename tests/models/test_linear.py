from __future__ import annotations

import torch

from bayes_svdo.models import linear_regression, logistic_regression


def test_they_start_at_zero_so_every_class_is_equally_likely() -> None:
    net = logistic_regression(784)
    assert torch.equal(net(torch.randn(3, 1, 28, 28)), torch.zeros(3, 10))
    assert torch.equal(linear_regression(5)(torch.randn(3, 5)), torch.zeros(3, 1))


def test_outputs_are_linear_in_the_flattened_features() -> None:
    net = linear_regression(6, 2)
    weight, bias = torch.randn(2, 6), torch.randn(2)
    net.load_state_dict({"linear.weight": weight, "linear.bias": bias})
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(net(x), x.reshape(4, 6) @ weight.T + bias)


def test_they_say_how_they_are_built_again() -> None:
    spec = {"name": "logistic-regression", "in_features": 4, "out_features": 3}
    assert logistic_regression(4, 3).spec == spec
    assert linear_regression(4).spec == {
        "name": "linear-regression",
        "in_features": 4,
        "out_features": 1,
    }


def test_the_zero_start_is_no_trap() -> None:
    """Gradients of a linear model do not vanish at zero."""
    net = logistic_regression(4, 3)
    loss = torch.nn.functional.cross_entropy(net(torch.randn(5, 4)), torch.tensor([0, 1, 2, 0, 1]))
    loss.backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        assert (parameter.grad != 0).all()
