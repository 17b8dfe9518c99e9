"""Dense networks on MNIST: test error and compression beside the paper's.

    python benchmarks/mnist_dense.py search lenet_300_100    # candidates on a 55,000/5,000 split
    python benchmarks/mnist_dense.py final lenet_300_100     # the frozen one on 60,000, per seed
    python benchmarks/mnist_dense.py twin lenet_300_100      # the same network, dense
    python benchmarks/mnist_dense.py table                   # the results as Markdown
    python benchmarks/mnist_dense.py final lenet_300_100 --eager    # the same, nothing compiled
    python benchmarks/mnist_dense.py final lenet_300_100 --device cuda --epochs 200

`configs/<name>.toml` holds the candidates, tried with seed 0 and the finalists with further ones,
and the frozen configuration. The test set is read by `final` and `twin` only; their numbers are
those of the last epoch. Two runs go side by side, one thread each; on a GPU one after the other,
with results files of their own. The twin has the initial weights, epochs, batches and schedule of
the frozen configuration and its seeds, and is trained on the likelihood alone, at that of three
learning rates with the lowest error on the split; it runs on a CPU.
MNIST comes from `$BAYES_SVDO_DATA`, or is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import tomllib
from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from environment import RESULTS, environment, write_json
from twin import LEARNING_RATES, train_twin

from bayes_svdo import data
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior, fit
from bayes_svdo.models import BayesianNetwork, Categorical, dense

CONFIGS = Path(__file__).parent / "configs"
SPLIT_SEED = 0
THRESHOLDS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0)
MONTE_CARLO_SAMPLES = 20
# What a row of the table says of a results file, by the end of its name or its configuration.
HOW = {
    "_eager": ", nothing compiled",
    "_earlier": ", an earlier choice",
    "dense_300_authors": ", by the authors' recipe",
}


def run(config: dict[str, Any], seed: int, final: bool, device: str) -> dict[str, Any]:
    """Train once; evaluate on the test set if `final`, else on the 5,000 held out."""
    torch.set_num_threads(1)
    mnist = data.load("mnist")
    if not final:
        mnist = mnist.with_validation_split(5000, SPLIT_SEED)
    (x_train, y_train), (x_test, y_test) = mnist.train, mnist.test
    if config.get("centre", False):  # pixels as the authors feed them: mean 0, sd 1 over all
        mean, sd = x_train.mean(), x_train.std()
        x_train, x_test = (x_train - mean) / sd, (x_test - mean) / sd
    torch.manual_seed(seed)
    net = dense(tuple(config["sizes"]))
    if "init_std" in config:  # else He's
        for parameter in net.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=config["init_std"])
    if "input_dropout" in config:  # pixels at random, in training only
        dropout = torch.nn.Dropout(config["input_dropout"])
        net = torch.nn.Sequential(OrderedDict([("dropout", dropout), *net.named_children()]))
    model = BayesianNetwork(net, Categorical(), num_data=len(mnist.x_train))
    guide = AdditiveNoiseGuide(model, init_log_sigma2=config["init_log_sigma2"])
    schedule = None
    if "lr_drops" in config:  # to a fifth at each of these fractions of training

        def schedule(progress: float) -> float:
            return 0.2 ** sum(progress >= drop for drop in config["lr_drops"])

    started = time.perf_counter()
    posterior = fit(
        model,
        (x_train, y_train),
        guide=guide,
        seed=seed,
        device=device,
        progress=False,
        kl_warmup=tuple(config["kl_warmup"]),
        lr_schedule=schedule,
        threshold=config["threshold"],
        compile=config.get("compile", "auto"),
        **{
            key: config[key]
            for key in ("epochs", "batch_size", "lr", "sigma_lr", "prune_while_training")
        },
    )
    table = posterior.sparsity()
    return {
        "seed": seed,
        "error_percent": error(posterior, x_test, y_test),
        "error_percent_unpruned": error(posterior, x_test, y_test, threshold=float("inf")),
        "error_percent_monte_carlo": monte_carlo_error(posterior, x_test, y_test, seed),
        "compression": table.compression,
        "compression_with_biases": table.compression_with_biases,
        "nonzero": table.nonzero,
        "sparsity_percent": {layer.name: layer.percent for layer in table},
        "by_threshold": {
            str(tau): {
                "error_percent": error(posterior, x_test, y_test, threshold=tau),
                "compression": posterior.sparsity(tau).compression,
            }
            for tau in THRESHOLDS
        },
        "train_nll": posterior.history[-1]["nll"],
        "kl": posterior.history[-1]["kl"],
        "seconds": time.perf_counter() - started,
    }


def run_twin(config: dict[str, Any], lr: float, seed: int, final: bool) -> dict[str, Any]:
    """Train the dense twin once; its error on the test set if `final`, else on the held out."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    mnist = data.load("mnist")
    if not final:
        mnist = mnist.with_validation_split(5000, SPLIT_SEED)
    (x, y), (x_test, y_test) = mnist.train, mnist.test
    started = time.perf_counter()
    net = train_twin(config, x, y, lr, seed)
    with torch.no_grad():
        wrong = net(x_test).argmax(-1) != y_test
    return {
        "lr": lr,
        "seed": seed,
        "error_percent": 100 * float(wrong.double().mean()),
        "seconds": time.perf_counter() - started,
    }


