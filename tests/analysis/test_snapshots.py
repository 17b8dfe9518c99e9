"""Snapshots keep what was there when the epoch ended, and no more than they may."""

import pytest
import torch

from bayes_svdo.analysis import Snapshot, Snapshots
from bayes_svdo.inference import AdditiveNoiseGuide, EpochEnd, Posterior, fit
from bayes_svdo.models import BayesianNetwork, Categorical, dense

BYTES = 4 * 5 * 6  # of one snapshot of fc1


def make_model(num_data=40):
    torch.manual_seed(0)
    return BayesianNetwork(dense((5, 6, 3)), Categorical(), num_data)


@pytest.fixture
def posterior():
    model = make_model()
    guide = AdditiveNoiseGuide(model)
    with torch.no_grad():
        for log_sigma2 in guide.sigma_parameters():
            log_sigma2.copy_(torch.linspace(-12, 6, log_sigma2.numel()).view_as(log_sigma2))
    return Posterior(model, guide)


def end(posterior, epoch, **row):
    return EpochEnd(epoch, {"epoch": epoch, "compression": 2.0, **row}, posterior)


def test_fit_fills_them_with_pruned_means_and_rows_of_the_history():
    torch.manual_seed(0)
    x, y = torch.randn(40, 5), torch.arange(40) % 3
    snapshots = Snapshots()
    posterior = fit(
        make_model(),
        (x, y),
        validation=(x, y),
        epochs=4,
        batch_size=10,
        lr=0.05,
        kl_warmup=(0.0, 0.5),
        prune_while_training=True,
        threshold=0.0,
        callbacks=[snapshots],
        seed=0,
        progress=False,
    )
    assert [kept.epoch for kept in snapshots] == [1, 2, 3, 4]
    assert [kept.row for kept in snapshots] == list(posterior.history)
    assert snapshots[-1].site == "fc1.weight"
    assert snapshots[-1].compression == posterior.history[-1]["compression"]
    assert snapshots[-1].metric == (
        "validation_accuracy",
        posterior.history[-1]["validation_accuracy"],
    )
    torch.testing.assert_close(
        snapshots[-1].weights, posterior.means()["fc1.weight"], rtol=0, atol=0
    )
    assert (snapshots[-1].weights == 0).any()
    assert not torch.equal(snapshots[0].weights, snapshots[1].weights)


def test_weights_are_zero_where_pruned_and_only_there(posterior):
    snapshots = Snapshots("fc2.weight")
    snapshots(end(posterior, 1))
    pruned = posterior.log_alpha()["fc2.weight"] >= posterior.threshold
    assert pruned.any()
    assert not pruned.all()
    assert torch.equal(snapshots[0].weights == 0, pruned)


@pytest.mark.parametrize(
    ("every", "epochs"), [(1, list(range(1, 8))), (3, [1, 3, 6]), (2, [1, 2, 4, 6]), (10, [1])]
)
def test_the_first_epoch_and_multiples_of_every_are_kept(posterior, every, epochs):
    snapshots = Snapshots(every=every)
    for epoch in range(1, 8):
        assert snapshots(end(posterior, epoch)) is None  # True would end training
    assert [kept.epoch for kept in snapshots] == epochs
    assert len(snapshots) == len(epochs)


def test_what_is_kept_does_not_change_with_the_posterior(posterior):
    snapshots = Snapshots()
    row = {"epoch": 1, "compression": 2.0}
    snapshots(EpochEnd(1, row, posterior))
    before = snapshots[0].weights.clone()
    row["compression"] = 99.0
    with torch.no_grad():
        for loc in posterior.guide.location_parameters():
            loc.add_(1.0)
    assert torch.equal(snapshots[0].weights, before)
    assert snapshots[0].compression == 2.0


def test_weights_of_any_dtype_are_kept_as_float32_on_the_cpu(posterior):
    posterior.guide.double()
    posterior.model.double()
    snapshots = Snapshots()
    snapshots(end(posterior, 1))
    assert snapshots[0].weights.dtype == torch.float32
    assert snapshots[0].weights.device.type == "cpu"


@pytest.mark.parametrize("room", [3, 4, 7])
def test_memory_is_bounded_and_the_whole_run_covered(posterior, room):
    snapshots = Snapshots(max_bytes=room * BYTES)
    for epoch in range(1, 101):
        snapshots(end(posterior, epoch))
        assert sum(kept.weights.nbytes for kept in snapshots) <= room * BYTES
    epochs = [kept.epoch for kept in snapshots]
    assert epochs[0] == 1
    assert epochs[1:] == list(range(snapshots.every, 101, snapshots.every))
    twice_as_many = 1 + 100 // (snapshots.every // 2)
    assert twice_as_many > room  # thinned no further than it must be


def test_two_snapshots_are_kept_whatever_their_size(posterior):
    snapshots = Snapshots(max_bytes=1)
    for epoch in range(1, 21):
        snapshots(end(posterior, epoch))
    assert [kept.epoch for kept in snapshots] == [1, 16]


@pytest.mark.parametrize(
    ("row", "metric"),
    [
        ({"accuracy": 0.5, "validation_accuracy": 0.75}, ("validation_accuracy", 0.75)),
        ({"accuracy": 0.5}, ("accuracy", 0.5)),
        ({"rmse": 0.5, "validation_rmse": 0.75}, ("validation_rmse", 0.75)),
        ({}, None),
    ],
)
def test_the_metric_is_that_of_validation_data_if_there_are_any(row, metric):
    assert Snapshot("w", 1, torch.zeros(2, 2), row).metric == metric


def test_an_unknown_site_is_named_with_the_closest(posterior):
    with pytest.raises(ValueError, match=r'unknown site "fc1.wieght".*Did you mean "fc1.weight"'):
        Snapshots("fc1.wieght")(end(posterior, 1))


def test_snapshots_of_two_runs_are_not_mixed(posterior):
    snapshots = Snapshots()
    snapshots(end(posterior, 3))
    with pytest.raises(ValueError, match=r"epoch 1 follows epoch 3.*another run(.|\n)*Try a new"):
        snapshots(end(posterior, 1))


@pytest.mark.parametrize("name", ["every", "max_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_settings_must_be_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, but is"):
        Snapshots(**{name: value})


def test_they_say_what_they_hold(posterior):
    snapshots = Snapshots("fc1.weight", every=2)
    for epoch in (1, 2, 3):
        snapshots(end(posterior, epoch))
    assert repr(snapshots) == "Snapshots(site='fc1.weight', every=2, epochs=[1, 2])"
