"""Convolutional networks: images in, logits out."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

_SIDE = 28


def lenet_5_caffe(in_features: int = 784, num_classes: int = 10) -> nn.Sequential:
    """LeNet-5 as Caffe has it: two convolutions with pooling between, then 800-500-classes.

    20 and 50 filters of 5x5, without padding, each followed by max-pooling of 2x2 and no ReLU;
    430,500 weights for ten classes. As in Molchanov, Ashukha & Vetrov (2017), sec. 5.3,
    https://arxiv.org/abs/1701.05369. He-initialised.

    Args:
        in_features: Numbers in one image: 784, one channel of 28x28.
        num_classes: Number of outputs.

    Returns:
        A module from inputs of shape ``(M, ...)`` with 784 numbers each to ``(M, num_classes)``.
        Its attribute ``spec`` holds the arguments of :func:`~bayes_svdo.models.build` that build it
        again.

    Raises:
        ValueError: The images are of another size.
    """
    if in_features != _SIDE**2:
        raise ValueError(
            f"LeNet-5-Caffe takes images of one channel and {_SIDE}x{_SIDE} pixels, in_features="
            f"{_SIDE**2}, but in_features is {in_features}."
        )
    net = nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            image=nn.Unflatten(1, (1, _SIDE, _SIDE)),
            conv1=nn.Conv2d(1, 20, 5),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(20, 50, 5),
            pool2=nn.MaxPool2d(2),
            features=nn.Flatten(),
            fc1=nn.Linear(800, 500),
            relu=nn.ReLU(),
            fc2=nn.Linear(500, num_classes),
        )
    )
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    spec = {"name": "lenet-5-caffe", "in_features": in_features, "out_features": num_classes}
    net.spec = spec  # type: ignore[assignment]
    return net
