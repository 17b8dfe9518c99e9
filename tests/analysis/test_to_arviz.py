import math
import warnings
from importlib.metadata import version

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils.data import DataLoader

from bayes_svdo import LogUniform
from bayes_svdo.analysis.to_arviz import import_arviz
from bayes_svdo.inference import AdditiveNoiseGuide, Posterior
from bayes_svdo.models import BayesianNetwork, Bernoulli, Categorical, Gaussian, dense

az = import_arviz()
NEW = int(version("arviz").split(".")[0]) >= 1
N, DRAWS = 40, 200
# ArviZ 0.23 and Matplotlib 3.11; ArviZ 1.x advises other pictures for classes.
quiet = pytest.mark.filterwarnings(
    "ignore:Passing a dict or None as alias_mapping",
    "ignore:Variables y in '.*' look",
)


def make(likelihood, sizes, prior=None, seed=0):
    """A posterior that fits its own data: weights have standard deviations of about 0.02."""
    torch.manual_seed(seed)
    model = BayesianNetwork(dense(sizes), likelihood, N, prior=prior)
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        for loc, log_sigma2 in zip(
            guide.location_parameters(), guide.sigma_parameters(), strict=True
        ):
            loc.copy_(0.5 * torch.randn_like(loc))
            log_sigma2.fill_(-8.0)
            loc[:, ::3] = 1e-3  # log alpha = 5.8: pruned
    posterior = Posterior(model, guide)
    x = torch.randn(N, sizes[0])
    output = posterior.output(x)
    if isinstance(likelihood, Gaussian):
        return posterior, x, output + 0.5 * torch.randn_like(output)
    return posterior, x, likelihood.distribution(output).sample()


@pytest.fixture
def regression():
    return make(Gaussian(0.5), (6, 4, 1))


@pytest.fixture
def classifier():
    return make(Categorical(), (6, 4, 3))


def dense_draws(data, posterior, index):
    """One draw of every weight, zero where it is not in the posterior group."""
    weights = {name: torch.zeros_like(loc) for name, loc in posterior.guide.median().items()}
    for name, weight in weights.items():
        unit, column = (data.constant_data[f"{name}_{axis}"].values for axis in ("unit", "input"))
        values = torch.tensor(data.posterior[name].values[0, index])
        weight[unit, column] = values
    return weights


def test_the_groups_are_those_of_the_schema(regression):
    posterior, x, y = regression
    data = posterior.to_arviz(x, y, DRAWS, seed=0)
    kind = xr.DataTree if NEW else az.InferenceData
    assert isinstance(data, kind)
    names = list(data.children) if NEW else data.groups()
    assert sorted(names) == [
        "constant_data",
        "log_likelihood",
        "observed_data",
        "posterior",
        "posterior_predictive",
    ]
    assert data.posterior.sizes["chain"] == 1
    assert data.posterior.sizes["draw"] == DRAWS
    assert data.posterior_predictive["y"].dims == ("chain", "draw", "data")
    assert data.observed_data["y"].dims == ("data",)
    assert data.log_likelihood["y"].dims == ("chain", "draw", "data")
    assert set(data.posterior.data_vars) == {"fc1.weight", "fc2.weight"}  # no biases
    assert data.posterior["fc1.weight"].dtype == np.float32
    assert data.posterior_predictive["y"].dtype == np.float32
    assert data.log_likelihood["y"].dtype == np.float64


def test_surviving_weights_are_labelled_by_unit_and_input(regression):
    posterior, _, _ = regression
    data = posterior.to_arviz(draws=DRAWS, seed=0)
    kept = posterior.means()["fc1.weight"] != 0
    assert data.posterior["fc1.weight"].dims == ("chain", "draw", "fc1.weight_weight")
    constant = data.constant_data
    found = np.stack([constant["fc1.weight_unit"], constant["fc1.weight_input"]], 1)
    np.testing.assert_array_equal(found, kept.nonzero().numpy())
    labels = [f"{unit}, {column}" for unit, column in kept.nonzero().tolist()]
    assert data.posterior["fc1.weight_weight"].values.tolist() == labels
    # A single unit goes without saying.
    last = (posterior.means()["fc2.weight"][0] != 0).nonzero().flatten().tolist()
    assert data.posterior["fc2.weight_weight"].values.tolist() == list(map(str, last))