def run_twins(config: dict[str, Any], seeds: list[int], path: Path) -> None:
    """Choose the twin's learning rate on the split, then train it on every seed."""
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run_twin, config, lr, 0, False) for lr in LEARNING_RATES]
        searched = [job.result() for job in jobs]
        lr = min(searched, key=lambda run: run["error_percent"])["lr"]
        jobs = [pool.submit(run_twin, config, lr, seed, True) for seed in seeds]
        runs = [job.result() for job in jobs]
    found = [run["error_percent"] for run in runs]
    content: dict[str, Any] = {
        "script": "benchmarks/mnist_dense.py",
        "data": "MNIST, 60,000 / test set; the learning rate on 55,000 / 5,000",
        "threads_per_run": 1,
        "environment": environment("lightning-fabric"),
        "config": config,
        "searched": searched,
        "runs": runs,
        "summary": {
            "error_percent": {"mean": statistics.mean(found), "sd": statistics.stdev(found)}
        },
    }
    write_json(path, content)
    print(f"{statistics.mean(found):.2f} +- {statistics.stdev(found):.2f} % at lr {lr}")


def error(posterior: Posterior, x: Any, y: Any, threshold: float | None = None) -> float:
    """Test error in percent of the pruned mean network."""
    wrong = posterior.output(x, threshold).argmax(-1).cpu() != y
    return 100 * float(wrong.double().mean())


def monte_carlo_error(posterior: Posterior, x: Any, y: Any, seed: int) -> float:
    """Test error in percent of the predictive distribution, averaged over draws."""
    torch.manual_seed(seed)
    mean = posterior.predict(x, MONTE_CARLO_SAMPLES).mean(0)
    return 100 * float((mean.argmax(-1).cpu() != y).double().mean())


def run_all(
    jobs: list[tuple[str, dict[str, Any], int]],
    path: Path,
    final: bool,
    device: str,
    published: dict[str, Any],
) -> None:
    """Run the jobs two at a time, on a GPU one; the results file holds every one that is done.

    A run that is there already, with the same configuration and seed, is not done again.
    """
    done = json.loads(path.read_text())["runs"] if path.exists() else []
    wanted = [{"name": name, "config": config, "seed": seed} for name, config, seed in jobs]
    done = [run for run in done if {key: run[key] for key in wanted[0]} in wanted]
    content: dict[str, Any] = {
        "script": "benchmarks/mnist_dense.py",
        "data": "MNIST, "
        + ("60,000 / test set" if final else "55,000 / 5,000 of the training set"),
        "threads_per_run": 1,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "environment": environment("lightning-fabric"),
        "runs": done,
    }
    if not final:
        published = {}
    if done:
        write_json(path, content | _conclusion(done, published))
    had = [(run["name"], run["seed"]) for run in done]
    jobs = [job for job in jobs if (job[0], job[2]) not in had]
    with ProcessPoolExecutor(1 if device == "cuda" else 2, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(run, config, seed, final, device): (name, config)
            for name, config, seed in jobs
        }
        for future in as_completed(futures):
            name, config = futures[future]
            content["runs"].append({"name": name, "config": config, **future.result()})
            content["runs"].sort(key=lambda r: (r["name"], r["seed"]))
            write_json(path, content | _conclusion(content["runs"], published))
            last = future.result()
            print(
                f"{name} seed {last['seed']}: {last['error_percent']:.2f} % error, "
                f"{last['compression']:.1f}x, {last['seconds']:.0f} s",
                flush=True,
            )


