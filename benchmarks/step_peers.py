"""One training step of each library that `step.py` compares: forward, backward and Adam.

Every maker returns a function without arguments that does one step on the same batch. On a GPU only
those that train through `pyro.optim` wait for it in a step, as `SVI.step` returns a number. Weights
start at their library's own initial values; the sparse ones at log sigma² = -10, with a KL of full
weight. What a peer cannot express (a convolution without a layer for it) raises
`NotAvailableError`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayes_svdo.models import dense, lenet_5_caffe

Step = Callable[[], object]
NUM_DATA = 60_000
LEARNING_RATE = 1e-3


class NotAvailableError(Exception):
    """A peer that is not installed, or has no layers for a network."""


def parts(name: str) -> tuple[str, float, int]:
    """Of `"784-300-10@0.5*8"`: the network, the share of units left, the number of draws."""
    name, _, draws = name.partition("*")
    name, _, share = name.partition("@")
    return name, float(share or 1.0), int(draws or 1)


def network(name: str) -> nn.Module:
    """`"784-300-10"`, `"lenet-5-caffe"`, or `"64x16"` (16 layers, the hidden ones of 64 units)."""
    name = parts(name)[0]
    if name == "lenet-5-caffe":
        return lenet_5_caffe()
    if "x" in name:
        width, depth = map(int, name.split("x"))
        return dense((784, *[width] * (depth - 1), 10))
    return dense(tuple(map(int, name.split("-"))))


def batch(size: int, device: str) -> tuple[Tensor, Tensor]:
    """Inputs like those of MNIST, a fifth of them not zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(size, 784, generator=generator)
    x = x * (torch.rand(size, 784, generator=generator) < 0.2)
    y = torch.randint(10, (size,), generator=generator)
    return x.to(device), y.to(device)


def _stepper(net: nn.Module, loss: Callable[[], Tensor], fused: bool = True) -> Step:
    # False would keep torch from its own choice, which is foreach on a GPU.
    optimizer = torch.optim.Adam(net.parameters(), lr=LEARNING_RATE, fused=fused or None)

    def step() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return value

    return step


