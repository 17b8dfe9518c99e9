"""The compiled objective: the same numbers as without, from one graph per signature."""

from __future__ import annotations

import math
import random
import re
import shutil

import numpy as np
import pyro
import pytest
import torch
from pyro import distributions as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, LogUniform, TraceAnalyticKL_ELBO, fit
from bayes_svdo.inference import compiled as module
from bayes_svdo.inference.compiled import (
    CompiledObjective,
    UntraceableError,
    compile_objective,
    wants_compilation,
)
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical, dense

# torch warns of the first release of Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower")

X, Y = torch.rand(30, 64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
FULL = torch.ones((), dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.fixture
def traced_only(monkeypatch):
    """What is traced runs as it is: compilers take their time."""
    monkeypatch.setattr(module, "_compiled", lambda graph, *_: graph)


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


class Sum(nn.Module):
    """Two parameters that are added: autograd gives both the same gradient."""

    def __init__(self):
        super().__init__()
        self.p, self.q = nn.Parameter(torch.randn(1, 64)), nn.Parameter(torch.randn(1, 64))
        self.out = nn.Linear(64, 10)

    def forward(self, x):
        return self.out(x + (self.p + self.q))


NETWORKS = {
    "dense": lambda: dense((64, 20, 10)),
    "convolutional": convolutional,
    "recurrent": Recurrent,
    "reused": Twice,
}


def make(net, backend="inductor", sigma="weight", **elbo):
    torch.manual_seed(0)
    model = BayesianNetwork(net, Categorical(), num_data=1000)
    guide = AdditiveNoiseGuide(model, init_log_sigma2=-3.0, sigma=sigma)
    return compile_objective(TraceAnalyticKL_ELBO(**elbo), model, guide, backend=backend)


def evaluate(objective, kl_weight, *batch):
    """Value and gradients, from the same random numbers every time."""
    objective.zero_grad()
    torch.manual_seed(5)
    with local_parameters():
        value = objective(kl_weight, *batch)
        value.loss.backward()
    return value, {n: p.grad for n, p in objective.named_parameters() if p.grad is not None}


def check_equal(compiled, *batch, rtol=1e-5):
    """The same value and gradients as without compilation."""
    for kl_weight in (FULL, 0.1 * FULL):
        found, gradients = evaluate(compiled, kl_weight, *batch)
        expected, others = evaluate(compiled.objective, kl_weight, *batch)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=1e-5)
        assert {f"objective.{name}" for name in others} == set(gradients)
        for name, other in others.items():
            error = (gradients[f"objective.{name}"] - other).norm()
            assert error <= rtol * other.norm() + 1e-6, name


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("net", NETWORKS.values(), ids=NETWORKS)
def test_values_and_gradients_are_those_of_the_objective(net):
    check_equal(make(net()), X, Y)


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
def test_every_kind_of_elbo_can_be_compiled(elbo):
    check_equal(make(dense((64, 20, 10)), sigma="unit", **elbo), X, Y)


@pytest.mark.usefixtures("traced_only")
def test_a_model_written_by_hand_can_be_compiled():
    def model(x, y):
        w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    guide = AdditiveNoiseGuide(model)
    with local_parameters():
        guide(X, Y.float())
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, guide, X, Y.float())
    check_equal(compiled, X, Y.float())


