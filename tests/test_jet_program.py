"""Jets of whole programs: modules, and what a program does around its operators.

The derivatives of the loss equal double backward in float64 to a relative error of 1e-9.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_dist.direction import Direction, GroupDirection
from gen_dist.jets import Jet, JetMode, UnsupportedOperation, derivatives
from gen_dist.line import Line, MicroBatch, Slice, exact
from gen_dist.parallel import Layout

TOLERANCE = 1e-9


def derivatives_along(d: Sequence[Tensor], model: nn.Module, loss: Callable[[], Tensor]) -> tuple[float, float, float]:
    """Return `(L, g.d, d'Hd)` by jets. `d` has one tensor for each parameter of the model that requires a gradient."""
    direction = Direction([GroupDirection(0, 1.0, trained(model), [*d])])
    line = Line(Layout(model), direction, Slice([MicroBatch(model, closure=loss)]))
    value, numerator, denominator = exact(line).numbers[0].tolist()
    return value, numerator, denominator


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_exact(
    model: nn.Module, loss: Callable[[], Tensor], scale: float = 1.0, same_loss: Callable[[], Tensor] | None = None
) -> None:
    """Compare with double backward along a random direction, through `same_loss` where autograd needs another form."""
    d = [scale * torch.randn_like(p) for p in trained(model)]
    seen = derivatives_along(d, model, loss)
    assert seen == pytest.approx(reference.derivatives(same_loss or loss, trained(model), d), rel=TOLERANCE)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **arguments: Any) -> None:
        super().__init__()
        self.rnn = kind(5, 4, num_layers=2, batch_first=True, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


class Started(nn.Module):
    """Learns the state in which a recurrent layer starts; its weights are functions of parameters."""

    def __init__(self, kind: type[nn.RNNBase], states: int) -> None:
        super().__init__()
        self.rnn, self.start = kind(5, 4), nn.Parameter(torch.randn(states, 1, 3, 4))
        for name in ("weight_hh_l0", "weight_ih_l0"):
            nn.utils.parametrize.register_parametrization(self.rnn, name, Cubed())

    def forward(self, x: Tensor) -> Tensor:
        start = self.start[0] if len(self.start) == 1 else tuple(self.start)
        output, last = self.rnn(x, start)
        return output * sum(last)


class Cubed(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w**3 + w


class Inverse(nn.Module):
    """An operator without a rule."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.inv(x @ x.t() + torch.eye(len(x))) @ x