def test_the_draws_are_of_q(regression):
    posterior, _, _ = regression
    draws = 4000
    data = posterior.to_arviz(draws=draws, surviving_only=False, seed=0)
    for name in posterior.guide.sites:
        loc, log_sigma2 = (value.detach().numpy() for value in posterior.guide.parameters_of(name))
        found, sigma = data.posterior[name].values[0], np.exp(0.5 * log_sigma2)
        # 5 standard errors of some 30 means and standard deviations.
        assert (np.abs(found.mean(0) - loc) < 5 * sigma / math.sqrt(draws)).all()
        assert (np.abs(found.std(0) / sigma - 1) < 5 / math.sqrt(2 * draws)).all()


@pytest.mark.parametrize("batch_size", [7, 1000])
def test_one_set_of_draws_serves_all_groups(regression, batch_size):
    posterior, x, y = regression
    data = posterior.to_arviz(x, y, 30, seed=0, batch_size=batch_size)
    residuals = []
    for index in range(30):
        mean = posterior._output(dense_draws(data, posterior, index), x)
        expected = dist.Normal(mean, 0.5).log_prob(y).sum(-1)
        found = data.log_likelihood["y"].values[0, index]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
        residuals.append(data.posterior_predictive["y"].values[0, index] - mean[:, 0].numpy())
    # Noise of standard deviation 0.5 around the same means; 5 standard errors.
    assert abs(np.std(residuals) / 0.5 - 1) < 5 / math.sqrt(2 * 30 * N)


def test_classes_are_drawn_and_scored_by_the_same_weights(classifier):
    posterior, x, y = classifier
    data = posterior.to_arviz(x, y, 300, seed=0)
    logits = torch.stack(
        [posterior._output(dense_draws(data, posterior, index), x) for index in range(300)]
    )
    expected = dist.Categorical(logits=logits).log_prob(y)
    np.testing.assert_allclose(data.log_likelihood["y"].values[0], expected, rtol=1e-4, atol=1e-5)
    drawn = data.posterior_predictive["y"].values[0]
    assert drawn.dtype == data.observed_data["y"].dtype == np.int32
    p = logits.softmax(-1).mean(0).numpy()
    frequencies = np.stack([(drawn == k).mean(0) for k in range(3)], -1)
    assert np.abs(frequencies - p).max() < 5 * 0.5 / math.sqrt(300)


def test_without_pruning_all_weights_take_part(regression):
    posterior, x, y = regression
    data = posterior.to_arviz(x, y, 5, surviving_only=False, seed=0)
    assert data.posterior["fc1.weight"].dims == (
        "chain",
        "draw",
        "fc1.weight_unit",
        "fc1.weight_input",
    )
    weights = {name: torch.tensor(data.posterior[name].values[0, 3]) for name in posterior.means()}
    expected = dist.Normal(posterior._output(weights, x), 0.5).log_prob(y).sum(-1)
    np.testing.assert_allclose(data.log_likelihood["y"].values[0, 3], expected, rtol=1e-5)
    kept = data.constant_data["fc1.weight.kept"].values
    np.testing.assert_array_equal(kept, posterior.means()["fc1.weight"] != 0)


