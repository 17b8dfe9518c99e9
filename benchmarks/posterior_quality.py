"""How good is q: the variational posterior beside NUTS under a truncated log-uniform prior.

    python benchmarks/posterior_quality.py           # about 15 minutes of one core; resumable
    python benchmarks/posterior_quality.py --table   # table and ranks of what is there

Writes results/posterior_quality.json, .md and .png (ranks), and the marginals of two cases as
docs/images/posterior_quality_sparse.png and _correlated.png.

The log-uniform prior has no posterior, so q cannot be compared with "the" posterior. The proper
prior here is TruncatedLogUniform(LOW, HIGH): p(w) ∝ 1/(|w| + LOW) for |w| <= HIGH. Both the exact
posterior and the truths of simulation-based calibration come from it, and what is said of q depends
on LOW and HIGH; for one data set LOW is varied.

1. One data set per case: q by `fit`, NUTS (2 chains), marginals, PSIS k-hat of q.
2. Simulation-based calibration: weights drawn from the truncated prior, data at those weights, q.
   For linear regression q is the exact optimum, by `fit_vdard_regression`; for logistic regression
   it is by `fit`. NUTS is put through the same with fewer repetitions, to check the reference.

There are no biases, and the noise is known. The KL of q is that of the improper prior, the exact
one. The seed of a data set, of its fit and of its draws is its number.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import torch
from environment import RESULTS, environment, write_json
from posterior_quality_report import picture, table
from torch import Tensor, nn

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, LogUniform, Posterior, fit
from bayes_svdo.analysis import (
    NutsWarning,
    compare_with_nuts,
    nuts_posterior,
    plot_nuts_marginals,
    psis_khat,
)
from bayes_svdo.distributions import TruncatedLogUniform
from bayes_svdo.inference.exact_regression import fit_vdard_regression
from bayes_svdo.models import Bernoulli, Gaussian

DOCS = Path(__file__).parents[1] / "docs" / "images"
NOISE = 1.0
EPOCHS = 2000  # full batches
DRAWS, WARMUP, CHAINS = 750, 400, 2
SBC_DRAWS = 199  # so that 50 % and 95 % of the 200 ranks are whole numbers
NUTS_SBC_DRAWS, NUTS_SBC_WARMUP, THIN = 398, 200, 2


class Case(NamedTuple):
    """A way to draw data."""

    title: str
    num_data: int
    num_features: int
    correlation: float  # of any two features
    logistic: bool
    low: float
    high: float
    truth: tuple[float, ...] | None  # None: drawn from the prior
    sbc: int  # repetitions for q
    sbc_nuts: int  # and for NUTS


CASES = {
    "independent": Case(
        "Linear, independent features", 50, 5, 0.0, False, 0.01, 10.0, None, 400, 12
    ),
    "correlated": Case(
        "Linear, features correlated 0.9", 50, 5, 0.9, False, 0.01, 10.0, None, 400, 6
    ),
    "sparse": Case(
        "Linear, sparse truth", 50, 8, 0.0, False, 0.01, 10.0,
        (2.0, -1.0, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0), 0, 0,
    ),
    "logistic": Case("Logistic", 100, 5, 0.0, True, 0.01, 3.0, None, 20, 10),
}  # fmt: skip
SHOWN_SEED = 0
PICTURES = ("sparse", "correlated")
LOWS = (0.001, 0.01, 0.1)  # of the sparse case


def inputs(case: Case) -> Tensor:  # (num_data, num_features)
    """Standard normal features."""
    x = torch.randn(case.num_data, case.num_features, dtype=torch.float64)
    common = torch.randn(case.num_data, 1, dtype=torch.float64)
    return math.sqrt(1 - case.correlation) * x + math.sqrt(case.correlation) * common


def targets(case: Case, x: Tensor, w: Tensor) -> Tensor:  # (num_data, 1)
    """Drawn from the model."""
    mean = (x @ w)[:, None]
    if case.logistic:
        return torch.bernoulli(mean.sigmoid())
    return mean + NOISE * torch.randn_like(mean)


def prior_of(case: Case) -> TruncatedLogUniform:
    """In float64."""
    return TruncatedLogUniform(torch.tensor(case.low, dtype=torch.float64), case.high)


def draw(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, targets and true weights."""
    torch.manual_seed(seed)
    if case.truth is not None:
        w = torch.tensor(case.truth, dtype=torch.float64)
    else:
        w = prior_of(case).sample((case.num_features,))
    x = inputs(case)
    return x, targets(case, x, w), w


