"""One graph: the same numbers as the objective's own, or an error that says why there is none."""

from __future__ import annotations

import math
import random
import shutil

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, LogUniform, TraceAnalyticKL_ELBO
from bayes_svdo.inference import graphs
from bayes_svdo.inference.compiled import CompiledObjective, compile_objective
from bayes_svdo.inference.graphs import UntraceableError
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical, dense

# torch warns of the first release of Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower")

X, Y = torch.rand(30, 64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
FULL = torch.ones((), dtype=torch.float64)


class Recurrent(nn.Module):
    """A weight in a nested call, used at every time step."""

    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(8, 6, batch_first=True), nn.Linear(6, 10)

    def forward(self, x):
        return self.out(self.lstm(x.view(-1, 8, 8))[0][:, -1])


class Twice(nn.Module):
    """A weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(64, 64), nn.Linear(64, 10)

    def forward(self, x):
        return self.out(self.inner(self.inner(x).relu()))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 10),
    )  # fmt: skip


NETWORKS = {
    "dense": lambda: dense((64, 20, 10)),
    "convolutional": convolutional,
    "recurrent": Recurrent,
    "reused": Twice,
}


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_values_and_gradients_are_those_of_the_objective(net, make_compiled, check_same_as_eager):
    check_same_as_eager(make_compiled(net()), X, Y)


class Sum(nn.Module):
    """Two parameters that are added: autograd gives both the same gradient."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(1, 64)), nn.Parameter(torch.randn(1, 64))
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(x + (self.p + self.q))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_parameters_that_are_added_have_gradients_of_their_own(backend):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        backend = "aot_eager"
    torch.manual_seed(0)
    model = BayesianNetwork(Sum(), Categorical(), num_data=1000, where="out.weight")
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-3.0)
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, guide, backend=backend)
    gradients = []
    for objective in (compiled, compiled.objective):
        objective.zero_grad()
        torch.manual_seed(5)
        with local_parameters():
            (objective(FULL, X, Y).loss / 32).backward()
        net = compiled.objective.model.net
        gradients.append((net.p.grad, net.q.grad))
    (p, q), (other_p, other_q) = gradients
    torch.testing.assert_close(p, other_p)
    torch.testing.assert_close(q, other_q)
    assert p.data_ptr() != q.data_ptr()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize(
    "elbo",
    [
        {"num_particles": 2},
        {"num_particles": 2, "vectorize_particles": True},
        {"local_reparameterization": False},
    ],
    ids=str,
)
def test_every_kind_of_elbo_can_be_compiled(elbo, make_compiled, check_same_as_eager):
    check_same_as_eager(make_compiled(dense((64, 20, 10)), sigma="unit", **elbo), X, Y)


@pytest.mark.usefixtures("traced_only")
def test_a_model_written_by_hand_can_be_compiled(check_same_as_eager):
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = AdditiveNoiseGuide(model)
    with local_parameters():
        guide(X, Y.float())
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, guide, X, Y.float())
    check_same_as_eager(compiled, X, Y.float())


@pytest.mark.usefixtures("traced_only")
def test_noise_is_drawn_anew_and_repeats_with_the_seed(make_compiled, evaluate):
    compiled = make_compiled(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    with local_parameters():
        second = compiled(FULL, X, Y)
    assert first.loss != second.loss
    assert evaluate(compiled, FULL, X, Y)[0].loss == first.loss


@pytest.mark.usefixtures("traced_only")
def test_a_pass_leaves_random_numbers_and_buffers_as_one_pass_does(make_compiled):
    compiled = make_compiled(convolutional())
    with local_parameters():
        torch.manual_seed(3)
        compiled(FULL, X, Y)
        state = torch.get_rng_state()
        norm = compiled.objective.model.net[2]
        assert norm.num_batches_tracked == 1
        torch.manual_seed(3)
        compiled.objective(FULL, X, Y)
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.num_batches_tracked == 2


@pytest.mark.usefixtures("traced_only")
def test_zeroed_weights_stay_zero_and_get_no_gradient(make_compiled, evaluate, check_same_as_eager):
    compiled = make_compiled(dense((64, 20, 10)))
    with torch.no_grad():
        compiled.objective.guide.log_sigma2.fc1.weight[:3] = 20.0
    compiled.objective.guide.prune_(3.0)
    check_same_as_eager(compiled, X, Y)
    evaluate(compiled, FULL, X, Y)
    gradient = compiled.objective.guide.location_parameters()[0].grad
    assert (gradient[:3] == 0).all()
    assert (gradient[3:] != 0).any()


def test_a_graph_goes_through_torch_compile(make_compiled, check_same_as_eager):
    before = pyro.settings.get()
    check_same_as_eager(make_compiled(dense((64, 20, 10)), backend="aot_eager"), X, Y)
    assert pyro.settings.get() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_decompositions_are_exact_to_rounding(dtype, beta):
    """Against the functions that they replace, computed in float64."""
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.tensor([0.0, math.inf, -math.inf])])
    x = x.to(dtype)
    bound = 4 * torch.finfo(dtype).eps
    softplus = torch.nn.functional.softplus((beta * x).double(), threshold=700) / beta
    expected = x.double().sigmoid(), softplus
    for found, exact in zip((graphs._sigmoid(x), graphs._softplus(x, beta)), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=bound, atol=1e-37)
        assert graphs._sigmoid(x.new_tensor([math.nan])).isnan().all()
        assert graphs._softplus(x.new_tensor([math.nan])).isnan().all()