def _conclusion(runs: list[dict[str, Any]], published: dict[str, Any]) -> dict[str, Any]:
    """Of final runs: mean and spread, and whether the means reach what was published."""
    if not published:
        return {}
    found = summary(runs)
    reached = (
        found["error_percent"]["mean"] <= published["error_percent"]
        and found["compression"]["mean"] >= published["compression"]
    )
    return {"summary": found, "published": published, "means_reach_what_was_published": reached}


def summary(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean, standard deviation, least and largest over seeds."""
    keys = [
        "error_percent",
        "error_percent_unpruned",
        "error_percent_monte_carlo",
        "compression",
        "compression_with_biases",
        "nonzero",
        "seconds",
    ]
    return {
        key: {
            "mean": statistics.mean(values),
            "sd": statistics.stdev(values) if len(values) > 1 else float("nan"),
            "min": min(values),
            "max": max(values),
        }
        for key in keys
        for values in [[run[key] for run in runs]]
    }


def table() -> str:
    """All final results, beside what was published."""
    lines = [
        "| network | | test error % | compression | seeds |",
        "| --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("mnist_dense_*_final*.json")):
        content = json.loads(path.read_text())
        name, _, kind = path.stem.removeprefix("mnist_dense_").partition("_final")
        config = tomllib.loads((CONFIGS / f"{name}.toml").read_text())
        published, net = config["published"], "-".join(map(str, config["base"]["sizes"]))
        how = HOW.get(kind, "") or HOW.get(name, "")
        error, ratio = content["summary"]["error_percent"], content["summary"]["compression"]
        theirs = (
            f"| {net} | {published['source']} | {published['error_percent']} "
            f"| {published['compression']}x | 1 |"
        )
        lines += [theirs] * (theirs not in lines)
        if not kind:
            lines += _row_of_twin(RESULTS / f"mnist_dense_{name}_twin.json")
        lines += [
            f"| | bayes_svdo{how} | {error['mean']:.2f} ± {error['sd']:.2f} "
            f"| {ratio['mean']:.1f}x ± {ratio['sd']:.1f} | {len(content['runs'])} |",
        ]
    return "\n".join(lines)


def _row_of_twin(path: Path) -> list[str]:
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    error = content["summary"]["error_percent"]
    return [
        f"| | dense, deterministic | {error['mean']:.2f} ± {error['sd']:.2f} "
        f"| 1x | {len(content['runs'])} |"
    ]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("search", "final", "twin", "table"))
    parser.add_argument("config", nargs="?", help="name of a file in configs/")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--epochs", type=int, help="others than the configuration's")
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    arguments = parser.parse_args()
    if arguments.action == "table":
        print(table())
        return
    if arguments.config is None:
        sys.exit(
            "which configuration? One of: " + ", ".join(p.stem for p in CONFIGS.glob("*.toml"))
        )
    content = tomllib.loads((CONFIGS / f"{arguments.config}.toml").read_text())
    if arguments.action == "twin":
        given = (arguments.device, arguments.epochs, arguments.eager)
        if given != ("cpu", None, False):
            sys.exit("twin takes no --device, --epochs or --eager")
        if no := sorted({"centre", "init_std", "input_dropout", "lr_drops"} & set(content["base"])):
            sys.exit(f"the twin of {arguments.config} would be trained without its {', '.join(no)}")
    suffix = "" if arguments.device == "cpu" else "_cuda"
    if arguments.epochs is not None:
        content["base"]["epochs"] = arguments.epochs
        suffix += f"_{arguments.epochs}_epochs"
    if arguments.eager:
        content["base"]["compile"] = False
        suffix += "_eager"
    path = RESULTS / f"mnist_dense_{arguments.config}_{arguments.action}{suffix}.json"
    if arguments.action == "search":
        jobs = [
            (name, content["base"] | change, 0) for name, change in content["candidates"].items()
        ]
        finalists = content.get("finalists", {"candidates": [], "seeds": []})
        jobs += [
            (name, content["base"] | content["candidates"][name], seed)
            for seed in finalists["seeds"]
            for name in finalists["candidates"]
        ]
    else:
        chosen = content["base"] | content["candidates"][content["chosen"]["candidate"]]
        jobs = [
            (content["chosen"]["candidate"], chosen, seed) for seed in content["chosen"]["seeds"]
        ]
        if arguments.action == "twin":
            run_twins(chosen, content["chosen"]["seeds"], path)
            return
    final = arguments.action == "final"
    run_all(jobs, path, final, arguments.device, content["published"])


if __name__ == "__main__":
    main()
