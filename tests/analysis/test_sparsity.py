"""How many weights are left, layer by layer."""

from __future__ import annotations

import math

import pytest
import torch

from bayes_svdo.analysis.sparsity import sparsity_table

INF = math.inf
# At threshold 3: fc1 keeps 3 of 6, fc2 keeps 1 of 4.
LOG_ALPHA = {
    "fc1.weight": torch.tensor([[-5.0, 2.9, 3.0], [7.0, INF, 0.0]]),
    "fc2.weight": torch.tensor([[3.5, INF], [INF, -1.0]]),
}


def test_numbers_are_those_counted_by_hand() -> None:
    table = sparsity_table(LOG_ALPHA, 3.0, num_biases=4)
    assert [layer.name for layer in table] == ["fc1.weight", "fc2.weight"]
    assert [layer.shape for layer in table] == [(2, 3), (2, 2)]
    assert [layer.weights for layer in table] == [6, 4]
    assert [layer.nonzero for layer in table] == [3, 1]
    assert [layer.percent for layer in table] == [50.0, 75.0]
    assert (table.weights, table.nonzero, table.percent) == (10, 4, 60.0)
    assert table.compression == 10 / 4
    assert table.compression_with_biases == (10 + 4) / (4 + 4)
    assert table.threshold == 3.0


@pytest.mark.parametrize(("threshold", "nonzero"), [(-INF, 0), (3.0, 4), (3.6, 6), (INF, 7)])
def test_a_weight_is_pruned_at_its_threshold_and_above(threshold: float, nonzero: int) -> None:
    """3 of the 10 are pruned for good."""
    assert sparsity_table(LOG_ALPHA, threshold).nonzero == nonzero


def test_nothing_left_is_an_infinite_compression() -> None:
    table = sparsity_table(LOG_ALPHA, -INF)
    assert table.compression == INF
    assert table.compression_with_biases == INF
    assert table.percent == 100.0
    assert sparsity_table(LOG_ALPHA, -INF, num_biases=2).compression_with_biases == 12 / 2
    assert "no weight is left" in str(table)
    assert "infx" not in str(table)
    assert "6.0x counting 2 biases" in str(sparsity_table(LOG_ALPHA, -INF, num_biases=2))


def test_weights_without_a_prior_are_no_biases() -> None:
    table = sparsity_table(LOG_ALPHA, 3.0, num_biases=4, num_dense=6)
    assert table.compression == 10 / 4
    assert table.compression_with_biases == 20 / 14
    words = " ".join(str(table).split())
    assert "(1.4x counting 4 biases and 6 weights without a prior)" in words
    words = " ".join(str(sparsity_table(LOG_ALPHA, 3.0, num_dense=6)).split())
    assert "(1.6x counting 6 weights without a prior)" in words


def test_layers_are_found_by_number_and_by_name() -> None:
    table = sparsity_table(LOG_ALPHA, 3.0)
    assert len(table) == 2
    assert table[1] is table["fc2.weight"]
    with pytest.raises(KeyError, match=r'no layer "fc3.weight"; there are: fc1.weight, fc2'):
        table["fc3.weight"]


def test_quantiles_are_values_of_the_layer() -> None:
    log_alpha = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    (layer,) = sparsity_table({"w": log_alpha}, 3.0)
    assert layer.log_alpha == (5.0, 50.0, 95.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype_is_counted(dtype: torch.dtype) -> None:
    log_alpha = {name: value.to(dtype) for name, value in LOG_ALPHA.items()}
    table = sparsity_table(log_alpha, 3.0)
    assert table.nonzero == 4
    assert table["fc2.weight"].log_alpha[2] == INF


def test_layers_larger_than_torch_quantile_takes_are_no_trouble() -> None:
    log_alpha = torch.zeros(2**24 + 2, dtype=torch.float16)  # torch.quantile: at most 2^24
    log_alpha[-1] = 9.0
    table = sparsity_table({"w": log_alpha}, 3.0)
    assert table.nonzero == 2**24 + 1
    assert table[0].log_alpha == (0.0, 0.0, 0.0)


def test_a_single_weight_is_a_layer() -> None:
    assert sparsity_table({"slope": torch.tensor(1.5)}, 3.0)[0].log_alpha == (1.5, 1.5, 1.5)


def test_table_as_text_shows_every_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # no colour codes in a string
    text = str(sparsity_table(LOG_ALPHA, 3.0, num_biases=4))
    for shown in (
        "fc1.weight",
        "2x3",
        "75.0 %",
        "60.0 %",
        "2.5x",
        "1.8x",
        "4 biases",
        "log α >= 3",
    ):
        assert shown in text
    assert "\x1b" not in text


def test_table_as_plain_numbers() -> None:
    numbers = sparsity_table(LOG_ALPHA, 3.0, num_biases=4).to_dict()
    assert numbers["nonzero"] == 4
    assert numbers["compression"] == 2.5
    assert numbers["layers"]["fc1.weight"]["log_alpha"]["0.05"] == -5.0  # type: ignore[index]


def test_tables_of_the_same_numbers_are_equal() -> None:
    assert sparsity_table(LOG_ALPHA, 3.0) == sparsity_table(LOG_ALPHA, 3.0)
    assert sparsity_table(LOG_ALPHA, 3.0) != sparsity_table(LOG_ALPHA, 4.0)


@pytest.mark.cuda
def test_weights_on_a_gpu_are_counted_there() -> None:
    there = {name: value.cuda() for name, value in LOG_ALPHA.items()}
    assert sparsity_table(there, 3.0) == sparsity_table(LOG_ALPHA, 3.0)
