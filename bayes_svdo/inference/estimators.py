"""scikit-learn estimators over VD-ARD, the relevance vector machine and L1 logistic regression.

They take NumPy arrays, data frames and tensors, work in pipelines and grid searches, and compute in
float64 on the device that is asked for. Fitted attributes are NumPy arrays by scikit-learn's names.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from bayes_svdo.distributions import LogUniform
from bayes_svdo.inference.arguments import check_count, check_flag, check_name
from bayes_svdo.inference.elbo import TraceAnalyticKL_ELBO
from bayes_svdo.inference.estimator_bases import (
    Array,
    KernelEstimator,
    LinearClassifier,
    TorchClassifier,
    TorchEstimator,
    as_array,
    check_number,
    seed_of,
    standardized,
)
from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.inference.exact_regression_data import ConstantTargetError
from bayes_svdo.inference.guide import AdditiveNoiseGuide
from bayes_svdo.inference.l1 import fit_l1_logistic
from bayes_svdo.inference.relevance_vector_machine import (
    RVMClassification,
    RVMRegression,
    fit_rvm_classification,
    fit_rvm_regression,
)
from bayes_svdo.inference.surroundings import random_numbers_kept
from bayes_svdo.inference.svi import fit
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, logistic_regression


class VDARDRegressor(RegressorMixin, TorchEstimator):  # type: ignore[misc]
    """Exact linear regression under the log-uniform prior (VD-ARD).

    See :func:`~bayes_svdo.inference.exact_regression.fit_vdard_regression`.

    Args:
        kl: The KL of a weight: ``"exact"``, ``"molchanov2017"``, ``"poster2016"`` or
            ``"empirical_bayes"``.
        kl_weight: Threshold on the squared z-score of a weight: 1.0 is the ELBO itself, ``"aic"``
            (2), ``"bic"`` (log N), or a percentage such as ``"5%"``.
        fit_intercept: Whether there is an intercept.
        noise_precision: Precision of the noise, 1 / variance; None: learned.
        min_noise: Least standard deviation of the noise as a fraction of that of ``y``. None: 1e-4
            where there are fewer features than degrees of freedom (observations less the
            intercept), else 0, no bound: there it could itself be the result.
        max_iter: Most iterations per start.
        tol: Gain in nats per observation below which it stops.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Attributes:
        coef_: Posterior means, shape ``(n_features,)``; exactly 0 where pruned.
        intercept_: Posterior mean of the intercept.
        sigma_: Posterior standard deviations of the weights, shape ``(n_features,)``: the posterior
            is factorised, so there is no covariance matrix as in ``ARDRegression``.
        log_alpha_: ``log sigma²/coef²``, shape ``(n_features,)``; inf where pruned.
        relevance_: Squared z-scores, shape ``(n_features,)``; a weight is kept above ``kl_weight``.
        alpha_: Precision of the noise, as in scikit-learn's ``ARDRegression``.
        scores_: The objective after every update, nats.
        n_iter_: Number of iterations.
    """

    def __init__(
        self,
        *,
        kl: str = "exact",
        kl_weight: float | str = 1.0,
        fit_intercept: bool = True,
        noise_precision: float | None = None,
        min_noise: float | None = None,
        max_iter: int = 1000,
        tol: float | None = None,
        device: str = "auto",
    ) -> None:
        self.kl, self.kl_weight, self.fit_intercept = kl, kl_weight, fit_intercept
        self.noise_precision, self.min_noise = noise_precision, min_noise
        self.max_iter, self.tol, self.device = max_iter, tol, device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to ``X``, shape ``(n_samples, n_features)``, and ``y``, shape ``(n_samples,)``.

        A ``y`` that is constant up to rounding is fitted by its mean alone.

        Raises:
            DegenerateObjectiveError: The objective has no maximum; the message has the remedy.

        Warns:
            NoiseCollapseWarning: Noise was taken for signal; the message has the remedy.
        """
        inputs, targets = self._training_data(X, y, y_numeric=True)
        targets = targets.astype(np.float64)
        bound = self.min_noise
        if bound is None:
            degrees = inputs.shape[0] - check_flag("fit_intercept", self.fit_intercept)
            bound = 1e-4 if inputs.shape[1] < degrees else 0.0
        try:
            found = fit_vdard_regression(
                self._tensor(inputs),
                self._tensor(targets),
                kl=self.kl,  # type: ignore[arg-type]
                kl_weight=self.kl_weight,
                fit_intercept=self.fit_intercept,
                noise_precision=self.noise_precision,
                min_noise=bound,
                max_iter=self.max_iter,
                tol=self.tol,
            )
        except ConstantTargetError:
            return self._fit_constant(inputs, targets)
        if not bool(found.converged):
            warnings.warn(
                f"max_iter={self.max_iter} iterations reached while the objective was still "
                "rising. Try a larger max_iter or tol.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.coef_, self.intercept_ = as_array(found.loc), float(found.intercept)
        self.sigma_, self.log_alpha_ = as_array(found.sigma), as_array(found.log_alpha)
        self.relevance_, self.alpha_ = as_array(found.relevance), float(found.beta)
        self.scores_, self.n_iter_ = as_array(found.elbo_trace), int(found.n_iter)
        self._x_mean, self._num_data = as_array(found.x_mean), found.num_data
        return self

    def _fit_constant(self, inputs: Array, targets: Array) -> Self:
        num_features = inputs.shape[1]
        # About the first, so that the mean of equal values is that value.
        mean = targets[0] + (targets - targets[0]).mean()
        self.coef_, self.intercept_ = np.zeros(num_features), float(mean)
        self.sigma_, self.relevance_ = np.zeros(num_features), np.zeros(num_features)
        self.log_alpha_ = np.full(num_features, np.inf)
        self.alpha_, self.scores_, self.n_iter_ = math.inf, np.zeros(0), 0
        self._x_mean, self._num_data = np.zeros(num_features), len(targets)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Mean of the predictive distribution, and its standard deviation if asked for.

        Returns:
            Shape ``(n_samples,)``, or two such arrays; the variance is that of the noise, the
            intercept and the weights.
        """
        check_is_fitted(self)
        inputs = self._inputs(X, reset=False)
        mean: Array = inputs @ self.coef_ + self.intercept_
        if not return_std:
            return mean
        noise = (1 + self.fit_intercept / self._num_data) / self.alpha_
        # Multiplied before they are squared: the unit of X drops out, and its square may overflow.
        weights = np.square((inputs - self._x_mean) * self.sigma_).sum(1)
        return mean, np.sqrt(weights + noise)


class VDARDClassifier(LinearClassifier):
    """Logistic regression under the log-uniform prior, fitted by SVI (the poster's DSVI).

    Args:
        kl: As in :class:`~bayes_svdo.distributions.LogUniform`.
        kl_weight: Factor on the KL; 1.0 is the ELBO itself, more gives fewer weights.
        threshold: A weight is zero where ``log alpha >= threshold``.
        init_log_sigma2: Initial log variance of the weights of the scaled features.
        standardize: Whether every feature is scaled to a standard deviation of 1 inside, so that
            units do not matter. Otherwise all are divided by one scale, which suits features of
            one unit, such as pixels: those that are almost constant then count for less.
        lr: Adam's learning rate.
        batch_size: Samples per step, at most.
        max_iter: Number of steps.
        kl_warmup: Fractions of training between which the KL's weight rises from 0 to 1.
        random_state: Seed of batches and noise.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Attributes:
        coef_: Posterior means, exactly 0 where pruned, shape ``(n_classes, n_features)``, or
            ``(1, n_features)`` for two classes.
        intercept_: Intercepts, shape ``(n_classes,)`` or ``(1,)``; point estimates.
        sigma_: Posterior standard deviations of the weights, shape of ``coef_``.
        log_alpha_: ``log sigma²/coef²`` of the weights, shape of ``coef_``.
        scores_: The negative objective of each epoch, nats per sample.
        n_iter_: Number of steps.
    """

    def __init__(
        self,
        *,
        kl: str = "molchanov2017",
        kl_weight: float = 1.0,
        threshold: float = 3.0,
        init_log_sigma2: float = -10.0,
        standardize: bool = True,
        lr: float = 0.02,
        batch_size: int = 200,
        max_iter: int = 1000,
        kl_warmup: tuple[float, float] = (0.3, 0.5),
        random_state: Any = None,
        device: str = "auto",
    ) -> None:
        self.kl, self.kl_weight, self.threshold = kl, kl_weight, threshold
        self.init_log_sigma2, self.standardize = init_log_sigma2, standardize
        self.lr, self.batch_size = lr, batch_size
        self.max_iter, self.kl_warmup, self.random_state = max_iter, kl_warmup, random_state
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to ``X``, shape ``(n_samples, n_features)``, and labels ``y``, ``(n_samples,)``."""
        check_number("init_log_sigma2", self.init_log_sigma2)
        check_number("kl_weight", self.kl_weight, least=0.0)
        check_count("batch_size", self.batch_size)
        check_count("max_iter", self.max_iter)
        each = check_flag("standardize", self.standardize)
        seed = seed_of(self.random_state)
        kl = LogUniform(check_name("kl", self.kl))  # type: ignore[arg-type]
        inputs, labels = self._labelled_data(X, y)
        inputs, mean, scale = standardized(inputs, each=each)
        posterior = self._fit_svi(inputs.float(), labels, kl, seed)
        (log_alpha,) = posterior.log_alpha().values()
        (weight,) = posterior.means().values()
        _, log_sigma2 = posterior.guide.parameters_of("linear.weight")
        coef = weight.double() / scale
        bias = posterior.model.net.linear.bias.detach().double()
        self.coef_, self.intercept_ = as_array(coef), as_array(bias - coef @ mean)
        self.sigma_ = as_array((0.5 * log_sigma2).exp().double() / scale)
        self.log_alpha_ = as_array(log_alpha.double())
        self.scores_ = -np.asarray(posterior.history.column("objective"))
        self.n_iter_ = int(posterior.history[-1]["step"])
        return self

    def _fit_svi(self, x: Tensor, labels: Tensor, prior: LogUniform, seed: int) -> Any:
        binary = len(self.classes_) == 2
        y = labels[:, None].float() if binary else labels
        batch_size = min(self.batch_size, len(x))
        with random_numbers_kept(x.device):  # a layer draws weights, though these become 0
            net = logistic_regression(x.shape[1], 1 if binary else len(self.classes_))
        net = net.to(x)
        model = BayesianNetwork(
            net,
            Bernoulli() if binary else Categorical(),
            len(x),
            prior,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "training was interrupted")
            posterior = fit(
                model,
                (x, y),
                guide=AdditiveNoiseGuide(model, init_log_sigma2=self.init_log_sigma2),
                elbo=TraceAnalyticKL_ELBO(kl_weight=self.kl_weight),
                epochs=max(1, math.ceil(self.max_iter / math.ceil(len(x) / batch_size))),
                batch_size=batch_size,
                lr=self.lr,
                kl_warmup=self.kl_warmup,
                threshold=self.threshold,
                seed=seed,
                device=x.device,
                progress=False,
            )
        if posterior.stopped_because.startswith("interrupted"):
            # A half-trained fit would pass for a whole one, in a grid search say.
            raise KeyboardInterrupt
        return posterior


class L1LogisticRegression(LinearClassifier):
    """L1-penalised logistic regression, multinomial for more than two classes.

    Minimises ``C * sum(log loss) + sum(|coef_|)``, scikit-learn's objective; intercepts are not
    penalised. See :func:`~bayes_svdo.inference.l1.fit_l1_logistic`.

    Args:
        C: Inverse strength of the penalty.
        fit_intercept: Whether there are intercepts.
        tol: Relative duality gap at which it stops.
        max_iter: Most steps.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Attributes:
        coef_: Weights, shape ``(n_classes, n_features)``, or ``(1, n_features)`` for two classes.
        intercept_: Intercepts, shape ``(n_classes,)`` or ``(1,)``.
        objective_: The objective at the solution.
        dual_gap_: The objective is above its minimum by no more than this.
        n_iter_: Number of steps.
    """

    def __init__(
        self,
        *,
        C: float = 1.0,
        fit_intercept: bool = True,
        tol: float = 1e-6,
        max_iter: int = 10_000,
        device: str = "auto",
    ) -> None:
        self.C, self.fit_intercept, self.tol = C, fit_intercept, tol
        self.max_iter, self.device = max_iter, device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to ``X``, shape ``(n_samples, n_features)``, and labels ``y``, ``(n_samples,)``."""
        found = fit_l1_logistic(
            *self._labelled_data(X, y),
            C=self.C,
            fit_intercept=self.fit_intercept,
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self.coef_, self.intercept_ = as_array(found.coef), as_array(found.intercept)
        self.objective_, self.dual_gap_ = found.objective, found.duality_gap
        self.n_iter_ = found.n_iter
        return self


class RVMRegressor(RegressorMixin, KernelEstimator):  # type: ignore[misc]
    """Relevance vector regression (Tipping 2001).

    See :func:`~bayes_svdo.inference.relevance_vector_machine.fit_rvm_regression`.

    Args:
        kernel: ``"rbf"``, ``"linear"``, ``"poly"``, ``"precomputed"`` or a function of two tensors.
        gamma: Parameter of ``"rbf"`` and ``"poly"``: a number, ``"scale"`` or ``"auto"``.
        degree: Degree of ``"poly"``.
        coef0: Constant of ``"poly"``.
        fit_intercept: Whether there is an intercept.
        method: ``"fast"`` (Tipping & Faul 2003), ``"mackay"`` or ``"em"``.
        tol: Gain in log evidence, in nats, below which nothing is done.
        max_iter: Most rounds.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Attributes:
        relevance_: Indices of the relevance vectors (of the features for ``"linear"``).
        dual_coef_: Posterior means of their weights.
        sigma_: Posterior covariance of these weights.
        lambda_: Prior precisions of these weights.
        alpha_: Precision of the noise, as in scikit-learn's ``ARDRegression``.
        intercept_: Posterior mean of the intercept.
        coef_: Weights of all features, for ``kernel="linear"`` only.
        scores_: Log evidence after each round, nats.
        n_iter_: Number of rounds.
    """

    _machine: RVMRegression

    def __init__(
        self,
        *,
        kernel: Any = "rbf",
        gamma: float | str = "scale",
        degree: int = 3,
        coef0: float = 1.0,
        fit_intercept: bool = True,
        method: str = "fast",
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str = "auto",
    ) -> None:
        self.kernel, self.gamma, self.degree, self.coef0 = kernel, gamma, degree, coef0
        self.fit_intercept, self.method = fit_intercept, method
        self.tol, self.max_iter, self.device = tol, max_iter, device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to ``X``, shape ``(n_samples, n_features)``, and ``y``, shape ``(n_samples,)``."""
        inputs, targets = self._training_data(X, y, y_numeric=True)
        machine = fit_rvm_regression(
            self._tensor(inputs),
            self._tensor(targets.astype(np.float64)),
            kernel=self.kernel,
            gamma=self.gamma,  # type: ignore[arg-type]
            degree=self.degree,
            coef0=self.coef0,
            fit_intercept=self.fit_intercept,
            method=self.method,  # type: ignore[arg-type]
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self._machine = machine
        self.relevance_, self.dual_coef_ = as_array(machine.relevance), as_array(machine.weights)
        self.sigma_, self.lambda_ = as_array(machine.covariance), as_array(machine.alpha)
        self.alpha_, self.intercept_ = machine.beta, float(machine.intercept)
        self.scores_, self.n_iter_ = as_array(machine.log_evidence), machine.n_iter
        if self.kernel == "linear":
            self.coef_ = as_array(machine.coefficients)
        elif hasattr(self, "coef_"):
            del self.coef_  # of an earlier fit with another kernel
        return self

    def predict(self, X: Any, return_std: bool = False) -> Array | tuple[Array, Array]:
        """Predictive mean, shape ``(n_samples,)``, and standard deviation if asked for."""
        inputs = self._new_inputs(X)
        mean, std = map(as_array, self._machine.predict(inputs, return_std=True))
        return (mean, std) if return_std else mean


class RVMClassifier(TorchClassifier, KernelEstimator):
    """Relevance vector classification, one set of weights per class (Tipping 2001).

    See :func:`~bayes_svdo.inference.relevance_vector_machine.fit_rvm_classification`.

    Args:
        kernel: ``"rbf"``, ``"linear"``, ``"poly"``, ``"precomputed"`` or a function of two tensors.
        gamma: Parameter of ``"rbf"`` and ``"poly"``: a number, ``"scale"`` or ``"auto"``.
        degree: Degree of ``"poly"``.
        coef0: Constant of ``"poly"``.
        fit_intercept: Whether there are intercepts.
        method: ``"fast"`` (Tipping & Faul 2003), ``"mackay"`` or ``"em"``. An iteration of the last
            two costs ``n_samples^3`` at first (with a kernel).
        tol: Gain in log evidence, in nats, below which nothing is done.
        max_iter: Most rounds for each class.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...

    Attributes:
        relevance_: Indices of the vectors (features for ``"linear"``) relevant to any class.
        machine_relevance_: Indices relevant to each class against the rest, a list of arrays; of
            one array for two classes, as are the next four.
        dual_coef_: Posterior means of the weights of these.
        sigma_: Posterior covariances of these weights.
        lambda_: Prior precisions of these weights.
        scores_: Log evidence after each round, nats.
        coef_: Weights, shape ``(n_classes, n_features)``, or ``(1, n_features)`` for two classes;
            for ``kernel="linear"`` only.
        intercept_: Intercepts, shape ``(n_classes,)`` or ``(1,)``.
        n_iter_: Rounds of the longest fit.
    """

    _machine: RVMClassification

    def __init__(
        self,
        *,
        kernel: Any = "rbf",
        gamma: float | str = "scale",
        degree: int = 3,
        coef0: float = 1.0,
        fit_intercept: bool = True,
        method: str = "fast",
        tol: float = 1e-3,
        max_iter: int = 1000,
        device: str = "auto",
    ) -> None:
        self.kernel, self.gamma, self.degree, self.coef0 = kernel, gamma, degree, coef0
        self.fit_intercept, self.method = fit_intercept, method
        self.tol, self.max_iter, self.device = tol, max_iter, device

    def fit(self, X: Any, y: Any) -> Self:
        """Fit to ``X``, shape ``(n_samples, n_features)``, and labels ``y``, ``(n_samples,)``."""
        machine = fit_rvm_classification(
            *self._labelled_data(X, y),
            kernel=self.kernel,
            gamma=self.gamma,  # type: ignore[arg-type]
            degree=self.degree,
            coef0=self.coef0,
            fit_intercept=self.fit_intercept,
            method=self.method,  # type: ignore[arg-type]
            tol=self.tol,
            max_iter=self.max_iter,
        )
        self._machine = machine
        self.relevance_, self.n_iter_ = as_array(machine.relevance), machine.n_iter
        self.intercept_ = np.asarray([float(m.intercept) for m in machine.machines])
        self.machine_relevance_ = [as_array(m.relevance) for m in machine.machines]
        self.dual_coef_ = [as_array(m.weights) for m in machine.machines]
        self.sigma_ = [as_array(m.covariance) for m in machine.machines]
        self.lambda_ = [as_array(m.alpha) for m in machine.machines]
        self.scores_ = [as_array(m.log_evidence) for m in machine.machines]
        if self.kernel == "linear":
            self.coef_ = np.stack([as_array(m.coefficients) for m in machine.machines])
        elif hasattr(self, "coef_"):
            del self.coef_  # of an earlier fit with another kernel
        return self

    def decision_function(self, X: Any) -> Array:
        """Log odds of ``classes_[1]``, shape ``(n_samples,)``, or of each class against the rest.

        They are shrunk for the uncertainty of the weights.
        """
        inputs = self._new_inputs(X)
        return as_array(self._machine.decision_function(inputs))  # type: ignore[no-any-return]

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class, averaged over the uncertainty of the weights."""
        inputs = self._new_inputs(X)
        return as_array(self._machine.predict_proba(inputs))  # type: ignore[no-any-return]
