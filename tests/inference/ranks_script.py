"""Started once per rank by test_devices.py: fits, and writes what each rank found.

python ranks_script.py FOLDER [--brief | --data]
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
)

from bayes_svdo import AdditiveNoiseGuide, BayesianNetwork, TraceAnalyticKL_ELBO, fit
from bayes_svdo.inference import graphs
from bayes_svdo.inference.devices import Ranks, make_fabric
from bayes_svdo.inference.objective import Objective
from bayes_svdo.inference.posterior import local_parameters
from bayes_svdo.models import Categorical, dense

NUM_DATA, CLASSES, DRAWS = 40, 3, 200
_GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(NUM_DATA, 6, generator=_GENERATOR)
Y = torch.randint(CLASSES, (NUM_DATA,), generator=_GENERATOR)


def model(net: nn.Module | None = None, log_sigma2: float = -60.0) -> Any:
    torch.manual_seed(0)
    lifted = BayesianNetwork(net or dense((6, 8, CLASSES)), Categorical(), NUM_DATA)
    return lifted, AdditiveNoiseGuide(lifted, init_log_sigma2=log_sigma2)


def quick(lifted: Any, guide: Any, ranks: int, **settings: Any) -> Any:
    """Five full-batch epochs, whatever the number of ranks."""
    settings = {"epochs": 5, "lr": 0.05, "seed": 0, "compile": False} | settings
    return fit(
        lifted, (X, Y), guide=guide, batch_size=NUM_DATA // ranks, device="cpu", progress=False,
        **settings,
    )  # fmt: skip


def parameters(posterior: Any) -> list[Any]:
    values = (*posterior.guide.parameters(), *posterior.model.parameters())
    return torch.cat([p.detach().flatten() for p in values]).tolist()


class Unused(nn.Module):
    """Has a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, CLASSES), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