def model(case: Case) -> BayesianNetwork:
    """Without a bias, at zero."""
    net = nn.Linear(case.num_features, 1, bias=False)
    nn.init.zeros_(net.weight)
    likelihood = Bernoulli() if case.logistic else Gaussian(NOISE)
    return BayesianNetwork(net, likelihood, case.num_data, prior=LogUniform("exact"))


def fit_q(case: Case, x: Tensor, y: Tensor, seed: int) -> Posterior:
    """By stochastic variational inference, as a user does."""
    return fit(
        model(case), (x.float(), y.float()), epochs=EPOCHS, batch_size=case.num_data, lr=0.05,
        sigma_lr=0.05, kl_warmup=(0.0, 0.2), compile=False, progress=False, device="cpu", seed=seed,
    )  # fmt: skip


def gaussian_of(case: Case, x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means, standard deviations and which weights are kept, of q in the calibration."""
    if not case.logistic:
        found = fit_vdard_regression(x, y[:, 0], fit_intercept=False, noise_precision=1 / NOISE**2)
        return found.loc, found.sigma2.sqrt(), found.kept
    posterior = fit_q(case, x, y, seed)
    loc, log_sigma2 = (each.detach()[0] for each in posterior.guide.parameters_of("weight"))
    kept = posterior.log_alpha()["weight"][0] < posterior.threshold
    return loc, (0.5 * log_sigma2).exp(), kept


def reference(case: Case, posterior: Posterior, x: Tensor, y: Tensor, **kwargs: Any) -> Any:
    """NUTS; what it warns of is in what it returns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NutsWarning)
        return nuts_posterior(posterior, x.float(), y.float(), prior=prior_of(case), **kwargs)


def show(name: str) -> dict[str, Any]:
    """One data set: everything about it."""
    case = CASES[name]
    x, y, truth = draw(case, SHOWN_SEED)
    started = time.process_time()
    posterior = fit_q(case, x, y, SHOWN_SEED)
    fitted = time.process_time()
    nuts = reference(
        case, posterior, x, y, draws=DRAWS, warmup=WARMUP, chains=CHAINS, seed=SHOWN_SEED
    )
    sampled = time.process_time()
    if name in PICTURES:
        DOCS.mkdir(parents=True, exist_ok=True)
        figure = plot_nuts_marginals(posterior, nuts, truth=truth.tolist())
        figure.savefig(DOCS / f"posterior_quality_{name}.png", dpi=150)
    found: dict[str, Any] = {
        "truth": truth.tolist(),
        "weights": compare_with_nuts(posterior, nuts).to_dict(),
        "khat": psis_khat(
            posterior, x.float(), y.float(), 4000, prior=prior_of(case), seed=SHOWN_SEED
        ),
        "nuts": {
            "worst_rhat": nuts.worst_rhat,
            "least_ess": nuts.least_ess,
            "divergences": nuts.divergences,
            "correlation": np.corrcoef(nuts.weights["weight"][:, 0].T).tolist(),
        },
        "seconds": {"fit": fitted - started, "nuts": sampled - fitted},
    }
    if not case.logistic:
        loc, sd, kept = gaussian_of(case, x, y, SHOWN_SEED)
        found["exact_q"] = {"mean": loc.tolist(), "sd": sd.tolist(), "kept": kept.tolist()}
    if name == "sparse":
        found["lows"] = {}
        for low in LOWS:
            other = case._replace(low=low)
            again = nuts if low == case.low else reference(
                other, posterior, x, y, draws=DRAWS, warmup=WARMUP, chains=CHAINS, seed=SHOWN_SEED
            )  # fmt: skip
            found["lows"][str(low)] = {
                "mean": again.weights["weight"][:, 0].mean(0).tolist(),
                "sd": again.weights["weight"][:, 0].std(0).tolist(),
                "worst_rhat": again.worst_rhat,
                "divergences": again.divergences,
            }
    return found


