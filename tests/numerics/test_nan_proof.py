"""Training stays finite where the textbook formula for log alpha ends in NaN.

Luchnikov, Faizullin & Blumental (2018) report that training always ends in NaN after enough steps.
The cause is ``log(theta**2)``: a weight that no data gradient holds is contracted by its KL, Adam
takes it to zero, the square underflows, and its gradient is 0 · inf.
"""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, fit
from bayes_svdo.data import load
from bayes_svdo.models import Categorical, dense

SIZES = (64, 256, 10)
BATCH, LR, LOG_SIGMA2 = 100, 0.01, -25.0


class TextbookLayer(nn.Module):
    """Additive noise with log alpha from ``log(theta**2)``, as it stands in the formula."""

    def __init__(self, fan_in, fan_out):
        super().__init__()
        bound = fan_out**-0.5
        self.theta = nn.Parameter(torch.empty(fan_out, fan_in).uniform_(-bound, bound))
        self.log_sigma2 = nn.Parameter(torch.full((fan_out, fan_in), LOG_SIGMA2))
        self.bias = nn.Parameter(torch.zeros(fan_out))

    def forward(self, x):
        std = (F.linear(x.square(), self.log_sigma2.exp()) + 1e-8).sqrt()
        return F.linear(x, self.theta, self.bias) + std * torch.randn_like(std)

    def kl(self):
        log_alpha = self.log_sigma2 - torch.log(self.theta.square())
        step = 0.63576 * torch.sigmoid(1.87320 + 1.48695 * log_alpha)
        return (0.5 * torch.log1p(torch.exp(-log_alpha)) - step).sum()


@pytest.fixture(scope="module")
def digits():
    x, y = load("digits").train
    return x.flatten(1), y


def test_the_textbook_layer_ends_in_nan(digits):
    torch.manual_seed(0)
    x, y = digits
    layers = [TextbookLayer(*sizes) for sizes in pairwise(SIZES)]
    parameters = [p for layer in layers for p in layer.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=LR)
    for _ in range(2000):
        rows = torch.randint(len(x), (BATCH,))
        hidden = layers[0](x[rows]).relu()
        # Their scale: the mean over the batch where the sum belongs.
        loss = len(x) / BATCH * F.cross_entropy(layers[1](hidden), y[rows])
        loss = loss + sum(layer.kl() for layer in layers)
        if not loss.isfinite():
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isnan()


@pytest.mark.slow
@pytest.mark.no_cover  # tracing every line would take longer than the steps
def test_ours_is_finite_over_ten_times_as_many_steps(digits):
    """The same network, data, rate and initial noise, for 20,000 steps; KL from the first step."""
    x, y = digits
    torch.manual_seed(0)
    net = dense(SIZES)
    for layer in (net.fc1, net.fc2):
        bound = layer.out_features**-0.5
        nn.init.uniform_(layer.weight, -bound, bound)
    model = BayesianNetwork(net, Categorical(), num_data=len(x))
    steps_per_epoch = math.ceil(len(x) / BATCH)
    posterior = fit(
        model,
        (x, y),
        guide=AdditiveNoiseGuide(model, init_log_sigma2=LOG_SIGMA2),
        epochs=math.ceil(20_000 / steps_per_epoch),
        batch_size=BATCH,
        lr=LR,
        lr_schedule=lambda progress: 1.0,
        kl_warmup=(0.0, 0.0),
        seed=0,
        progress=False,
    )
    assert posterior.history[-1]["step"] >= 20_000
    assert all(math.isfinite(value) for value in posterior.history.column("objective"))
    for name, log_alpha in posterior.log_alpha().items():
        loc, log_sigma2 = posterior.guide.parameters_of(name)
        assert log_alpha.isfinite().all()
        assert loc.isfinite().all()
        assert log_sigma2.isfinite().all()
