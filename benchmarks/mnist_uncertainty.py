"""A sparse classifier beside its dense deterministic twin: calibration, and what is no digit.

    python benchmarks/mnist_uncertainty.py search    # the twin's learning rate, on 55,000/5,000
    python benchmarks/mnist_uncertainty.py final     # both on 60,000, evaluated on the test sets
    python benchmarks/mnist_uncertainty.py table     # the Markdown from the JSON alone

LeNet-300-100 with the frozen configuration of `mnist_dense.py`. The twin is the same network with
the same initial weights, epochs, batch size and shape of the learning-rate schedule, trained by
Adam on the likelihood alone; of the learning rates tried it has the one with the lowest NLL on what
`search` held back. Test sets: MNIST's, and Fashion-MNIST's as what the networks have never seen.

Two predictions of the sparse one: the mean over 50 draws of q, in which weights that were pruned
while training are zero, and the one network of the posterior means. ECE has 15 bins of equal
numbers of images. AUROC: the probability that a piece of clothing is more uncertain than a digit.
Two runs go side by side, one thread each; runs that are in the results file are not done again.
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment, mean_and_sd, write_json
from torch import Tensor
from torch.nn.functional import log_softmax
from twin import LEARNING_RATES, train_twin

from bayes_svdo import data
from bayes_svdo.analysis import ClassificationPredictive, classification_scores, ood_auroc
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior, fit
from bayes_svdo.models import BayesianNetwork, Categorical, dense

CONFIG = Path(__file__).parent / "configs" / "lenet_300_100.toml"
SEEDS = (0, 1, 2, 3, 4)
DRAWS = 50
TWIN = "dense, deterministic"
SPARSE = "sparse, 50 draws"
SPARSE_MEAN = "sparse, the pruned means"


def configuration() -> dict[str, Any]:
    """The frozen one of `mnist_dense.py`."""
    content = tomllib.loads(CONFIG.read_text())
    chosen: dict[str, Any] = content["base"] | content["candidates"][content["chosen"]["candidate"]]
    return chosen


def of_one_network(logits: Tensor) -> ClassificationPredictive:
    """The prediction of a network without a posterior: all of its entropy is aleatoric."""
    log_probabilities = log_softmax(logits.double(), -1)
    entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
    return ClassificationPredictive(log_probabilities, entropy, "one network", 1)


def search(lr: float) -> dict[str, Any]:
    """The twin's NLL on what is held back."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    mnist = data.load("mnist").with_validation_split(5000, 0)
    (x, y), (x_test, y_test) = mnist.train, mnist.test
    net = train_twin(configuration(), x, y, lr, seed=0)
    with torch.no_grad():
        scores = classification_scores(of_one_network(net(x_test)), y_test)
    return {"lr": lr, "nll": scores.nll, "error_percent": 100 * (1 - scores.accuracy)}