@pytest.mark.usefixtures("traced_only")
def test_noise_is_drawn_anew_and_repeats_with_the_seed():
    compiled = make(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    with local_parameters():
        second = compiled(FULL, X, Y)
    assert first.loss != second.loss
    assert evaluate(compiled, FULL, X, Y)[0].loss == first.loss


@pytest.mark.usefixtures("traced_only")
def test_a_pass_leaves_random_numbers_and_buffers_as_one_pass_does():
    compiled = make(convolutional())
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
def test_one_graph_for_every_signature(monkeypatch):
    compiled, traced = make(dense((64, 20, 10))), []
    compile_one = compiled._compile
    monkeypatch.setattr(
        compiled, "_compile", lambda *args: traced.append(args) or compile_one(*args)
    )
    with local_parameters():
        for size in (30, 12, 30, 12, 30):
            compiled(FULL, X[:size], Y[:size])
        assert len(traced) == 2
        with torch.no_grad():
            compiled(FULL, X[:7], Y[:7])
        assert len(traced) == 2
        compiled.eval()
        compiled(FULL, X, Y)
        assert len(traced) == 3


@pytest.mark.usefixtures("traced_only")
def test_zeroing_more_weights_costs_no_graph_until_half_of_them_are_gone(monkeypatch):
    compiled, traced = make(dense((64, 20, 10))), []
    compile_one = compiled._compile
    monkeypatch.setattr(
        compiled, "_compile", lambda *args: traced.append(args) or compile_one(*args)
    )
    guide = compiled.objective.guide
    numbers = []
    for dead in range(0, 20, 2):
        with torch.no_grad():
            guide.log_sigma2.fc1.weight[:dead] = 20.0
            guide.log_sigma2.fc2.weight[:, :dead] = 20.0
        guide.prune_(3.0)
        check_equal(compiled, X, Y)
        numbers.append(len(traced))
    assert numbers[:6] == [1] * 6
    assert numbers[-1] == 3  # where 8 and 2 of 20 units are left
    assert len(compiled._graphs) == 1  # the old ones will not be wanted again


@pytest.mark.usefixtures("traced_only")
def test_beyond_eight_signatures_nothing_more_is_compiled(monkeypatch):
    monkeypatch.setattr(module, "_MOST_SIGNATURES", 1)
    compiled = make(dense((64, 20, 10)))
    with local_parameters():
        compiled(FULL, X, Y)
        with pytest.warns(UserWarning, match=r"1 different shapes(.|\n)*Try batches of equal"):
            value = compiled(FULL, X[:5], Y[:5])
        value.loss.backward()
        compiled(FULL, X[:6], Y[:6])  # says it once
    assert len(compiled._graphs) == 1


@pytest.mark.usefixtures("traced_only")
def test_zeroed_weights_stay_zero_and_get_no_gradient():
    compiled = make(dense((64, 20, 10)))
    with torch.no_grad():
        compiled.objective.guide.log_sigma2.fc1.weight[:3] = 20.0
    compiled.objective.guide.prune_(3.0)
    check_equal(compiled, X, Y)
    evaluate(compiled, FULL, X, Y)
    gradient = compiled.objective.guide.location_parameters()[0].grad
    assert (gradient[:3] == 0).all()
    assert (gradient[3:] != 0).any()


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_fit_finds_the_same_with_and_without(precision):
    posteriors = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = BayesianNetwork(dense((64, 8, 10)), Categorical(), num_data=30)
        posteriors.append(
            fit(
                model, (X.double() if precision == "64-true" else X, Y), epochs=6, batch_size=20,
                lr=0.02, precision=precision, compile=compile, seed=0, progress=False,
            )
        )  # fmt: skip
    eager, compiled = posteriors
    rtol = 0.05 if precision == "bf16-mixed" else 1e-4
    for name, value in eager.means(math.inf).items():
        error = (compiled.means(math.inf)[name] - value).norm()
        assert error < rtol * value.norm()
    assert compiled.history.column("objective") == pytest.approx(
        eager.history.column("objective"), rel=rtol
    )


class Branching(nn.Module):
    """Goes either way, depending on a value."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 10)

    def forward(self, x):
        output = self.inner(x)
        return output if output.sum() > 0 else -output


def test_a_graph_goes_through_torch_compile():
    before = pyro.settings.get()
    check_equal(make(dense((64, 20, 10)), backend="aot_eager"), X, Y)
    assert pyro.settings.get() == before


def test_the_gradient_of_a_graph_can_be_had_once():
    compiled = make(dense((64, 20, 10)), backend="aot_eager")
    with local_parameters():
        loss = compiled(FULL, X, Y).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can be had once(.|\n)*evaluating the objective again"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [1.0, 2.5])
def test_decompositions_are_exact_to_rounding(dtype, beta):
    """Against the functions that they replace, computed in float64."""
    x = torch.cat([torch.linspace(-90, 90, 4001), torch.tensor([0.0, math.inf, -math.inf])])
    x = x.to(dtype)
    bound = 4 * torch.finfo(dtype).eps
    softplus = torch.nn.functional.softplus((beta * x).double(), threshold=700) / beta
    expected = x.double().sigmoid(), softplus
    for found, exact in zip((module._sigmoid(x), module._softplus(x, beta)), expected, strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found, exact.to(dtype), rtol=bound, atol=1e-37)
        assert module._sigmoid(x.new_tensor([math.nan])).isnan().all()
        assert module._softplus(x.new_tensor([math.nan])).isnan().all()


def test_control_flow_that_depends_on_values_is_named():
    with pytest.raises(UntraceableError, match=r"cannot be compiled(.|\n)*output\.sum\(\) > 0"):
        make(Branching()).prepare(FULL, X, Y)


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
def test_random_numbers_that_a_graph_would_freeze_are_refused(draw, name):
    with pytest.raises(UntraceableError, match=f"draws random numbers from {name}, which"):
        make(Foreign(draw)).prepare(FULL, X, Y)


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


@pytest.mark.usefixtures("traced_only")
def test_the_weight_of_the_kl_may_change_with_every_step():
    compiled = make(dense((64, 20, 10)))
    for weight in (0.0, 0.3, torch.tensor(0.7), 2.0):
        compiled.objective.elbo.kl_weight = weight
        check_equal(compiled, X, Y)
    assert len(compiled._graphs) == 1


@pytest.mark.usefixtures("traced_only")
def test_what_cannot_be_compiled_runs_as_it_is_if_that_is_allowed(monkeypatch):
    data, model = (X, Y), BayesianNetwork(Branching(), Categorical(), num_data=30)
    settings = {"epochs": 2, "batch_size": 10, "seed": 0, "progress": False}
    expected = fit(model, data, compile=False, **settings)
    with pytest.raises(UntraceableError):
        fit(model, data, compile=True, **settings)
    monkeypatch.setattr(module, "_WORTH_COMPILING", 6)
    with pytest.warns(UserWarning, match=r"cannot be compiled(.|\n)*output\.sum\(\) > 0") as said:
        found = fit(model, data, **settings)
    assert len(said) == 1
    assert torch.equal(found.means()["inner.weight"], expected.means()["inner.weight"])


@pytest.mark.usefixtures("traced_only")
def test_gradients_are_set_as_by_backward(monkeypatch):
    compiled = make(dense((64, 20, 10)))
    expected, gradients = evaluate(compiled, FULL, X, Y)
    for most in (8, 0):  # in a graph, and without
        monkeypatch.setattr(module, "_MOST_SIGNATURES", most)
        compiled._graphs.clear()
        compiled._gave_up = most == 0
        torch.manual_seed(5)
        with local_parameters():
            found = compiled.set_gradients(FULL, X, Y)
        torch.testing.assert_close(tuple(found), tuple(expected))
        for name, parameter in compiled.named_parameters():
            if name in gradients:
                torch.testing.assert_close(parameter.grad, gradients[name])


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("kl_weight", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_what_is_changed_afterwards_is_seen(kl_weight):
    compiled = make(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    compiled.objective.elbo.kl_weight = kl_weight
    compiled.objective.scale = 0.5
    check_equal(compiled, X, Y)
    second, _ = evaluate(compiled, FULL, X, Y)
    assert second.loss != first.loss
    if isinstance(kl_weight, torch.Tensor):
        kl_weight.fill_(3.0)
        check_equal(compiled, X, Y)


@pytest.mark.usefixtures("traced_only")
def test_num_data_and_scale_may_change_with_every_step():
    compiled = make(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    for num_data, scale in ((2000, 1.0), (30, 0.1), (1234, 1e-3)):
        compiled.objective.model.num_data = num_data
        compiled.objective.scale = scale
        check_equal(compiled, X, Y)
    second, _ = evaluate(compiled, FULL, X, Y)
    torch.testing.assert_close(second.terms[0], 1.234 * first.terms[0])
    assert len(compiled._graphs) == 1
    compiled.objective.model.num_data = 29
    with pytest.raises(UntraceableError, match="the batch holds 30 data points, but num_data=29"):
        evaluate(compiled, FULL, X, Y)


class Halved(Categorical):
    """A likelihood that has a use of its own for num_data."""

    def forward(self, output, y, num_data, sample_dims=0):
        super().forward(output, y, max(num_data // 2, len(output)), sample_dims)


@pytest.mark.usefixtures("traced_only")
def test_where_a_likelihood_reads_num_data_another_is_another_graph():
    torch.manual_seed(0)
    model = BayesianNetwork(dense((64, 20, 10)), Halved(), num_data=1000)
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, AdditiveNoiseGuide(model))
    for num_data in (1000, 2000):
        model.num_data = num_data
        check_equal(compiled, X, Y)
    assert len(compiled._graphs) == 2


def test_the_loss_is_scaled_and_the_terms_are_not():
    compiled = make(dense((64, 20, 10)))
    plain, gradients = evaluate(compiled.objective, FULL, X, Y)
    compiled.objective.scale = 0.001
    scaled, others = evaluate(compiled.objective, FULL, X, Y)
    assert torch.equal(scaled.terms, plain.terms)
    torch.testing.assert_close(scaled.loss, 0.001 * plain.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], 0.001 * gradient)


def options(**changes):
    return {
        "device": CPU, "precision": "32-true", "steps": 10_000, **changes
    }  # fmt: skip


def test_auto_compiles_long_runs_where_there_is_a_compiler(monkeypatch):
    monkeypatch.setattr(module, "which", lambda name: "/bin/" + name)
    assert wants_compilation("auto", **options())
    assert wants_compilation(True, **options(steps=1))
    assert not wants_compilation(False, **options())
    assert not wants_compilation("auto", **options(steps=9_999))
    assert not wants_compilation("auto", **options(precision="16-mixed"))
    monkeypatch.setattr(module, "which", lambda name: None)
    assert not wants_compilation("auto", **options())


def test_what_cannot_be_compiled_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="compile must be True, False or \"auto\", but is 'yes'"):
        wants_compilation("yes", **options())
    with pytest.raises(ValueError, match="16-mixed"):
        wants_compilation(True, **options(precision="16-mixed"))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="no triton"):
        wants_compilation(True, **options(device=torch.device("cuda")))
    monkeypatch.setattr(module, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler(.|\n)*Try compile=False"):
        wants_compilation(True, **options())


@pytest.mark.slow
@pytest.mark.no_cover
def test_inductor_gives_the_same_where_there_is_a_compiler():
    if not any(map(shutil.which, ("g++", "clang++"))):
        with pytest.raises(ValueError, match=re.escape("no C++ compiler")):
            wants_compilation(True, **options())
        return
    compiled = make(dense((64, 20, 10)), backend="inductor")
    check_equal(compiled, X, Y)
    guide = compiled.objective.guide
    for dead in (12, 15):  # leave the graph, and do not
        with torch.no_grad():
            guide.log_sigma2.fc1.weight[:dead] = 20.0
        guide.prune_(3.0)
        check_equal(compiled, X, Y)


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
def test_autocast_reaches_the_means_once_and_the_variances_never(backend):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++"))):
        return
    compiled = make(dense((64, 20, 10)), backend=backend)
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


@pytest.mark.cuda
@pytest.mark.slow
def test_on_cuda_a_compiled_run_repeats_with_its_seed():
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        model = BayesianNetwork(dense((64, 20, 10)), Categorical(), num_data=30)
        runs.append(
            fit(
                model, (X, Y), epochs=20, batch_size=20, lr=0.02, device="cuda", compile=True,
                prune_while_training=True, kl_warmup=(0.0, 0.2), seed=0, progress=False,
            )
        )  # fmt: skip
    for name, mean in runs[0].means().items():
        torch.testing.assert_close(runs[1].means()[name], mean)