def test_control_flow_that_depends_on_values_is_named(make_compiled, branching):
    with pytest.raises(UntraceableError, match=r"cannot be compiled(.|\n)*output\.sum\(\) > 0"):
        make_compiled(branching).prepare(X, Y)


class Foreign(nn.Module):
    """Noise that torch knows nothing of."""

    def __init__(self, draw):
        super().__init__()
        self.out, self.draw = nn.Linear(64, 10), draw

    def forward(self, x):
        return self.out(x) * self.draw()


@pytest.mark.parametrize(
    ("draw", "name"),
    [(lambda: random.random(), "random"), (lambda: np.random.rand(), "numpy.random")],  # noqa: NPY002
)
def test_random_numbers_that_a_graph_would_freeze_are_refused(draw, name, make_compiled):
    with pytest.raises(UntraceableError, match=f"draws random numbers from {name}, which"):
        make_compiled(Foreign(draw)).prepare(X, Y)


class Counting:
    """Doubles what it gives with every call."""

    def __init__(self):
        self.value = 1.0

    def __call__(self):
        self.value *= 2.0
        return self.value


@pytest.mark.parametrize(
    "draw", [np.random.default_rng(0).normal, random.Random(0).random, Counting()]
)
def test_what_differs_from_call_to_call_is_refused(draw, make_compiled):
    with pytest.raises(UntraceableError, match=r"draws others, or changes(.|\n)*compile=False"):
        make_compiled(Foreign(draw)).prepare(X, Y)


@pytest.mark.usefixtures("traced_only")
def test_a_weight_that_turns_out_to_be_used_twice_is_no_change(make_compiled):
    make_compiled(Twice()).prepare(X, Y)


def test_a_sequential_plate_is_named():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"y{i}", dist.Normal(x[i] @ w, 1.0), obs=y[i])

    guide = AdditiveNoiseGuide(model)
    with pytest.raises(UntraceableError, match=r'"for i in pyro\.plate" does so'):
        compile_objective(TraceAnalyticKL_ELBO(), model, guide, X[:3], Y[:3].float())


def test_what_the_compiler_cannot_do_is_told_from_what_cannot_be_traced(monkeypatch, make_compiled):
    def broken(*_):
        raise ImportError("main.so: file too short")

    monkeypatch.setattr(graphs, "_compiled", broken)
    message = r"machine code: ImportError: main.so: file too(.|\n)*TORCHINDUCTOR_CACHE_DIR"
    with pytest.raises(UntraceableError, match=message):
        make_compiled(dense((64, 20, 10))).prepare(X, Y)


def test_parameters_that_a_graph_would_freeze_are_refused():
    outside = nn.Linear(64, 1)

    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
        shift = pyro.module("outside", outside)(x)[:, 0]
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + shift, 1.0), obs=y)

    guide = AdditiveNoiseGuide(model)
    guide(X, Y.float())
    with pytest.raises(UntraceableError, match=r'"outside\$\$\$weight" of Pyro.s global store'):
        compile_objective(TraceAnalyticKL_ELBO(), model, guide, X, Y.float())


class Held(PyroModule):
    """Has parameters that are not trained."""

    def __init__(self):
        super().__init__("held")
        self.scale = PyroParam(torch.tensor(0.5), constraint=dist.constraints.positive)
        self.scale_unconstrained.requires_grad_(False)
        self.shift = PyroModule[nn.Linear](64, 1).requires_grad_(False)

    def forward(self, x, y):
        w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w + self.shift(x)[:, 0], self.scale), obs=y)


@pytest.mark.usefixtures("traced_only")
def test_parameters_that_the_model_holds_need_not_be_trained(check_same_as_eager):
    model = Held()
    guide = AdditiveNoiseGuide(model)
    with local_parameters():
        guide(X, Y.float())
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, guide, X, Y.float())
    check_same_as_eager(compiled, X, Y.float())


class Products(TorchDispatchMode):
    """The dtypes of matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.dtypes.append(result.dtype)
        return result


@pytest.mark.parametrize("backend", [lambda graph, _: graph, "inductor"], ids=["as is", "inductor"])
def test_autocast_reaches_the_means_once_and_the_variances_never(backend, make_compiled):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        return
    compiled = make_compiled(dense((64, 20, 10)), backend=backend)
    counts = []
    for objective in (compiled.objective, compiled):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective(FULL, X, Y)  # compiled here
        with Products() as products:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = objective(FULL, X, Y).loss
            loss.backward()
        counts.append([products.dtypes.count(d) for d in (torch.bfloat16, torch.float32)])
    assert counts == [[5, 5], [5, 5]]  # two products forward, three backward, of each kind


@pytest.mark.cuda
@pytest.mark.slow
def test_on_cuda_steps_are_those_without_compilation():
    """Random numbers are others there, so without noise; graphs write to the same memory."""
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = BayesianNetwork(dense((64, 20, 10)), Categorical(), num_data=30).cuda()
        guide = AdditiveNoiseGuide(model, init_log_sigma2=-60.0).cuda()
        objective = Objective(model, guide, TraceAnalyticKL_ELBO(), scale=1 / 30)
        objective = CompiledObjective(objective) if compile else objective
        optimizer = torch.optim.Adam(objective.parameters(), lr=0.01, fused=True)
        losses = []
        for _ in range(10):
            optimizer.zero_grad()
            with local_parameters():
                value = objective(FULL.cuda(), X.cuda(), Y.cuda())
            value.loss.backward()
            optimizer.step()
            losses.append(value.terms)
        ends.append((torch.stack(losses).cpu(), guide.median()["fc1.weight"].cpu()))
    (terms, weight), (other_terms, other) = ends
    torch.testing.assert_close(terms, other_terms, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-4)
