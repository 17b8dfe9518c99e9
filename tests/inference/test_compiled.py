"""The compiled objective: one graph per signature of its inputs, and when there is none."""

from __future__ import annotations

import math
import re
import shutil

import pyro
import pytest
import torch
from pyro import distributions as dist

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, LogUniform, TraceAnalyticKL_ELBO, fit
from bayes_svdo.inference import compiled as module
from bayes_svdo.inference.compiled import UntraceableError, compile_objective, wants_compilation
from bayes_svdo.inference.graphs import make_graph
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical, dense

# torch warns of the first release of Python 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower")

X, Y = torch.rand(30, 64, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
FULL = torch.ones((), dtype=torch.float64)
CPU = torch.device("cpu")


@pytest.mark.usefixtures("traced_only")
def test_one_graph_for_every_signature(monkeypatch, make_compiled):
    compiled, traced = make_compiled(dense((64, 20, 10))), []
    monkeypatch.setattr(
        module, "make_graph", lambda *args: traced.append(args) or make_graph(*args)
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
def test_zeroing_more_weights_costs_no_graph_until_half_of_them_are_gone(
    monkeypatch, make_compiled, check_same_as_eager
):
    compiled, traced = make_compiled(dense((64, 20, 10))), []
    monkeypatch.setattr(
        module, "make_graph", lambda *args: traced.append(args) or make_graph(*args)
    )
    guide = compiled.objective.guide
    numbers = []
    for dead in range(0, 20, 2):
        with torch.no_grad():
            guide.log_sigma2.fc1.weight[:dead] = 20.0
            guide.log_sigma2.fc2.weight[:, :dead] = 20.0
        guide.prune_(3.0)
        check_same_as_eager(compiled, X, Y)
        numbers.append(len(traced))
    assert numbers[:6] == [1] * 6
    assert numbers[-1] == 3  # where 8 and 2 of 20 units are left
    assert len(compiled._graphs) == 1  # the old ones will not be wanted again


@pytest.mark.usefixtures("traced_only")
def test_beyond_eight_signatures_nothing_more_is_compiled(monkeypatch, make_compiled):
    monkeypatch.setattr(module, "_MOST_SIGNATURES", 1)
    compiled = make_compiled(dense((64, 20, 10)))
    with local_parameters():
        compiled(FULL, X, Y)
        with pytest.warns(UserWarning, match=r"1 different shapes(.|\n)*Try batches of equal"):
            value = compiled(FULL, X[:5], Y[:5])
        value.loss.backward()
        compiled(FULL, X[:6], Y[:6])  # says it once
    assert len(compiled._graphs) == 1


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


def test_the_gradient_of_a_graph_can_be_had_once(make_compiled):
    compiled = make_compiled(dense((64, 20, 10)), backend="aot_eager")
    with local_parameters():
        loss = compiled(FULL, X, Y).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"can be had once(.|\n)*evaluating the objective again"):
        loss.backward()


@pytest.mark.usefixtures("traced_only")
def test_the_weight_of_the_kl_may_change_with_every_step(make_compiled, check_same_as_eager):
    compiled = make_compiled(dense((64, 20, 10)))
    for weight in (0.0, 0.3, torch.tensor(0.7), 2.0):
        compiled.objective.elbo.kl_weight = weight
        check_same_as_eager(compiled, X, Y)
    assert len(compiled._graphs) == 1


@pytest.mark.usefixtures("traced_only")
def test_what_cannot_be_compiled_runs_as_it_is_if_that_is_allowed(monkeypatch, branching):
    data, model = (X, Y), BayesianNetwork(branching, Categorical(), num_data=30)
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
def test_gradients_are_set_as_by_backward(monkeypatch, make_compiled, evaluate):
    compiled = make_compiled(dense((64, 20, 10)))
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
def test_what_is_changed_afterwards_is_seen(
    kl_weight, make_compiled, evaluate, check_same_as_eager
):
    compiled = make_compiled(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    compiled.objective.elbo.kl_weight = kl_weight
    compiled.objective.scale = 0.5
    check_same_as_eager(compiled, X, Y)
    second, _ = evaluate(compiled, FULL, X, Y)
    assert second.loss != first.loss
    if isinstance(kl_weight, torch.Tensor):
        kl_weight.fill_(3.0)
        check_same_as_eager(compiled, X, Y)


@pytest.mark.parametrize(
    "weight", [0.5, 1, torch.tensor(0.5), torch.tensor(1), torch.tensor(0.5, dtype=torch.float16)]
)
def test_the_weight_may_be_any_number(weight, make_compiled, evaluate):
    """A graph reads eight bytes, whatever it is given."""
    compiled = make_compiled(dense((64, 20, 10)), backend="aot_eager")
    exact = torch.tensor(float(weight), dtype=torch.float64)
    expected, gradients = evaluate(compiled.objective, exact, X, Y)
    found, others = evaluate(compiled, weight, X, Y)
    torch.testing.assert_close(found.loss, expected.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[f"objective.{name}"], gradient)


@pytest.mark.parametrize(
    ("weight", "error"),
    [(torch.ones(1), TypeError), ("1", TypeError), (-1.0, ValueError), (math.nan, ValueError)],
)
@pytest.mark.usefixtures("traced_only")
def test_no_other_weight_is_taken(weight, error, make_compiled):
    compiled = make_compiled(dense((64, 20, 10)))
    for call in (compiled, compiled.set_gradients):
        with local_parameters(), pytest.raises(error, match="kl_weight must be"):
            call(weight, X, Y)


@pytest.mark.usefixtures("traced_only")
def test_a_parameter_may_be_frozen_and_freed_again(make_compiled, check_same_as_eager):
    compiled = make_compiled(dense((64, 20, 10)))
    bias = compiled.objective.model.net.fc1.bias
    for trained in (True, False, True):
        bias.requires_grad_(trained)
        with local_parameters():
            compiled.set_gradients(FULL, X, Y)
        assert (bias.grad is not None) == trained
        check_same_as_eager(compiled, X, Y)
    assert len(compiled._graphs) == 1


def hand_written(x, y):
    w = pyro.sample("w", LogUniform().expand([64]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


@pytest.mark.usefixtures("traced_only")
def test_a_guide_that_has_not_been_called_is_set_up(check_same_as_eager):
    guide = AdditiveNoiseGuide(hand_written)
    with pytest.raises(ValueError, match=r"guide has no parameters(.|\n)*with a batch of the data"):
        compile_objective(TraceAnalyticKL_ELBO(), hand_written, guide)
    compiled = compile_objective(TraceAnalyticKL_ELBO(), hand_written, guide, X, Y.float())
    assert len(list(compiled.parameters())) == 2
    check_same_as_eager(compiled, X, Y.float())


def test_elbo_model_and_guide_are_checked():
    guide = AdditiveNoiseGuide(hand_written)
    stock = pyro.infer.TraceMeanField_ELBO()
    automatic = pyro.infer.autoguide.AutoNormal(hand_written)
    for arguments, name in (
        ((stock, hand_written, guide), "elbo must be of the type TraceAnalyticKL_ELBO"),
        ((TraceAnalyticKL_ELBO(), hand_written, automatic), "guide must be of the type Additive"),
        ((TraceAnalyticKL_ELBO(), "net", guide), "model must be a Pyro model"),
    ):
        with pytest.raises(TypeError, match=name):
            compile_objective(*arguments, X, Y.float())


@pytest.mark.usefixtures("traced_only")
@pytest.mark.parametrize("vectorize", [False, True])
def test_several_particles_take_the_same_random_numbers_compiled(vectorize):
    ends = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = BayesianNetwork(dense((64, 8, 10)), Categorical(), num_data=30)
        elbo = TraceAnalyticKL_ELBO(num_particles=3, vectorize_particles=vectorize)
        posterior = fit(
            model, (X, Y), elbo=elbo, epochs=3, lr=0.02, compile=compile, seed=3, progress=False
        )
        ends.append(posterior.history.column("objective"))
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


@pytest.mark.usefixtures("traced_only")
def test_num_data_and_scale_may_change_with_every_step(
    make_compiled, evaluate, check_same_as_eager
):
    compiled = make_compiled(dense((64, 20, 10)))
    first, _ = evaluate(compiled, FULL, X, Y)
    for num_data, scale in ((2000, 1.0), (30, 0.1), (1234, 1e-3)):
        compiled.objective.model.num_data = num_data
        compiled.objective.scale = scale
        check_same_as_eager(compiled, X, Y)
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
def test_where_a_likelihood_reads_num_data_another_is_another_graph(check_same_as_eager):
    torch.manual_seed(0)
    model = BayesianNetwork(dense((64, 20, 10)), Halved(), num_data=1000)
    compiled = compile_objective(TraceAnalyticKL_ELBO(), model, AdditiveNoiseGuide(model))
    for num_data in (1000, 2000):
        model.num_data = num_data
        check_same_as_eager(compiled, X, Y)
    assert len(compiled._graphs) == 2


def test_the_loss_is_scaled_and_the_terms_are_not(make_compiled, evaluate):
    compiled = make_compiled(dense((64, 20, 10)))
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
def test_inductor_gives_the_same_where_there_is_a_compiler(make_compiled, check_same_as_eager):
    if not any(map(shutil.which, ("g++", "clang++"))):
        with pytest.raises(ValueError, match=re.escape("no C++ compiler")):
            wants_compilation(True, **options())
        return
    compiled = make_compiled(dense((64, 20, 10)), backend="inductor")
    check_same_as_eager(compiled, X, Y)
    guide = compiled.objective.guide
    for dead in (12, 15):  # leave the graph, and do not
        with torch.no_grad():
            guide.log_sigma2.fc1.weight[:dead] = 20.0
        guide.prune_(3.0)
        check_same_as_eager(compiled, X, Y)


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