def _autocast(x: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """The forward pass of `fit(precision="bf16-mixed")`, for bfloat16; None: as it is."""
    return nullcontext() if dtype is None else torch.autocast(x.device.type, dtype)


def deterministic(
    name: str, x: Tensor, y: Tensor, fused: bool = True, dtype: torch.dtype | None = None
) -> Step:
    """The network itself: the floor."""
    net = network(name).to(x.device)

    def loss() -> Tensor:
        with _autocast(x, dtype):
            return F.cross_entropy(net(x), y)

    return _stepper(net, loss, fused)


class LinearSVDO(nn.Module):
    """The layer that Sparse VD is written by hand with, as in the project's source 001."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.mean = nn.Parameter(layer.weight.detach().clone())
        self.log_sigma = nn.Parameter(torch.full_like(layer.weight, -5.0))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Local reparameterization."""
        log_alpha = 2.0 * self.log_sigma - 2.0 * torch.log(1e-16 + self.mean.abs())
        self.log_alpha = log_alpha.clamp(-10, 10)
        mean = F.linear(x, self.mean) + self.bias
        std = torch.sqrt(F.linear(x * x, torch.exp(2.0 * self.log_sigma)) + 1e-8)
        return mean + std * torch.randn_like(std)

    def kl(self) -> Tensor:
        """Molchanov's approximation."""
        step = 0.63576 * torch.sigmoid(1.8732 + 1.48695 * self.log_alpha)
        return -(step - 0.5 * torch.log1p(torch.exp(-self.log_alpha))).sum()


def _replace(net: nn.Module, kinds: dict[type, Callable[[Any], nn.Module]]) -> nn.Module:
    """The network with each layer of a kind replaced by what the peer has for it."""
    for key, module in net.named_children():
        if list(module.parameters()):
            if type(module) not in kinds:
                raise NotAvailableError(f"no layer for {type(module).__name__}")
            setattr(net, key, kinds[type(module)](module))
    return net


def linear_svdo(name: str, x: Tensor, y: Tensor, fused: bool = True) -> Step:
    """Hand-written layers."""
    net = _replace(network(name), {nn.Linear: LinearSVDO}).to(x.device)
    layers = [module for module in net if isinstance(module, LinearSVDO)]

    def loss() -> Tensor:
        nll = F.cross_entropy(net(x), y) * NUM_DATA
        return nll + sum(layer.kl() for layer in layers)

    return _stepper(net, loss, fused)


def cplxmodule(name: str, x: Tensor, y: Tensor) -> Step:
    """`LinearVD` of cplxmodule."""
    try:
        from cplxmodule.nn.relevance import Conv2dVD, LinearVD, penalties
    except ImportError as error:
        raise NotAvailableError(str(error)) from None
    kinds = {
        nn.Linear: lambda old: LinearVD(old.in_features, old.out_features),
        nn.Conv2d: lambda old: Conv2dVD(old.in_channels, old.out_channels, old.kernel_size),
    }
    net = _replace(network(name), kinds).to(x.device)
    return _stepper(net, lambda: F.cross_entropy(net(x), y) + sum(penalties(net)) / NUM_DATA)


def pytorch_ard(name: str, x: Tensor, y: Tensor) -> Step:
    """`LinearARD` of pytorch-ard."""
    try:
        import torch_ard
    except ImportError as error:
        raise NotAvailableError(str(error)) from None
    kinds = {
        nn.Linear: lambda old: torch_ard.LinearARD(old.in_features, old.out_features),
        nn.Conv2d: lambda old: torch_ard.Conv2dARD(
            old.in_channels, old.out_channels, old.kernel_size
        ),
    }
    net = _replace(network(name), kinds).to(x.device)
    elbo = torch_ard.ELBOLoss(net, F.cross_entropy)
    return _stepper(net, lambda: elbo(net(x), y, 1.0, 1 / NUM_DATA))


def _pyro_adam(x: Tensor) -> Any:
    """Pyro's, one for each parameter: as it comes on a CPU, fused on a GPU as for all others."""
    import pyro

    return pyro.optim.Adam({"lr": LEARNING_RATE, "fused": x.is_cuda or None})


def tyxe(name: str, x: Tensor, y: Tensor) -> Step:
    """TyXe's local reparameterization, with a normal prior and Pyro's checks off."""
    import pyro
    from pyro import distributions as dist

    # TyXe 0.0.2 was written for a Pyro that looked names up like this.
    pyro.util.deep_getattr = lambda o, path: functools.reduce(getattr, path.split("."), o)
    try:
        import tyxe as library
    except ImportError as error:
        raise NotAvailableError(str(error)) from None
    pyro.enable_validation(False)
    pyro.clear_param_store()
    net = network(name).to(x.device)
    prior = library.priors.IIDPrior(dist.Normal(x.new_zeros(()), x.new_ones(())), expose_all=True)
    guide = functools.partial(library.guides.AutoNormal, init_scale=0.0067)
    likelihood = library.likelihoods.Categorical(NUM_DATA)
    bnn = library.VariationalBNN(net, prior, likelihood, guide)
    svi = pyro.infer.SVI(bnn.model, bnn.guide, _pyro_adam(x), pyro.infer.TraceMeanField_ELBO())

    def step() -> float:
        with library.poutine.local_reparameterization():
            return svi.step(x, y)

    return step


def stock_pyro(name: str, x: Tensor, y: Tensor) -> Step:
    """Pyro's own AutoNormal and TraceMeanField_ELBO over our network, normal prior, checks off."""
    import pyro
    from pyro import distributions as dist

    from bayes_svdo import BayesianNetwork
    from bayes_svdo.models import Categorical

    pyro.enable_validation(False)
    pyro.clear_param_store()
    prior = dist.Normal(x.new_zeros(()), x.new_ones(()))
    model = BayesianNetwork(network(name), Categorical(), NUM_DATA, prior=prior).to(x.device)
    guide = pyro.infer.autoguide.AutoNormal(model, init_scale=0.0067)
    svi = pyro.infer.SVI(model, guide, _pyro_adam(x), pyro.infer.TraceMeanField_ELBO())
    return lambda: svi.step(x, y)


def numpyro_jit(name: str, x: Tensor, y: Tensor) -> Step:
    """NumPyro's AutoNormal and TraceMeanField_ELBO, one jitted update."""
    try:
        import jax
        import numpyro
        from numpyro import distributions as dist
        from numpyro.infer import SVI, TraceMeanField_ELBO
        from numpyro.infer.autoguide import AutoNormal
    except ImportError as error:
        raise NotAvailableError(str(error)) from None
    layers = [module for module in network(name) if list(module.parameters())]
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        raise NotAvailableError("dense networks only")
    if x.is_cuda:
        raise NotAvailableError("compared on CPU only")
    sizes = [(layer.in_features, layer.out_features) for layer in layers]
    jx, jy = jax.numpy.asarray(x.numpy()), jax.numpy.asarray(y.numpy())

    def model(x: Any, y: Any) -> None:
        h = x
        for i, shape in enumerate(sizes):
            w = numpyro.sample(f"w{i}", dist.Normal(0, 1).expand(shape).to_event(2))
            b = numpyro.param(f"b{i}", jax.numpy.zeros(shape[1]))
            h = h @ w + b
            h = jax.nn.relu(h) if i < len(sizes) - 1 else h
        with numpyro.plate("data", NUM_DATA, subsample_size=len(x)):
            numpyro.sample("y", dist.Categorical(logits=h), obs=y)

    svi = SVI(
        model, AutoNormal(model, init_scale=0.0067), numpyro.optim.Adam(LEARNING_RATE),
        TraceMeanField_ELBO(),
    )  # fmt: skip
    state = svi.init(jax.random.PRNGKey(0), jx, jy)
    update = jax.jit(svi.update)

    def step() -> Any:
        nonlocal state
        state, loss = update(state, jx, jy)
        return loss.block_until_ready()

    return step


def _prune(guide: Any, share: float) -> None:
    """Leave a share of every layer's inputs and units."""
    for site in guide.sites:
        loc, log_sigma2 = (
            module.get_parameter(f"{site}_unconstrained")
            for module in (guide.loc, guide.log_sigma2)
        )
        last = site == guide.sites[-1]
        rows, columns = (max(1, round(share * size)) for size in loc.shape)
        with torch.no_grad():
            log_sigma2[len(loc) if last else rows :] = 20.0
            log_sigma2[:, columns:] = 20.0
    guide.prune_(3.0)


def _ours(
    name: str,
    x: Tensor,
    y: Tensor,
    *,
    compiled: bool,
    vectorized: bool = True,
    dtype: torch.dtype | None = None,
) -> Step:
    import pyro

    from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, TraceAnalyticKL_ELBO
    from bayes_svdo.inference.adam import Adam
    from bayes_svdo.inference.compiled import CompiledObjective
    from bayes_svdo.inference.objective import Objective
    from bayes_svdo.inference.posterior import local_parameters
    from bayes_svdo.models import Categorical

    pyro.enable_validation(False)
    model = BayesianNetwork(network(name), Categorical(), NUM_DATA).to(x.device)
    guide = AdditiveNoiseGuide(model).to(x.device)
    _, share, particles = parts(name)
    if share < 1.0:
        _prune(guide, share)
    elbo = TraceAnalyticKL_ELBO(num_particles=particles, vectorize_particles=vectorized)
    objective = Objective(model, guide, elbo, scale=1 / NUM_DATA)
    weight = torch.ones((), dtype=torch.float64, device=x.device)
    if compiled:
        graph = CompiledObjective(objective)
        optimizer = Adam(graph.parameters(), lr=LEARNING_RATE)

        def compiled_step() -> Tensor:
            with _autocast(x, dtype):
                loss: Tensor = graph.set_gradients(weight, x, y).loss
            optimizer.step()
            return loss

        return compiled_step

    def loss() -> Tensor:
        with _autocast(x, dtype):
            value: Tensor = objective(weight, x, y).loss
        return value

    optimizer = Adam(objective.parameters(), lr=LEARNING_RATE)

    def eager_step() -> Tensor:
        optimizer.zero_grad()
        with local_parameters():
            value = loss()
        value.backward()
        optimizer.step()
        return value

    return eager_step


def _predict(name: str, x: Tensor, y: Tensor, *, looped: bool) -> Step:
    """Class probabilities at draws of all weights, together or one after the other."""
    from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork
    from bayes_svdo.inference.posterior import Posterior
    from bayes_svdo.models import Categorical

    model = BayesianNetwork(network(name), Categorical(), NUM_DATA).to(x.device)
    guide = AdditiveNoiseGuide(model).to(x.device)
    guide(x, y)
    posterior = Posterior(model, guide)
    draws = parts(name)[2]
    if not looped:
        return lambda: posterior.predict(x, draws)
    return lambda: torch.cat([posterior.predict(x, 1) for _ in range(draws)])


PEERS: dict[str, Callable[[str, Tensor, Tensor], Step]] = {
    "deterministic": deterministic,
    "LinearSVDO": linear_svdo,
    "cplxmodule": cplxmodule,
    "pytorch-ard": pytorch_ard,
    "TyXe": tyxe,
    "Pyro": stock_pyro,
    "NumPyro": numpyro_jit,
    "ours, eager": functools.partial(_ours, compiled=False),
    "ours, compiled": functools.partial(_ours, compiled=True),
    # Of several particles, or draws.
    "ours, eager, looped": functools.partial(_ours, compiled=False, vectorized=False),
    "ours, compiled, looped": functools.partial(_ours, compiled=True, vectorized=False),
    "predict": functools.partial(_predict, looped=False),
    "predict, looped": functools.partial(_predict, looped=True),
    # torch.optim.Adam as it comes.
    "deterministic, plain Adam": functools.partial(deterministic, fused=False),
    "LinearSVDO, plain Adam": functools.partial(linear_svdo, fused=False),
}

# Of a step with one particle: who is compared on every network.
LIBRARIES = tuple(name for name in PEERS if "looped" not in name and name != "predict")