class WritesItsBuffer(nn.Module):
    """Writes a value that depends on the weights into a buffer, and reads it in the same forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.register_buffer("cache", torch.zeros(3, 5))

    def forward(self, x: Tensor) -> Tensor:
        self.cache = torch.zeros_like(self.cache)
        self.cache[:, 1:4] = self.linear(x)[:, 0, 1:4]
        return self.cache * x[:, 0]


class SelfAttention(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class First(nn.Module):
    def forward(self, x: tuple[Tensor, ...]) -> Tensor:
        return x[0]


class Twice(nn.Module):
    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(x, x)


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.2),
        nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv net": (conv_net, (5, 1, 8, 8)),
    "MultiheadAttention": (SelfAttention, (3, 4, 8)),
    "MultiheadAttention, key bias": (lambda: SelfAttention(add_bias_kv=True, dropout=0.1), (3, 4, 8)),
    "TransformerEncoderLayer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (3, 4, 8)),
    "TransformerEncoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu"), 2),
        (3, 4, 8),
    ),
    "TransformerDecoderLayer": (
        lambda: Twice(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True, norm_first=True)),
        (3, 4, 8),
    ),
    "LSTM": (lambda: Recurrent(nn.LSTM), (3, 4, 5)),
    "LSTM bidirectional": (lambda: Recurrent(nn.LSTM, bidirectional=True, dropout=0.2), (3, 4, 5)),
    "LSTM projected": (lambda: Recurrent(nn.LSTM, proj_size=2), (3, 4, 5)),
    "LSTM without bias": (lambda: Recurrent(nn.LSTM, bias=False), (3, 4, 5)),
    "LSTM unbatched": (lambda: nn.Sequential(nn.LSTM(5, 4), First()), (3, 5)),
    "LSTM started": (lambda: Started(nn.LSTM, 2), (2, 3, 5)),
    "GRU": (lambda: Recurrent(nn.GRU), (3, 4, 5)),
    "GRU bidirectional": (lambda: Recurrent(nn.GRU, bidirectional=True, dropout=0.2), (3, 4, 5)),
    "GRU without bias": (lambda: Recurrent(nn.GRU, bias=False), (3, 4, 5)),
    "GRU started": (lambda: Started(nn.GRU, 1), (2, 3, 5)),
    "RNN": (lambda: Recurrent(nn.RNN), (3, 4, 5)),
    "GRUCell": (lambda: nn.Sequential(nn.GRUCell(5, 4), nn.LSTMCell(4, 3), First()), (3, 5)),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4)), (3, 5)),
    "writes its buffer": (WritesItsBuffer, (3, 2, 5)),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:There is a performance drawback")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_derivatives_of_a_module_equal_double_backward(name: str, training: bool) -> None:
    make, shape = MODULES[name]
    x = torch.randn(shape)
    model = make()
    model(x)  # initialises lazy modules and running statistics
    model.train(training)
    target = torch.randn_like(model(x))
    d = [0.1 * torch.randn_like(p) for p in trained(model)]
    buffers = {key: value.clone() for key, value in model.named_buffers()}

    def loss() -> Tensor:
        return F.mse_loss(model(x), target)

    torch.manual_seed(7)
    random = torch.get_rng_state()
    seen = derivatives_along(d, model, loss)

    assert torch.equal(torch.get_rng_state(), random), "the random state must be restored"
    assert all(torch.equal(value, buffers[key]) for key, value in model.named_buffers()), "buffers must be restored"
    # the plain forward pass draws the same dropout masks
    assert seen == pytest.approx(reference.derivatives(loss, trained(model), d), rel=TOLERANCE)


@pytest.mark.usefixtures("float64")
def test_weights_that_the_loss_uses_outside_of_the_model_move_too() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    assert_exact(model, lambda: model(x).square().mean() + sum(p.pow(4).sum() for p in model.parameters()))


@pytest.mark.usefixtures("float64")
def test_weight_norm_equals_double_backward_of_its_formula() -> None:
    """Autograd's second derivative of the fused operator misses a term (torch 2.13); that of the formula does not."""
    model, x = nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), torch.randn(3, 5)
    g, v = model.parametrizations.weight.original0, model.parametrizations.weight.original1

    def formula() -> Tensor:
        return F.linear(x, v * (g / v.norm(dim=1, keepdim=True)), model.bias).square().mean()

    assert_exact(model, lambda: model(x).square().mean(), scale=0.1, same_loss=formula)


class StopsGradients(nn.Module):
    """Uses everything that stops a gradient, and `enable_grad`, which does not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

    @torch.no_grad()
    def scale(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            through = self.a(x)
        return self.b(x) + through.detach()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.a(x)
            with torch.no_grad():
                target = target * 2
            target += 1
        y = self.b(x) * self.scale(x)
        with torch.set_grad_enabled(False):
            y = y - self.c(x).tanh()
        return self.c(y - target) * y.data + y.detach()


@pytest.mark.usefixtures("float64")
def test_derivatives_stop_where_autograd_stops_them() -> None:
    model, x = StopsGradients(), torch.randn(4, 5)
    assert_exact(model, lambda: F.mse_loss(model(x), x))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def test_a_custom_autograd_function_raises_an_error_that_names_it() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    d = [torch.randn_like(p) for p in trained(model)]
    with pytest.raises(UnsupportedOperation, match=r"StraightThrough.*curvature='forward'"):
        derivatives_along(d, model, lambda: StraightThrough.apply(model(x)).square().mean())
    assert torch.is_grad_enabled()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointed_activations(reentrant: bool) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), Inverse(), nn.Linear(4, 2)), torch.randn(4, 3)

    def checkpointed() -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).square().mean()

    assert_exact(model, checkpointed, same_loss=lambda: model(x).square().mean())


@pytest.mark.usefixtures("float64")
def test_hooks_of_the_model_run_once() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    d = [torch.randn_like(p) for p in trained(model)]
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.register_forward_hook(lambda module, inputs, output: calls.append("after") or output * 2)

    def loss() -> Tensor:
        return F.mse_loss(model(x), x[:, :2])

    seen = derivatives_along(d, model, loss)
    assert calls == ["before", "after"]
    assert seen == pytest.approx(reference.derivatives(loss, trained(model), d), rel=TOLERANCE)


def test_jet_mode_replaces_tensors_inside_lists() -> None:
    a, b = torch.ones(2), torch.ones(2)
    with torch.no_grad(), JetMode({id(a): Jet(a, torch.full((2,), 3.0))}):
        stacked = torch.stack([a, b])
    assert torch.equal(derivatives(stacked)[1], torch.tensor([[3.0, 3.0], [0.0, 0.0]]))