def experiments(ranks: int, rank: int, brief: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    posterior = quick(*model(), ranks)
    found["without noise"] = parameters(posterior)
    found["history"] = [dict(row) | {"seconds": 0} for row in posterior.history]

    if brief:
        return found
    graphs._compiled = lambda graph, *_: graph
    found["traced"] = parameters(quick(*model(), ranks, compile=True))

    draws: list[float] = []
    noisy = quick(
        *model(log_sigma2=-2.0), ranks, epochs=40, prune_while_training=True,
        kl_warmup=(0.0, 0.1), callbacks=[partial(draw, draws)],
    )  # fmt: skip
    found["noisy"], found["draws"] = parameters(noisy), draws
    found["pruned"] = sum(int((v == torch.inf).sum()) for v in noisy.log_alpha().values())

    norm = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    statistics = quick(*model(norm), ranks).model.net[1].running_mean
    found["statistics"] = statistics.tolist()

    quick(*model(Unused()), ranks)
    ended = quick(*model(), ranks, callbacks=[lambda end: rank == ranks - 1 and end.epoch == 2])
    found["ended after"] = len(ended.history)

    loader = DataLoader(
        torch.utils.data.TensorDataset(X, Y), batch_size=NUM_DATA // ranks, shuffle=True
    )
    lifted, guide = model()
    loaded = fit(lifted, loader, guide=guide, epochs=5, lr=0.05, device="cpu", seed=0,
                 compile=False, progress=False)  # fmt: skip
    found["loader"] = parameters(loaded)
    found["gradient"] = mean_gradient(ranks, rank)
    try:
        lifted, guide = model()
        with torch.no_grad():
            guide.location_parameters()[0].mul_(1e30)
        quick(lifted, guide, ranks)
    except FloatingPointError as error:
        found["error"] = str(error).partition("\n")[0]
    return found


def mean_gradient(ranks: int, rank: int) -> list[list[float]]:
    """Mean and standard error over draws of the noise, of the gradient that all ranks get."""
    lifted, guide = model(log_sigma2=-2.0)
    fabric = make_fabric("cpu", None, 1, "32-true")
    objective = fabric.setup_module(Objective(lifted, guide, TraceAnalyticKL_ELBO()))
    torch.manual_seed(1 + rank)
    part = slice(rank * NUM_DATA // ranks, (rank + 1) * NUM_DATA // ranks)
    weight, draws = torch.ones((), dtype=torch.float64), []
    for _ in range(DRAWS):
        objective.zero_grad()
        with local_parameters():
            fabric.backward(objective(weight, X[part], Y[part]).loss)
        draws.append(torch.cat([p.grad.flatten() for p in objective.parameters()]))
    values = torch.stack(draws)
    return [values.mean(0).tolist(), (values.std(0) / DRAWS**0.5).tolist()]


# --- data that come as no tensors -------------------------------------------------------------


class Points(Dataset[Any]):
    """Some of the data; remembers which were asked for."""

    def __init__(self, number: int) -> None:
        self.number, self.seen = number, list[int]()

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(int(index))
        return X[index], Y[index]


class Stream(IterableDataset[Any]):
    """Data points of a rank, a new order each epoch if it has random numbers."""

    def __init__(self, points: Any, generator: torch.Generator | None = None) -> None:
        self.points, self.generator = list(points), generator

    def __iter__(self) -> Iterator[Any]:
        places: Any = range(len(self.points))
        if self.generator is not None:
            places = torch.randperm(len(self.points), generator=self.generator).tolist()
        for place in places:
            yield X[self.points[place]], Y[self.points[place]]


class SizedStream(Stream):
    """Tells how many points all ranks together have."""

    def __len__(self) -> int:
        return 21


class OwnBatches(BatchSampler):
    """A user's own: what it puts together stays together."""


class OwnSampler(Sampler[int]):
    """A user's own order."""

    def __init__(self, random: Any) -> None:
        self.random = random

    def __len__(self) -> int:
        return 21

    def __iter__(self) -> Iterator[int]:
        return iter(self.random.permutation(21))


def read(data: Any, points: Points | None = None, num_data: int = 21, **settings: Any) -> Any:
    """Which points a rank trains on, epoch by epoch; or why it refuses to."""
    marks: list[int] = []
    torch.manual_seed(0)
    lifted = BayesianNetwork(nn.Linear(6, CLASSES), Categorical(), num_data)
    settings = {"epochs": 3, "seed": 0, "compile": False, "device": "cpu"} | settings
    seen = [] if points is None else points.seen

    def mark(end: Any) -> None:
        marks.append(len(seen))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            posterior = fit(lifted, data, progress=False, callbacks=[mark], **settings)
        except (TypeError, ValueError) as error:
            return {"error": str(error)}
    return {
        "epochs": [seen[a:b] for a, b in pairwise(marks)],
        "steps": [row["step"] for row in posterior.history],
        "history": [dict(row) | {"seconds": 0} for row in posterior.history],
        "parameters": parameters(posterior),
        "warnings": [text for w in caught if "train" in (text := str(w.message))],
    }


def draw(draws: list[float], end: Any) -> None:
    draws.append(float(torch.rand(())))


def readings(ranks: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def of(name: str, loader: Any, num_data: int = 21, **settings: Any) -> None:
        points = Points(21)
        found[name] = read(loader(points), points, num_data, **settings)

    for seed in (0, 1):
        of(f"Dataset, seed {seed}", lambda points: points, batch_size=5, seed=seed)
        of(f"loader, seed {seed}", lambda p: DataLoader(p, 5, shuffle=True), seed=seed)
    of("in order", lambda p: DataLoader(p, 5))
    of("batch sampler", lambda p: DataLoader(
        p, batch_sampler=BatchSampler(RandomSampler(p), 5, False)))  # fmt: skip
    of("own batches", lambda p: DataLoader(
        p, batch_sampler=OwnBatches(RandomSampler(p), 5, False)))  # fmt: skip
    of("subset", lambda p: DataLoader(p, 5, sampler=SubsetRandomSampler(range(11))), 11)
    of("numpy", lambda p: DataLoader(p, 5, sampler=OwnSampler(np.random)))
    own = np.random.default_rng(rank)
    of("own numbers", lambda p: DataLoader(p, 5, sampler=OwnSampler(own)))
    of("distributed", lambda p: DataLoader(p, 5, sampler=DistributedSampler(p, ranks, rank)))
    of("distributed otherwise", lambda p: DataLoader(
        p, 5, sampler=DistributedSampler(p, 4, rank)))  # fmt: skip

    part = range(rank, 21, ranks)
    found["stream"] = read(DataLoader(SizedStream(part), batch_size=4))
    found["stream of unknown length"] = read(DataLoader(Stream(part), batch_size=4))
    found["uneven stream"] = read(DataLoader(SizedStream(part), batch_size=10))
    found["same stream"] = read(DataLoader(Stream(range(21)), batch_size=4))
    shuffled = SizedStream(range(21), torch.Generator().manual_seed(rank))
    found["same stream, shuffled"] = read(DataLoader(shuffled, batch_size=4))

    for seed in (0, 1):
        found[f"draws, seed {seed}"] = draws = list[float]()
        quick(*model(), ranks, seed=seed, callbacks=[partial(draw, draws)])
    return found


def note_the_end(folder: Path) -> None:
    """Whether the process has left its group by the time that Python ends."""
    left = not torch.distributed.is_initialized()
    (folder / f"left-{os.environ.get('RANK', 0)}").write_text(str(left))


def main() -> None:
    folder = Path(sys.argv[1])
    atexit.register(note_the_end, folder)  # the first to be registered is the last to be called
    warnings.simplefilter("ignore")
    ranks = Ranks(make_fabric("cpu", None, 1, "32-true"))
    if "--data" in sys.argv:
        found = readings(ranks.count, ranks.rank)
    else:
        found = experiments(ranks.count, ranks.rank, "--brief" in sys.argv)
    (folder / f"{ranks.count}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