def final(kind: str, lr: float, seed: int) -> list[dict[str, Any]]:
    """Train one network and score its predictions of both test sets."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    config = configuration()
    mnist, clothes = data.load("mnist"), data.load("fashion-mnist").x_test
    x, y = mnist.train
    started = time.process_time()
    predict: dict[str, Callable[[Tensor], ClassificationPredictive]]
    if kind == TWIN:
        net = train_twin(config, x, y, lr, seed)
        extra = {"seconds": time.process_time() - started}
        predict = {TWIN: lambda images: of_one_network(net(images))}
    else:
        posterior = train_sparse(config, x, y, seed)
        extra = {
            "seconds": time.process_time() - started,
            "compression": posterior.sparsity().compression,
        }
        predict = {
            SPARSE: lambda images: posterior.predictive(images, DRAWS, seed=seed),
            SPARSE_MEAN: lambda images: of_one_network(posterior.output(images)),
        }
    results = []
    for name, of in predict.items():
        with torch.no_grad():
            inside, outside = of(mnist.x_test), of(clothes)
        scores = classification_scores(inside, mnist.y_test)
        measures = ("entropy", "mutual_information") if name == SPARSE else ("entropy",)
        results.append(
            {
                "prediction": name,
                "seed": seed,
                "error_percent": 100 * (1 - scores.accuracy),
                "nll": scores.nll,
                "brier": scores.brier,
                "ece_percent": 100 * scores.ece,
                "auroc": {
                    measure: ood_auroc(getattr(inside, measure), getattr(outside, measure))
                    for measure in measures
                },
            }
            | extra
        )
    return results


def train_sparse(config: dict[str, Any], x: Tensor, y: Tensor, seed: int) -> Posterior:
    """The network of `config` with its log-uniform prior."""
    torch.manual_seed(seed)
    model = BayesianNetwork(dense(tuple(config["sizes"])), Categorical(), num_data=len(x))
    return fit(
        model,
        (x, y),
        guide=AdditiveNoiseGuide(model, init_log_sigma2=config["init_log_sigma2"]),
        kl_warmup=tuple(config["kl_warmup"]),
        seed=seed,
        progress=False,
        **{
            key: config[key]
            for key in (
                "epochs", "batch_size", "lr", "sigma_lr", "threshold", "prune_while_training",
            )
        },
    )  # fmt: skip


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = [
        "LeNet-300-100, 60,000 training images: mean (standard deviation) over seeds.",
        "",
        "| prediction | seeds | error % | NLL (nats) | Brier | ECE % | AUROC entropy "
        "| AUROC mutual information | compression |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in (TWIN, SPARSE, SPARSE_MEAN):
        mine = [r for r in runs if r["prediction"] == name]
        if not mine:
            continue
        cells = [
            mean_and_sd([r[key] for r in mine], digits)
            for key, digits in (("error_percent", 2), ("nll", 4), ("brier", 4), ("ece_percent", 2))
        ]
        for measure in ("entropy", "mutual_information"):
            found = [r["auroc"][measure] for r in mine if measure in r["auroc"]]
            cells.append(mean_and_sd(found, 3) if found else "")
        ratios = [r["compression"] for r in mine if "compression" in r]
        cells.append(mean_and_sd(ratios, 1) if ratios else "1")
        lines.append(f"| {name} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_final(path: Path, seeds: Sequence[int], processes: int) -> None:
    """Run what is missing; the results file holds every network that is done."""
    searched = json.loads((RESULTS / "mnist_uncertainty_search.json").read_text())
    lr = min(searched["runs"], key=lambda r: r["nll"])["lr"]
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    content = {
        "script": "benchmarks/mnist_uncertainty.py",
        "data": "MNIST, 60,000 / test set; Fashion-MNIST's test set",
        "configuration": configuration(),
        "lr_of_the_twin": lr,
        "draws": DRAWS,
        "threads_per_run": 1,
        "environment": environment("lightning-fabric"),
        "runs": runs,
    }
    done = {(r["prediction"], r["seed"]) for r in runs}
    jobs = [(kind, seed) for seed in seeds for kind in (TWIN, SPARSE) if (kind, seed) not in done]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for future in as_completed([pool.submit(final, kind, lr, seed) for kind, seed in jobs]):
            runs.extend(future.result())
            runs.sort(key=lambda r: (r["prediction"], r["seed"]))
            write_json(path, content)
            path.with_suffix(".md").write_text(table(runs))
    print(table(runs))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("search", "final", "table"))
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    path = RESULTS / "mnist_uncertainty.json"
    if arguments.action == "table":
        print(table(json.loads(path.read_text())["runs"]))
    elif arguments.action == "final":
        run_final(path, arguments.seeds, arguments.processes)
    else:
        with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
            runs = list(pool.map(search, LEARNING_RATES))
        content = {
            "script": "benchmarks/mnist_uncertainty.py",
            "data": "MNIST, 55,000 / 5,000 of the training set",
            "threads_per_run": 1,
            "environment": environment(),
            "runs": runs,
        }
        write_json(RESULTS / "mnist_uncertainty_search.json", content)
        for each in runs:
            print(f"lr {each['lr']}: NLL {each['nll']:.4f}, error {each['error_percent']:.2f} %")


if __name__ == "__main__":
    main()
