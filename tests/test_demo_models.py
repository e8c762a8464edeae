"""The demo's networks: shapes for any input, and a rate at which they learn."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from fastclip.bench.runner import torch_threads
from fastclip.demo.models import BatchNormCNN, CharRNN, DigitsCNN, FourConvCNN, SimpleNet

IMAGE_NETWORKS = {
    DigitsCNN: ((1, 8, 8), 4),
    FourConvCNN: ((3, 32, 32), 4),
    BatchNormCNN: ((3, 32, 32), 8),
    SimpleNet: ((1, 28, 28), 1),
}
"""Network -> the shape that it is made for, and the shortest side that it takes."""


@pytest.fixture(autouse=True)
def _seeded_on_one_thread():
    torch.manual_seed(0)
    with torch_threads(1):
        yield


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
def test_made_without_arguments_it_takes_the_images_it_is_made_for(network):
    shape, _ = IMAGE_NETWORKS[network]
    assert network()(torch.rand(2, *shape)).shape == (2, 10)


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (1, 17, 30), (4, 65, 9)])
def test_sizes_are_derived_from_the_images(network, shape):
    assert network(shape, 7)(torch.rand(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
def test_the_smallest_image_works_and_a_smaller_one_is_refused(network):
    _, side = IMAGE_NETWORKS[network]
    assert network((1, side, side), 3)(torch.rand(2, 1, side, side)).shape == (2, 3)
    if side > 1:
        with pytest.raises(ValueError, match=rf"{network.__name__}: .* expected at least {side} x {side}"):
            network((1, side, side - 1), 3)


@pytest.mark.parametrize("network", IMAGE_NETWORKS)
def test_it_learns_a_small_batch_by_heart(network):
    model, images, labels = network((1, 8, 8), 4), torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    assert torch.equal(model(images).argmax(dim=1), labels)


def test_batch_normalisation_is_in_the_network_that_is_named_by_it():
    def has_normalisation(network):
        return any(isinstance(module, torch.nn.BatchNorm2d) for module in network().modules())

    assert [has_normalisation(network) for network in IMAGE_NETWORKS] == [False, False, True, False]


def test_reading_on_in_parts_is_reading_at_once():
    model, characters = CharRNN(9), torch.randint(9, (2, 12))
    at_once = model(characters)
    first, state = model.read_on(characters[:, :5], None)
    second, state = model.read_on(characters[:, 5:], state)
    assert at_once.shape == (2, 12, 9)
    assert state.shape == (2, 2, 128)
    torch.testing.assert_close(torch.cat([first, second], dim=1), at_once)


def test_the_recurrent_layers_are_two_and_saturate():
    rnn = CharRNN(9).rnn
    assert (rnn.num_layers, rnn.nonlinearity) == (2, "tanh")
