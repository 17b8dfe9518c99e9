"""The automatic guide: additive Gaussian noise around every weight.

``q(w) = N(loc, sigma²)`` with ``loc`` and ``log sigma²`` learned, the additive parametrisation of
Molchanov, Ashukha & Vetrov (2017), sec. 4.2, https://arxiv.org/abs/1701.05369: the gradient with
respect to ``loc`` carries no noise of its own, however large ``alpha = sigma² / loc²`` grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import deepcopy
from operator import attrgetter
from typing import Any, Literal, Self, cast, get_args

import pyro
import torch
from pyro import poutine
from pyro.distributions import ExpandedDistribution, MaskedDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn import PyroModule, PyroParam
from pyro.ops.tensor_utils import periodic_repeat
from torch import Tensor
from torch.distributions import Independent, constraints

from bayes_svdo._names import closest, unknown_name
from bayes_svdo.distributions import AdditiveNoiseNormal, log_alpha
from bayes_svdo.distributions.pruned import (
    PRUNED_LOG_SIGMA2,
    Block,
    PrunedAdditiveNoiseNormal,
)
from bayes_svdo.distributions.scale_free import ScaleFreePrior
from bayes_svdo.inference.arguments import is_number
from bayes_svdo.models import BayesianNetwork

Sigma = Literal["weight", "unit", "layer"]
Init = Callable[[Mapping[str, Any]], Tensor] | Mapping[str, Tensor]

# Paper's initialisation for weights that no network gives a value: N(0, 0.01²).
_INIT_STD = 0.01
# What is left of all blocks when smaller ones are made: each change costs a compiled objective.
_WORTH_SHRINKING = 0.5


class AdditiveNoiseGuide(AutoGuide):
    """Mean-field guide ``q(w) = N(loc, exp(log_sigma2))``, an ``AutoGuide``.

    Unlike ``AutoNormal`` it samples each site itself, so its divergence from a ``LogUniform``
    prior is analytic.

    Args:
        model: A :class:`~bayes_svdo.models.BayesianNetwork`, or any Pyro model whose latent sites
            have real support.
        init_log_sigma2: Initial log variance of every weight. -10 starts a fresh net; -8 to -15
            has been used for pretrained ones.
        sigma: Which weights share a variance: ``"weight"``, one each; ``"unit"``, one per output
            unit (first dimension of the weight); ``"layer"``, one per site.
        init: Where ``loc`` starts: a mapping from site name to tensor, or a function of the Pyro
            site that returns one. Default: a network's own weights (so a pretrained net is a warm
            start) or, for the model of a posterior, its means; and draws from N(0, 0.01²) for
            sites of a hand-written model.

    Raises:
        TypeError: ``model`` cannot be called, ``init_log_sigma2`` is no number, or ``init`` is
            neither a mapping nor a function, or gives a value that is not a floating-point tensor,
            or of another dtype than the network's weight.
        ValueError: ``sigma`` is unknown, ``init_log_sigma2`` is not finite, or ``init`` names a
            site that is not there, or gives a value of the wrong shape or one that is not finite;
            or a site is discrete.
        NotImplementedError: A site's support is not the real line.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_log_sigma2: float = -10.0,
        sigma: Sigma = "weight",
        init: Init | None = None,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        if sigma not in get_args(Sigma):
            raise unknown_name("sigma", sigma, get_args(Sigma))
        if not callable(model):
            raise TypeError(f"model must be a BayesianNetwork or a Pyro model, but is {model!r}.")
        if not is_number(init_log_sigma2):
            raise TypeError(f"init_log_sigma2 must be a number, but is {init_log_sigma2!r}.")
        if not math.isfinite(init_log_sigma2):
            raise ValueError(f"init_log_sigma2 must be finite, but is {init_log_sigma2}.")
        if init is not None and not callable(init) and not isinstance(init, Mapping):
            raise TypeError(
                "init must be a mapping from site name to tensor or a function of the Pyro site, "
                f"but is {init!r}.\n  Try init={{name: tensor}}."
            )
        self.init_log_sigma2 = float(init_log_sigma2)
        self.sigma = sigma
        self._init = init
        self._has_pruned = False
        self._blocks: dict[str, Block] = {}
        self.layout = 0
        self.prototype_trace: Any
        self._initial = _Initial(model, init)
        super().__init__(InitMessenger(self._initial)(model), create_plates=create_plates)
        if isinstance(model, BayesianNetwork):
            self._setup_network(model)

    def copy_for(self, model: Callable[..., Any]) -> AdditiveNoiseGuide:
        """A copy of this guide for ``model``, a copy of its own model."""
        copy = deepcopy(self)
        copy._init, copy._initial = self._init, _Initial(model, self._init)
        copy._model = (InitMessenger(copy._initial)(model),)
        if self.prototype_trace is not None:
            copy._initial.prototype = self.prototype_trace
        return copy

    def check_shape(self, site: Mapping[str, Any]) -> None:
        """Refuse a site of the model that has another shape than that of this guide.

        Raises:
            ValueError: Names the site.
        """
        _check_shape(site, self.prototype_trace.nodes[site["name"]]["fn"])

    @property
    def model(self) -> Callable[..., Any]:
        """The model, each site of this guide with a value to start from.

        Pyro's ``Predictive`` runs a model once on its own, which one with improper priors cannot
        do: ``Predictive(guide.model, guide=guide, num_samples=...)`` can.

        Raises:
            RuntimeError: This guide is a ``deepcopy`` of another, without a model.
        """
        if self._model is None:
            raise RuntimeError(
                "this AdditiveNoiseGuide is a copy, and has no model.\n"
                "  Try AdditiveNoiseGuide(model), or guide.copy_for(model)."
            )
        model: Callable[..., Any] = self._model[0]
        return model

    def _setup_network(self, model: BayesianNetwork) -> None:
        """A network's sites are known without data: no prototype run is needed."""
        trace = poutine.Trace()
        for name, weight in model.initial_weights().items():
            fn = model.prior.expand(weight.shape).to_event(weight.dim())
            site = {"name": name, "type": "sample", "fn": fn, "is_observed": False}
            site |= {"value": self._initial(site), "cond_indep_stack": (), "infer": {}}
            trace.add_node(name, **site)
        self.prototype_trace = trace
        self._setup_parameters()

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        try:
            self._setup_parameters()
        except ValueError:
            self.prototype_trace = None
            raise

    def _setup_parameters(self) -> None:
        self.loc = PyroModule()
        self.log_sigma2 = PyroModule()
        self.keep = PyroModule()
        self._event_dims: dict[str, int] = {}
        sites = dict(self.prototype_trace.iter_stochastic_nodes())
        self._prunable = tuple(name for name, site in sites.items() if _is_scale_free(site["fn"]))
        if isinstance(self._init, Mapping):
            for name in self._init:
                if name not in sites:
                    raise ValueError(
                        f'init has a value for "{name}", which is no site of the model.'
                        f"{closest(name, sites)} Its sites: {', '.join(sites)}."
                    )
        for name, site in sites.items():
            event_dim = self._event_dims[name] = site["fn"].event_dim
            value = _for_all_of_its_plates(site["value"].detach(), site)
            loc = PyroParam(value.clone(), constraints.real, event_dim)
            log_sigma2 = torch.full(
                self._sigma_shape(value),
                self.init_log_sigma2,
                dtype=value.dtype,
                device=value.device,
            )
            deep_setattr(self.loc, name, loc)
            deep_setattr(self.log_sigma2, name, PyroParam(log_sigma2, constraints.real, event_dim))
            owner, _, key = name.rpartition(".")
            _submodule(self.keep, owner).register_buffer(
                key, torch.ones_like(value, dtype=torch.bool)
            )
        self._initial.prototype = self.prototype_trace

    def _sigma_shape(self, value: Tensor) -> torch.Size:
        if self.sigma == "weight":
            return value.shape
        rest = value.shape[1:] if self.sigma == "unit" else value.shape
        return torch.Size((*value.shape[: value.dim() - len(rest)], *(1 for _ in rest)))

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the latent sites, in the model's order; empty before a first call."""
        return tuple(getattr(self, "_event_dims", ()))

    @property
    def prunable_sites(self) -> tuple[str, ...]:
        """Names of the sites whose prior is a ``ScaleFreePrior``: the others are never pruned.

        A large log alpha says that a weight is irrelevant under such a prior. Under a proper one,
        such as N(0, 1), it says only that zero is within the posterior's width.
        """
        return tuple(getattr(self, "_prunable", ()))

    def parameters_of(self, name: str) -> tuple[Tensor, Tensor]:
        """``loc`` and ``log_sigma2`` of a site, both of the site's shape; zeros where pruned."""
        loc, log_sigma2 = attrgetter(name)(self.loc), attrgetter(name)(self.log_sigma2)
        log_sigma2 = log_sigma2.expand(loc.shape)
        if self._has_pruned:
            keep = pyro.subsample(attrgetter(name)(self.keep), event_dim=self._event_dims[name])
            loc = loc.where(keep, 0.0)
            log_sigma2 = log_sigma2.where(keep, PRUNED_LOG_SIGMA2)
        return loc, log_sigma2

    def location_parameters(self) -> list[Tensor]:
        """The trainable ``loc`` tensors."""
        return list(self.loc.parameters())

    def sigma_parameters(self) -> list[Tensor]:
        """The trainable ``log_sigma2`` tensors."""
        return list(self.log_sigma2.parameters())

    @torch.no_grad()
    def log_alpha(self) -> dict[str, Tensor]:
        """``log alpha = log sigma² - log loc²`` of every weight, by site; inf where pruned."""
        result = {}
        for name in self.sites:
            keep = attrgetter(name)(self.keep)
            result[name] = log_alpha(*self.parameters_of(name)).masked_fill(~keep, math.inf)
        return result

    @torch.no_grad()
    def is_pruned(self, threshold: float) -> dict[str, Tensor]:
        """Which weights are pruned at a threshold, a mask by site: those pruned for good, too.

        None of the sites outside of :attr:`prunable_sites`.
        """
        return {
            name: value >= threshold
            if name in self.prunable_sites
            else torch.zeros_like(value, dtype=torch.bool)
            for name, value in self.log_alpha().items()
        }

    @torch.no_grad()
    def prune_(self, threshold: float) -> None:
        """Set weights with ``log alpha >= threshold`` to zero, mean and variance, for good.

        One-way: the ``train_clip`` of the authors' code. A pruned weight gets no gradient and its
        KL is zero. Sites outside of :attr:`prunable_sites` stay as they are.

        Raises:
            ValueError: Some log alpha is NaN; nothing is pruned then.
        """
        for name, value in self.log_alpha().items():
            if value.isnan().any():
                raise ValueError(f'at site "{name}", {int(value.isnan().sum())} log alpha are NaN.')
        for name, pruned in self.is_pruned(threshold).items():
            keep = attrgetter(name)(self.keep)
            keep &= ~pruned
        if not self._has_pruned:
            self._mask()
        self._shrink_blocks()

    def _mask(self) -> None:
        """Go by the masks from now on, which leave out nothing yet or are new."""
        self._has_pruned = True
        self._blocks = {}
        self.layout += 1

    def _shrink_blocks(self) -> None:
        """Leave out the rows and columns of matrices that are dead, where they are enough."""
        blocks, before, after = {}, 0, 0
        for name in self.sites:
            keep = attrgetter(name)(self.keep)
            if keep.dim() == 2 and self._event_dims[name] == 2:
                blocks[name] = Block.of(keep)
                after += blocks[name].numel()
                before += self._blocks[name].numel() if name in self._blocks else keep.numel()
        if after < _WORTH_SHRINKING * before:
            self._blocks = blocks
            self.layout += 1

    def _posterior_of(self, name: str) -> AdditiveNoiseNormal:
        # Checking that a parameter is real reads all of it, and the device waits for that.
        if name not in self._blocks:
            return AdditiveNoiseNormal(*self.parameters_of(name), validate_args=False)
        loc, log_sigma2 = attrgetter(name)(self.loc), attrgetter(name)(self.log_sigma2)
        keep = attrgetter(name)(self.keep)
        return PrunedAdditiveNoiseNormal(
            loc, log_sigma2.expand(loc.shape), keep, self._blocks[name], validate_args=False
        )

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every site; arguments as the model's (used for the prototype only)."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result = {}
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            with ExitStack() as stack:
                for frame in site["cond_indep_stack"]:
                    if frame.vectorized:
                        stack.enter_context(plates[frame.name])
                q = self._posterior_of(name).to_event(self._event_dims[name])
                result[name] = pyro.sample(name, q)
        return result

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Posterior median (the mean) of each site, by name."""
        return {name: self.parameters_of(name)[0].clone() for name in self.sites}

    @torch.no_grad()
    def quantiles(
        self, quantiles: list[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Posterior quantiles of each site, shape ``(len(quantiles), *site)``, by name."""
        result = {}
        for name in self.sites:
            loc, log_sigma2 = self.parameters_of(name)
            q = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
            q = q.reshape(-1, *(1 for _ in loc.shape))
            result[name] = AdditiveNoiseNormal(loc, log_sigma2).icdf(q)
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._blocks:  # indices follow the parameters to another device
            self._blocks = {name: Block(*map(fn, block)) for name, block in self._blocks.items()}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own empties the guide that is being copied, too.
        return {**self.__dict__, "_model": None, "_init": None, "_initial": None, "master": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._mask()  # those that come may have zeros


class _Initial:
    """Initial value of a site: what the user gave, the network's own weight, or small noise."""

    def __init__(self, model: Callable[..., Any], init: Init | None) -> None:
        self.own = model.initial_weights() if isinstance(model, BayesianNetwork) else {}
        self.init = init
        self.prototype: Any = None  # until the guide has found its sites

    def __call__(self, site: Mapping[str, Any]) -> Tensor | None:
        name, fn = site["name"], site["fn"]
        if self.prototype is not None:
            if name not in self.prototype.nodes:
                return None
            _check_shape(site, self.prototype.nodes[name]["fn"])
        if fn.support.is_discrete:  # Pyro takes the error below for one of its own
            raise ValueError(
                f'at site "{name}", AdditiveNoiseGuide needs a prior with real support, but {fn} '
                "is discrete.\n  Try obs=y, if it is the data; else pyro.infer.config_enumerate "
                "and pyro.infer.TraceEnum_ELBO."
            )
        if not _is_real(fn.support):
            raise NotImplementedError(
                f'at site "{name}", AdditiveNoiseGuide needs a prior with real support, but {fn} '
                f"has support {fn.support}.\n"
                "  Try an AutoGuideList over InitMessenger(init_to_value(values=...))(model), with "
                f'AdditiveNoiseGuide for poutine.block(..., hide=["{name}"]) and another guide for '
                "this site."
            )
        shape = fn.batch_shape + fn.event_shape
        given = self._given(site)
        if given is not None:
            return self._checked(given, name, shape)
        own = self.own.get(name)
        return _INIT_STD * torch.randn(shape) if own is None else own

    def _given(self, site: Mapping[str, Any]) -> Any:
        if self.init is None or isinstance(self.init, Mapping):
            return (self.init or {}).get(site["name"])
        return self.init(site)

    def _checked(self, given: Any, name: str, shape: torch.Size) -> Tensor:
        value = torch.as_tensor(given)
        dtype = self.own[name].dtype if name in self.own else None
        if not value.is_floating_point() or value.dtype != (dtype or value.dtype):
            raise TypeError(
                f'at site "{name}", init gives dtype {value.dtype} but the site needs '
                f"{dtype or 'a floating-point one'}."
            )
        if value.shape != shape:
            raise ValueError(
                f'at site "{name}", init gives shape {tuple(value.shape)} but the site has '
                f"{tuple(shape)}."
            )
        if not value.isfinite().all():
            raise ValueError(f'at site "{name}", init gives values that are not finite.')
        return value


def _check_shape(site: Mapping[str, Any], own: Any) -> None:
    fn = site["fn"]
    # A plate may show a part of itself, or be of particles.
    same_batch = bool(site["cond_indep_stack"]) or fn.batch_shape == own.batch_shape
    if fn.event_shape != own.event_shape or not same_batch:
        raise ValueError(
            f'at site "{site["name"]}", guide has shape {tuple(own.shape())} but the model has '
            f"{tuple(fn.shape())}."
        )


def _for_all_of_its_plates(value: Tensor, site: Mapping[str, Any]) -> Tensor:
    """The value of a site that was seen in a subsample of its plates, repeated to their sizes."""
    for frame in site["cond_indep_stack"]:
        full_size = frame.full_size or frame.size
        if full_size != frame.size:
            dim = frame.dim - site["fn"].event_dim
            value = periodic_repeat(value, full_size, dim).contiguous()
    return value


def _is_scale_free(prior: Any) -> bool:
    while isinstance(prior, (Independent, MaskedDistribution, ExpandedDistribution)):
        prior = prior.base_dist
    return isinstance(prior, ScaleFreePrior)


def _is_real(support: Any) -> bool:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def _submodule(root: PyroModule, path: str) -> PyroModule:
    module: Any = root
    for part in filter(None, path.split(".")):
        if part not in module._modules:
            setattr(module, part, PyroModule())
        module = module._modules[part]
    return cast(PyroModule, module)