def repetition(name: str, seed: int, with_nuts: bool) -> dict[str, Any]:
    """One truth from the prior, its data, and its ranks among draws of q and of NUTS."""
    case = CASES[name]
    x, y, truth = draw(case, seed)
    loc, sd, kept = (each.double() for each in gaussian_of(case, x, y, seed))
    torch.manual_seed(seed)
    drawn = loc + sd * torch.randn(SBC_DRAWS, len(loc), dtype=torch.float64)
    found = {
        "seed": seed,
        "truth": truth.tolist(),
        "mean": loc.tolist(),
        "sd": sd.tolist(),
        "kept": kept.bool().tolist(),
        "rank": (drawn < truth).sum(0).tolist(),
    }
    if with_nuts:
        network = model(case)
        start = Posterior(network, AdditiveNoiseGuide(network))  # NUTS uses the model alone
        nuts = reference(
            case, start, x, y, draws=NUTS_SBC_DRAWS, warmup=NUTS_SBC_WARMUP, chains=1, seed=seed
        )
        weights = torch.from_numpy(nuts.weights["weight"][:, 0])
        found["nuts"] = {
            "mean": weights.mean(0).tolist(),
            "sd": weights.std(0).tolist(),
            "rank": (weights[::THIN] < truth).sum(0).tolist(),
            "worst_rhat": nuts.worst_rhat,
            "least_ess": nuts.least_ess,
            "divergences": nuts.divergences,
        }
    return found


def run(out: Path) -> dict[str, Any]:
    """Everything that the file does not hold yet, written after every piece."""
    settings = {
        # How often something is repeated is no setting: more can be added.
        "cases": {
            name: {k: v for k, v in case._asdict().items() if not k.startswith("sbc")}
            for name, case in CASES.items()
        },
        "noise": NOISE, "epochs": EPOCHS, "draws": DRAWS, "warmup": WARMUP, "chains": CHAINS,
        "sbc_draws": SBC_DRAWS, "nuts_sbc_draws": NUTS_SBC_DRAWS,
        "nuts_sbc_warmup": NUTS_SBC_WARMUP, "thin": THIN, "shown_seed": SHOWN_SEED, "lows": LOWS,
    }  # fmt: skip
    settings = json.loads(json.dumps(settings))
    content = json.loads(out.read_text()) if out.exists() else {}
    if content.get("settings") != settings:
        content = {"settings": settings, "shown": {}, "sbc": {}, "seconds": 0.0}
    content["environment"] = environment("arviz", "scipy")
    started = time.process_time() - content["seconds"]

    def keep() -> None:
        content["seconds"] = time.process_time() - started
        write_json(out, content)

    for name in CASES:
        if name not in content["shown"]:
            content["shown"][name] = show(name)
            keep()
            print(name, "shown", flush=True)
    for name, case in CASES.items():
        done = content["sbc"].setdefault(name, [])
        for number in range(len(done), case.sbc):
            # Seed 0 is the data set that is shown.
            done.append(repetition(name, number + 1, number < case.sbc_nuts))
            if number < case.sbc_nuts or case.logistic or number % 50 == 49:
                keep()
        keep()
        print(name, "calibrated", flush=True)
    return content


def main() -> None:
    """Run what is missing; write table and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "posterior_quality.json")
    parser.add_argument("--table", action="store_true", help="of what is there")
    arguments = parser.parse_args()
    mpl.use("Agg")
    torch.set_num_threads(1)
    content = json.loads(arguments.out.read_text()) if arguments.table else run(arguments.out)
    text = table(content)
    arguments.out.with_suffix(".md").write_text(text)
    picture(content, arguments.out)
    print(text)


if __name__ == "__main__":
    main()