def test_weights_are_the_same_with_and_without_data(regression):
    posterior, x, y = regression
    state = torch.get_rng_state()
    alone, both = posterior.to_arviz(draws=9, seed=3), posterior.to_arviz(x, y, 9, seed=3)
    other = posterior.to_arviz(x, y, 9, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    xr.testing.assert_equal(_dataset(alone.posterior), _dataset(both.posterior))
    assert not np.array_equal(both.posterior["fc1.weight"], other.posterior["fc1.weight"])


def test_relevances_are_constant_data(regression):
    posterior, x, _ = regression
    constant = posterior.to_arviz(x, draws=4).constant_data
    kept = posterior.means()["fc1.weight"] != 0
    log_alpha = posterior.log_alpha()["fc1.weight"][kept].numpy()
    np.testing.assert_allclose(constant["fc1.weight.log_alpha"], log_alpha, rtol=1e-6)
    np.testing.assert_allclose(constant["fc1.weight.snr"], np.exp(-0.5 * log_alpha), rtol=1e-5)
    assert constant["fc1.weight.kept"].values.all()
    assert constant["fc1.weight.log_alpha"].attrs["shape_of_weight"] == "(4, 6)"
    np.testing.assert_array_equal(constant["x"], x)


def test_attributes_say_what_the_draws_are(regression):
    posterior, _, _ = regression
    attributes = posterior.to_arviz(draws=4, threshold=2.5, seed=7).posterior.attrs
    assert attributes["threshold"] == 2.5
    assert attributes["seed"] == 7
    assert attributes["inference_library"] == "bayes_svdo"
    assert "variational" in attributes["approximation"]
    assert "no exact posterior" in attributes["approximation"]
    proper, _, _ = make(Gaussian(0.5), (6, 1), prior=dist.Normal(0.0, 1.0))
    assert "improper" not in proper.to_arviz(draws=4).attrs["approximation"]


def test_sites_can_be_chosen(regression):
    posterior, x, y = regression
    one = posterior.to_arviz(x, y, 20, sites="fc2.weight", seed=0)
    assert list(one.posterior.data_vars) == ["fc2.weight"]
    spread = one.log_likelihood["y"].values[0].std(0)
    assert (spread > 0).mean() > 0.5  # of the first layer; some units are off
    swapped = posterior.to_arviz(draws=4, sites=["fc2.weight", "fc1.weight"])
    assert list(swapped.posterior.data_vars) == ["fc1.weight", "fc2.weight"]


@pytest.mark.parametrize("sites", [None, "fc1.weight"])
def test_batches_change_nothing(regression, sites):
    posterior, x, y = regression
    first, second = (
        posterior.to_arviz(x, y, 9, sites=sites, seed=0, batch_size=size) for size in (1000, 7)
    )
    for group in ("log_likelihood", "posterior_predictive"):
        np.testing.assert_allclose(first[group]["y"], second[group]["y"], rtol=1e-4, atol=1e-4)


def test_a_site_without_weights_is_left_out(regression):
    posterior, x, _ = regression
    posterior.guide.location_parameters()[0].data.fill_(1e-6)
    data = posterior.to_arviz(x, draws=4)
    assert list(data.posterior.data_vars) == ["fc2.weight"]
    assert data.attrs["sites_without_weights"] == "fc1.weight"
    with pytest.raises(ValueError, match=r"no weight of fc1\.weight is left at threshold 3"):
        posterior.to_arviz(sites=["fc1.weight"])
    posterior.guide.prune_(3.0)
    with pytest.raises(
        ValueError, match=r"fc1\.weight is left at any threshold: .*\n.*only=False,"
    ):
        posterior.to_arviz(sites=["fc1.weight"])


def test_weights_pruned_for_good_are_zero_in_every_draw(regression):
    posterior, _, _ = regression
    posterior.guide.prune_(3.0)
    pruned = posterior.log_alpha()["fc1.weight"] == math.inf
    data = posterior.to_arviz(draws=5, surviving_only=False)
    drawn = data.posterior["fc1.weight"].values[0]
    assert (drawn[:, pruned] == 0).all()
    assert (drawn[:, ~pruned] != 0).all()
    assert (data.constant_data["fc1.weight.snr"].values[pruned] == 0).all()


def test_coordinates_are_the_users_own(regression):
    posterior, x, y = regression
    names = list("abcdef")
    coords = {"fc1.weight_input": names, "x_dim_1": names, "data": [f"p{n}" for n in range(N)]}
    data = posterior.to_arviz(x, y, 4, coords=coords)
    assert set(data.constant_data["fc1.weight_input"].values) <= set(names)
    assert data.posterior["fc1.weight_weight"].values[0] == "0, b"
    assert data.observed_data["data"].values[1] == "p1"
    full = posterior.to_arviz(draws=4, surviving_only=False, coords={"fc1.weight_input": names})
    assert full.posterior["fc1.weight_input"].values.tolist() == names


def test_coordinates_of_what_is_left_out_are_not_used(regression):
    posterior, x, y = regression
    coords = {"fc1.weight_input": list("abcdef"), "fc2.weight_input": list("klmn")}
    coords["y_dim_1"] = ["medv"]
    one = posterior.to_arviz(x, y, 4, sites="fc2.weight", coords=coords)
    assert set(one.constant_data["fc2.weight_input"].values) <= set("klmn")
    assert "fc1.weight_input" not in one.constant_data.coords
    posterior.guide.location_parameters()[0].data.fill_(1e-6)
    pruned = posterior.to_arviz(x, y, 4, coords=coords)
    assert list(pruned.posterior.data_vars) == ["fc2.weight"]
    with pytest.raises(ValueError, match=r'Did you mean "fc1\.weight_input"'):
        posterior.to_arviz(draws=4, coords={"fc1.weight_inputs": [1]})


def test_targets_of_several_dimensions_count_as_one_point():
    posterior, x, y = make(Gaussian(0.5), (6, 4, 2))
    data = posterior.to_arviz(x.double().float().numpy(), y.double().numpy(), 3)
    assert data.posterior_predictive["y"].shape == (1, 3, N, 2)
    assert data.log_likelihood["y"].shape == (1, 3, N)


def test_bernoulli_targets_are_whole_numbers():
    posterior, x, y = make(Bernoulli(), (6, 1))
    data = posterior.to_arviz(x, y, 50)
    assert set(np.unique(data.posterior_predictive["y"])) <= {0, 1}
    assert data.posterior_predictive["y"].dtype == data.observed_data["y"].dtype == np.int32


def test_hand_written_models_give_their_weights(hand_written):
    data = hand_written.to_arviz(draws=6, surviving_only=False)
    assert data.posterior["w"].dims == ("chain", "draw", "w_dim_0", "w_dim_1")
    with pytest.raises(TypeError, match="to_arviz needs a BayesianNetwork"):
        hand_written.to_arviz(torch.zeros(2, 4))


def written_by_hand(*names, shape=()):
    def model(x=None):
        for name in names:
            pyro.sample(name, LogUniform().expand(shape).to_event(len(shape)))

    guide = AdditiveNoiseGuide(model)
    guide()
    for index, loc in enumerate(guide.location_parameters()):
        loc.data.fill_(1.0 if index == 0 else 1e-9)
    return Posterior(model, guide)


@pytest.mark.parametrize("surviving_only", [True, False])
def test_scalars_have_no_dimension(surviving_only, tmp_path):
    posterior = written_by_hand("w", "v")
    data = posterior.to_arviz(draws=6, surviving_only=surviving_only)
    assert data.posterior["w"].dims == ("chain", "draw")
    assert list(data.posterior.data_vars) == (["w"] if surviving_only else ["w", "v"])
    assert data.constant_data["w.kept"].shape == ()
    assert "w" in az.summary(data, kind="stats").index
    data.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    _assert_same(az.from_netcdf(tmp_path / "posterior.nc", engine="h5netcdf"), data)


def test_slashes_become_dots(tmp_path):
    posterior = written_by_hand("net/w", shape=(3,))
    data = posterior.to_arviz(draws=6, coords={"net.w_dim_0": list("abc")}, sites="net/w")
    assert data.posterior["net.w"].dims == ("chain", "draw", "net.w_weight")
    assert data.posterior["net.w_weight"].values.tolist() == list("abc")
    data.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")
    _assert_same(az.from_netcdf(tmp_path / "posterior.nc", engine="h5netcdf"), data)
    with pytest.raises(
        ValueError, match=r'"net/w" and "net.w" would both be "net.w".*\n  Try anoth'
    ):
        written_by_hand("net/w", "net.w").to_arviz()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_of_half_precision_are_in_float32(regression, dtype, tmp_path):
    posterior, x, y = regression
    posterior.model.net.to(dtype)
    posterior.guide.to(dtype)
    data = posterior.to_arviz(x.to(dtype), y.to(dtype), 4)
    assert data.constant_data["x"].dtype == data.observed_data["y"].dtype == np.float32
    np.testing.assert_array_equal(data.constant_data["x"], x.to(dtype).float())
    np.testing.assert_array_equal(data.observed_data["y"], y[:, 0].to(dtype).float())
    data.to_netcdf(tmp_path / "posterior.nc", engine="h5netcdf")


def test_tables_are_data(regression):
    posterior, x, y = regression
    table = pd.DataFrame(x.numpy(), index=range(N, 0, -1))
    column = pd.DataFrame({"y": y[:, 0].numpy()})
    found, expected = (
        posterior.to_arviz(table, column, 3, seed=0),
        posterior.to_arviz(x, y, 3, seed=0),
    )
    np.testing.assert_allclose(found.log_likelihood["y"], expected.log_likelihood["y"], rtol=1e-5)
    np.testing.assert_array_equal(found.constant_data["x"], x)


@pytest.mark.parametrize("wrong", ["abc", DataLoader([1.0])], ids=type)
def test_what_holds_no_numbers_is_refused_by_name(regression, wrong):
    posterior, x, y = regression
    words = f"must be a tensor or an array, but is a {type(wrong).__name__}"
    with pytest.raises(TypeError, match=f"^x {words}"):
        posterior.to_arviz(wrong, y)
    with pytest.raises(TypeError, match=f"^y {words}"):
        posterior.to_arviz(x, wrong)


class Embedded(nn.Module):
    """Two inputs, and layers whose weights have other axes."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.conv = nn.Conv1d(3, 2, 3, padding=1)
        self.up = nn.ConvTranspose1d(2, 3, 1)

    def forward(self, tokens, offset):
        features = self.conv(self.embedding(tokens).transpose(1, 2))
        return self.up(features).mean(-1) + offset


def test_axes_are_named_after_what_they_are():
    torch.manual_seed(0)
    model = BayesianNetwork(Embedded(), Categorical(), N)
    posterior = Posterior(model, AdditiveNoiseGuide(model))
    x = torch.randint(5, (N, 4)), torch.zeros(N, 3)
    data = posterior.to_arviz(x, draws=4, surviving_only=False)
    axes = {name: value.dims[2:] for name, value in data.posterior.data_vars.items()}
    assert axes == {
        "embedding.weight": ("embedding.weight_token", "embedding.weight_feature"),
        "conv.weight": ("conv.weight_unit", "conv.weight_input", "conv.weight_kernel_0"),
        "up.weight": ("up.weight_input", "up.weight_unit", "up.weight_kernel_0"),
    }
    assert data.constant_data["x_0"].dims == ("data", "x_0_dim_1")
    assert data.constant_data["x_1"].shape == (N, 3)


# What ArviZ does with it.


@pytest.mark.parametrize("surviving_only", [True, False])
def test_summary_and_forest_name_every_weight(regression, surviving_only):
    posterior, x, y = regression
    data = posterior.to_arviz(x, y, DRAWS, surviving_only=surviving_only, seed=0)
    table = az.summary(data, kind="stats")
    number = sum(data.posterior[name].size for name in data.posterior.data_vars) // DRAWS
    assert len(table) == number
    label = "fc1.weight[0, 1]"
    mean = data.posterior["fc1.weight"].values.reshape(DRAWS, -1)[:, 0 if surviving_only else 1]
    assert float(table.loc[label, "mean"]) == pytest.approx(mean.mean(), abs=0.01)
    rows = _texts(az.plot_forest(data, var_names=["fc1.weight"]))
    # ArviZ 1.x has a column of labels for each dimension.
    assert any(("0, 1" if surviving_only else "fc1.weight") in row for row in rows)


@quiet
@pytest.mark.parametrize("likelihood", [Gaussian(0.5), Categorical()], ids=type)
def test_loo_and_posterior_predictive_checks(likelihood):
    # Linear: where all units are off, no weight changes the likelihood, and k of no tail is inf.
    posterior, x, y = make(likelihood, (6, 3))
    data = posterior.to_arviz(x, y, 500, seed=0)
    loo = az.loo(data, pointwise=True)
    elpd = float(loo.elpd if NEW else loo.elpd_loo)
    lppd = np.logaddexp.reduce(data.log_likelihood["y"].values[0], 0) - math.log(500)
    # Leaving a point out makes it less likely, by little: the weights are nearly certain.
    assert lppd.sum() - 20 < elpd < lppd.sum()
    assert np.asarray(loo.pareto_k).shape == (N,)
    (az.plot_ppc_dist if NEW else az.plot_ppc)(data)


@quiet
@pytest.mark.parametrize("flat", [False, True])
def test_loo_pit_takes_columns(flat):
    posterior, x, y = make(Gaussian(0.5), (6, 1))
    if flat:
        posterior.model.net.append(nn.Flatten(0))
    data = posterior.to_arviz(x, y[:, 0] if flat else y, 300, seed=0)
    pit = np.asarray(az.loo_pit(data)["y"] if NEW else az.loo_pit(data, y="y"))
    assert pit.shape == (N,)
    assert (pit.min(), pit.max()) != (0.0, 1.0)
    assert ((pit >= 0) & (pit <= 1)).all()


@quiet
def test_loo_takes_classes_that_are_all_but_certain():
    """In float32 most of their log likelihoods are equal, at which ArviZ 1.x raises."""
    posterior, x, y = make(Categorical(), (6, 3))
    dict(posterior.model.net.named_parameters())["fc1.bias"].data[:] = torch.tensor([15.0, 0, 0])
    data = posterior.to_arviz(x, torch.zeros_like(y), 500, seed=0)
    loo = az.loo(data, pointwise=True)
    assert -1e-2 < float(loo.elpd if NEW else loo.elpd_loo) < 0
    assert (np.asarray(loo.pareto_k) < 0.7).all()


@pytest.mark.parametrize("surviving_only", [True, False])
def test_netcdf_gives_back_what_was_written(classifier, surviving_only, tmp_path):
    posterior, x, y = classifier
    names = list("abcdef")
    data = posterior.to_arviz(
        x, y, 7, surviving_only=surviving_only, threshold=math.inf, coords={"x_dim_1": names}
    )
    path = tmp_path / "posterior.nc"
    data.to_netcdf(path, engine="h5netcdf")
    _assert_same(az.from_netcdf(path, engine="h5netcdf"), data)


@pytest.mark.filterwarnings("ignore:.*Zarr format 3")
@pytest.mark.filterwarnings("ignore:.*zarr v3")
@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_zarr_gives_back_what_was_written(regression, tmp_path):
    posterior, x, y = regression
    data = posterior.to_arviz(x, y, 7, seed=0)
    # InferenceData writes Zarr 2 only; as a DataTree both write what Zarr is installed.
    (data if NEW else data.to_datatree()).to_zarr(tmp_path / "posterior.zarr")
    back = xr.open_datatree(tmp_path / "posterior.zarr", engine="zarr")
    _assert_same(back if NEW else az.InferenceData.from_datatree(back), data)


def test_the_import_of_arviz_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert import_arviz() is az


# Refusals.


def test_a_result_that_is_too_large_is_refused_before_any_work(regression):
    posterior, x, y = regression
    with pytest.raises(MemoryError) as error:
        posterior.to_arviz(x, y, 10**9, surviving_only=False)
    message = str(error.value)
    assert message.startswith("1000000000 draws of 28 weights and their predictions for 40 data")
    assert "would take 592 GB, more than max_bytes = 2.15 GB" in message
    assert 'sites=["fc2.weight"], surviving_only=True, fewer data points or a larger' in message
    fitting = int(message.split("draws=")[1].split(",")[0])
    assert fitting == pytest.approx(2 * 2**30 / 592, rel=0.01)


def test_the_estimate_is_that_of_the_result(regression):
    posterior, x, y = regression
    for surviving_only in (True, False):
        data = posterior.to_arviz(x, y, 400, surviving_only=surviving_only)
        groups = data.children.values() if NEW else [data[name] for name in data.groups()]
        size = sum(_dataset(group).nbytes for group in groups)
        posterior.to_arviz(x, y, 400, surviving_only=surviving_only, max_bytes=size + 2000)
        with pytest.raises(MemoryError, match="Try draws=3"):
            posterior.to_arviz(
                x, y, 400, surviving_only=surviving_only, max_bytes=int(0.95 * size) - 10_000
            )


def test_one_draw_that_is_too_large_has_no_number_of_draws_to_try(hand_written):
    with pytest.raises(MemoryError, match=r"Try surviving_only=True or a larger max_bytes\.$"):
        hand_written.to_arviz(surviving_only=False, max_bytes=50)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"draws": 0}, "draws must be an integer of at least 1, but is 0"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"max_bytes": -1}, "max_bytes must be"),
        ({"seed": "a"}, "seed must be"),
        ({"threshold": math.nan}, "threshold must be a number"),
        ({"sites": "fc1.wait"}, 'unknown site "fc1.wait". Did you mean "fc1.weight"'),
        ({"sites": []}, "sites is empty"),
        ({"y": torch.zeros(N, 1)}, "y was given without x"),
        ({"coords": {"fc1.weight_inputs": [1]}}, 'Did you mean "fc1.weight_input"'),
        ({"coords": {"fc1.weight_input": [1]}}, "must hold 6 labels, but holds 1"),
        ({"coords": {"fc1.weight_input": [1] * 6}}, "must hold labels that differ"),
    ],
)
def test_bad_arguments_are_refused(regression, arguments, message):
    with pytest.raises(ValueError, match=message):
        regression[0].to_arviz(**arguments)


def test_data_that_do_not_fit_are_refused(regression, classifier):
    posterior, x, y = regression
    with pytest.raises(ValueError, match="x has 40 data points, but y has 39"):
        posterior.to_arviz(x, y[1:])
    with pytest.raises(ValueError, match=r"y must have shape \(N, 1\) .* shape \(40, 1\), but has"):
        posterior.to_arviz(x, y[:, 0])
    with pytest.raises(ValueError, match="the network cannot take x"):
        posterior.to_arviz(x[:, :2])
    with pytest.raises(ValueError, match="x holds NaN or inf"):
        posterior.to_arviz(x / 0)
    posterior.guide.location_parameters()[0].data *= 1e3
    with pytest.raises(ValueError, match="output is NaN or infinite"):
        posterior.to_arviz(x * 1e37)
    with pytest.raises(TypeError, match="y holds class labels"):
        classifier[0].to_arviz(classifier[1], classifier[2] + 0.5)


def test_something_else_is_no_posterior():
    from bayes_svdo.analysis.to_arviz import to_arviz

    with pytest.raises(TypeError, match="to_arviz needs a Posterior"):
        to_arviz(LogUniform())


def _dataset(group):
    return group.to_dataset() if NEW else group


def _texts(plot):
    """Labels of a forest's rows."""
    figure = plot.get_viz("figure") if NEW else plot[0].figure
    figure.canvas.draw()
    return [text.get_text() for ax in figure.axes for text in [*ax.get_yticklabels(), *ax.texts]]


def _assert_same(found, expected):
    names = list(expected.children) if NEW else expected.groups()
    assert sorted(list(found.children) if NEW else found.groups()) == sorted(names)
    for name in names:
        xr.testing.assert_identical(_dataset(found[name]), _dataset(expected[name]))
    assert dict(found.attrs) == dict(expected.attrs)
