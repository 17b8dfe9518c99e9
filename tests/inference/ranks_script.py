"""Started once per rank by test_devices.py: fits, and writes what each rank found.

python ranks_script.py FOLDER [--brief]
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
        kl_warmup=(0.0, 0.1), callbacks=[lambda end: draws.append(float(torch.rand(())))],
    )  # fmt: skip
    found["noisy"], found["draws"] = parameters(noisy), draws
    found["pruned"] = sum(int((v == torch.inf).sum()) for v in noisy.log_alpha().values())

    norm = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES))
    statistics = quick(*model(norm), ranks).model.net[1].running_mean
    found["statistics"] = statistics.tolist()

    quick(*model(Unused()), ranks)
    ended = quick(*model(), ranks, callbacks=[lambda end: rank == ranks - 1 and end.epoch == 2])
    found["ended after"] = len(ended.history)

    loader = torch.utils.data.DataLoader(
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


def main() -> None:
    folder = Path(sys.argv[1])
    warnings.simplefilter("ignore")
    ranks = Ranks(make_fabric("cpu", None, 1, "32-true"))
    found = experiments(ranks.count, ranks.rank, "--brief" in sys.argv)
    (folder / f"{ranks.count}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
