import math

import pytest
import torch
from torch import nn

from fastclip.tuner import INIT_NAMES, initialise
from fastclip.tuner.training.regularisation import penalty, set_dropout


def deep(width=64, depth=6):
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 4))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_default_leaves_the_model_alone():
    model = deep()
    before = [p.clone() for p in model.parameters()]
    initialise(model, "default")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("init", "std"),
    [
        ("xavier_uniform", math.sqrt(2 / (200 + 300))),
        ("xavier_normal", math.sqrt(2 / (200 + 300))),
        ("kaiming_uniform", math.sqrt(2 / 200)),
        ("kaiming_normal", math.sqrt(2 / 200)),
    ],
)
def test_gain_scales_the_deviation_that_the_method_defines(init, std):
    layer = nn.Linear(200, 300)
    initialise(nn.Sequential(layer), init, gain=3.0)
    # 60000 values: the sample deviation is within 5 of its own deviations, 1 / sqrt(2 n), times 1.5.
    assert layer.weight.std().item() == pytest.approx(3.0 * std, rel=7.5 / math.sqrt(2 * 60000))
    assert not layer.bias.any()


def test_orthogonal_rows_have_the_gain_as_length():
    layer = nn.Linear(32, 16)
    initialise(nn.Sequential(layer), "orthogonal", gain=2.0)
    torch.testing.assert_close(layer.weight @ layer.weight.T, 4.0 * torch.eye(16))


def test_lsuv_gives_every_layer_the_same_output_deviation():
    model, batch = deep(), torch.randn(256, 64)
    initialise(model, "lsuv", gain=1.5, batch=batch)
    x = batch
    for layer in model:
        x = layer(x)
        if isinstance(layer, nn.Linear):
            assert x.std().item() == pytest.approx(1.5, rel=1e-4)


def test_lsuv_needs_a_batch():
    with pytest.raises(ValueError, match="init='lsuv' needs batch"):
        initialise(deep(), "lsuv")


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'glorot' is unknown; expected one of default, xavier_uniform"):
        initialise(deep(), "glorot")


@pytest.mark.parametrize("init", [name for name in INIT_NAMES if name != "default"])
def test_embeddings_and_normalisation_are_left_alone(init):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.norm = nn.LayerNorm((3, 8))
            self.rnn = nn.RNN(8, 8, batch_first=True)
            self.conv = nn.Conv1d(3, 4, 3)
            self.batch_norm = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.batch_norm(self.conv(self.rnn(self.norm(self.embedding(x)))[0]))

    model = Net()
    kept = [p.clone() for m in (model.embedding, model.norm, model.batch_norm) for p in m.parameters()]
    changed = [model.rnn.weight_hh_l0.clone(), model.conv.weight.clone()]
    initialise(model, init, batch=torch.randint(10, (5, 3)))
    after = [p for m in (model.embedding, model.norm, model.batch_norm) for p in m.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert not torch.equal(changed[0], model.rnn.weight_hh_l0)
    assert not torch.equal(changed[1], model.conv.weight)
    assert not model.rnn.bias_hh_l0.any()


def test_penalty_is_over_weights_and_not_biases():
    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, -4.0]]))
        layer.bias.fill_(100.0)
    assert penalty(layer, l1=0.5, l2=0.1).item() == pytest.approx(0.5 * 7 + 0.1 * 25)
    assert penalty(layer) is None


def test_dropout_rate_reaches_every_kind_of_layer():
    model = nn.ModuleList([nn.Dropout(0.1), nn.Dropout2d(0.2), nn.LSTM(4, 4, num_layers=2), nn.GRU(4, 4)])
    set_dropout(model, 0.4)
    assert [model[0].p, model[1].p, model[2].dropout, model[3].dropout] == [0.4, 0.4, 0.4, 0.0]
    with pytest.raises(ValueError, match=r"rate=1\.0"):
        set_dropout(model, 1.0)


def test_default_with_a_gain_is_refused():
    with pytest.raises(ValueError, match=r"gain=5\.0 with init='default', which leaves the weights alone"):
        initialise(deep(), "default", gain=5.0)


def test_lsuv_calls_a_model_of_keywords():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, *, left, right):
            return self.layer(torch.cat((left, right), dim=1))

    model, batch = Net(), {"left": torch.randn(256, 4), "right": torch.randn(256, 4)}
    initialise(model, "lsuv", batch=batch)
    assert model(**batch).std().item() == pytest.approx(1.0, rel=1e-4)


def test_dropout_reaches_attention_and_says_where_there_is_none():
    model = nn.TransformerEncoderLayer(8, 2, dropout=0.1, batch_first=True)
    assert set_dropout(model, 0.4) == 4
    assert (model.self_attn.dropout, model.dropout.p) == (0.4, 0.4)
    assert set_dropout(nn.Linear(2, 2), 0.4) == 0
