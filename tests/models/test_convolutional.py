"""Convolutional networks: their shapes and sizes are those of the papers."""

import pytest
import torch

from bayes_svdo import BayesianNetwork
from bayes_svdo.models import Categorical, build, lenet_5_caffe


def test_lenet_5_has_the_weights_of_the_paper():
    net = lenet_5_caffe()
    model = BayesianNetwork(net, Categorical(), num_data=10)
    shapes = {name: tuple(weight.shape) for name, weight in model.initial_weights().items()}
    assert shapes == {
        "conv1.weight": (20, 1, 5, 5), "conv2.weight": (50, 20, 5, 5),
        "fc1.weight": (500, 800), "fc2.weight": (10, 500),
    }  # fmt: skip
    assert sum(weight.numel() for weight in model.initial_weights().values()) == 430_500
    assert all((p == 0).all() for name, p in net.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("shape", [(784,), (28, 28), (1, 28, 28)])
def test_images_come_in_any_shape(shape):
    x = torch.rand(3, *shape)
    net = lenet_5_caffe(num_classes=7)
    assert net(x).shape == (3, 7)
    torch.testing.assert_close(net(x), net(x.reshape(3, 1, 28, 28)))


def test_activations_keep_their_scale():
    torch.manual_seed(0)
    output = lenet_5_caffe()(torch.rand(500, 784))
    assert 0.1 < output.std() < 10


def test_it_is_known_by_name():
    net = build("lenet-5-caffe", 784, 10)
    assert net.spec == {"name": "lenet-5-caffe", "in_features": 784, "out_features": 10}
    assert [name for name, _ in net.named_children()][2:4] == ["conv1", "pool1"]


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match="28x28 pixels, in_features=784, but in_features is 64"):
        build("lenet-5-caffe", 64, 10)
