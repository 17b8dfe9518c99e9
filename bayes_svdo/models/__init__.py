"""Networks as Pyro models: architectures, likelihoods, and the lift that gives weights a prior."""

from bayes_svdo.models.bayesian_network import BayesianNetwork
from bayes_svdo.models.convolutional import lenet_5_caffe
from bayes_svdo.models.dense import dense, dense_100_40, dense_256, dense_300, lenet_300_100
from bayes_svdo.models.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from bayes_svdo.models.linear import linear_regression, logistic_regression
from bayes_svdo.models.registry import build

__all__ = [
    "BayesianNetwork",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "Likelihood",
    "build",
    "dense",
    "dense_100_40",
    "dense_256",
    "dense_300",
    "lenet_5_caffe",
    "lenet_300_100",
    "linear_regression",
    "logistic_regression",
]
