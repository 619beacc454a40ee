"""Where autograd stops, jets stop. Where it takes another gradient, jets refuse. Gradients in the loss are carried.

A row is a function from a model, its input and its target to a loss. The oracle is double backward in float64.
"""

from __future__ import annotations

import copy
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
import torch.nn.functional as F
from effects import assert_unchanged
from test_jet_program import derivatives_along, trained
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from gen_dist import jets
from gen_dist.direction import Direction, GroupDirection
from gen_dist.jets import UnsupportedOperation
from gen_dist.line import Line, MicroBatch, Slice, estimator, two_probes
from gen_dist.parallel import Layout

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-9
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

mse = F.mse_loss


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def problem(make: Callable[[], nn.Module] = perceptron) -> tuple[nn.Module, Tensor, Tensor, list[Tensor]]:
    model = make()
    return model, torch.randn(6, 4), torch.randn(6, 3), [0.3 * torch.randn_like(p) for p in trained(model)]


def seeded(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        torch.manual_seed(5)
        return loss()

    return run


# ------------------------------------------------------------------------------------------------ what stops


def target_inside(stop: Callable[[], Any]) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with stop():
            target = model(x)
        return mse(model(x * 1.1), 0.5 * target.clone())

    return loss


def target_of_decorated(stop: Callable[[], Any]) -> Loss:
    return lambda model, x, y: mse(model(x * 1.1), 0.5 * stop()(model)(x).clone())


def nested(*blocks: Callable[[], Any]) -> Loss:
    """Compute a part of the loss inside each block, with the others around it."""

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        def inside(remaining: tuple[Callable[[], Any], ...], depth: int) -> Tensor:
            before = model(x + depth)
            if not remaining:
                return before
            with remaining[0]():
                within = inside(remaining[1:], depth + 1)
            return before * model(x - depth) + within.clone()

        return mse(inside(blocks, 0), y)

    return loss


def checkpointed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def block(h: Tensor) -> Tensor:
        with torch.no_grad():
            scale = model(h)
        return model(h) * scale

    return mse(checkpoint(block, x.requires_grad_(), use_reentrant=True), y)


def not_checkpointed(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return mse(model(x) * model(x).detach(), y)


class Table(nn.Module):
    """An embedding whose rows the inputs choose."""

    def __init__(self, bag: bool = False, **arguments: Any) -> None:
        super().__init__()
        kind: Any = nn.EmbeddingBag if bag else nn.Embedding
        self.rows, self.head = kind(7, 4, **arguments), nn.Linear(4, 3)
        with torch.no_grad():
            self.rows.weight.normal_()

    def forward(self, x: Tensor) -> Tensor:
        h = self.rows(torch.tensor([[1, 2], [0, 1], [5, 6], [2, 2], [3, 1], [1, 1]]))
        return self.head(h.tanh() if h.dim() == 2 else h.tanh().mean(1))


def copied_by_a_kernel(x: Tensor) -> Tensor:
    """As Triton and other kernels do, it asks for the memory of its arguments."""
    y, x = torch.empty_like(x), x.contiguous()
    ctypes.memmove(y.data_ptr(), x.data_ptr(), x.nbytes)
    return y


def scaled_by_a_kernel(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        scale = copied_by_a_kernel(model(x))
    return mse(model(x) * scale, copied_by_a_kernel(y))


STOPS: dict[str, Loss] = {
    "a kernel in no_grad": scaled_by_a_kernel,
    "inference mode": target_inside(torch.inference_mode),
    "inference mode as decorator": target_of_decorated(torch.inference_mode),
    "no_grad as decorator": target_of_decorated(torch.no_grad),
    "inference mode in no_grad": nested(torch.no_grad, torch.inference_mode),
    "no_grad in inference mode": nested(torch.inference_mode, torch.no_grad),
    "enable_grad in no_grad": nested(torch.no_grad, torch.enable_grad, torch.no_grad),
    "inference mode in enable_grad in no_grad": nested(torch.no_grad, torch.enable_grad, torch.inference_mode),
    "enable_grad in inference mode": nested(torch.inference_mode, torch.enable_grad),
    "inference mode that is off": nested(lambda: torch.inference_mode(False), torch.no_grad),
    "inference mode that is off in no_grad": nested(torch.no_grad, lambda: torch.inference_mode(False)),
    "set_grad_enabled": nested(lambda: torch.set_grad_enabled(False), lambda: torch.set_grad_enabled(True)),
    "gumbel_softmax": lambda model, x, y: mse(F.gumbel_softmax(model(x), hard=True) * model(x), y),
    "gumbel_softmax in no_grad": lambda model, x, y: mse(torch.no_grad()(F.gumbel_softmax)(model(x)) * model(x), y),
    "detached alias written": lambda model, x, y: mse(model(x) * model(x).detach().mul_(2), y),
    "data": lambda model, x, y: mse(model(x) * model(x).data, y),
    "tolist": lambda model, x, y: mse(model(x), y) * model(x).sum(0).tolist()[0],
    "torch.tensor of elements": lambda model, x, y: mse(model(x), y) * torch.tensor([*model(x)[0]]).sum(),
    "numpy": lambda model, x, y: mse(model(x), y) * float(model(x).detach().numpy().sum()),
    "asks requires_grad": lambda model, x, y: mse(model(x) * (2 if model(x).requires_grad else 3), y),
    "asks is_leaf": lambda model, x, y: mse(model(x) * (2 if model(x).is_leaf else 3), y),
    "asks grad_fn": lambda model, x, y: mse(model(x) * (2 if model(x).grad_fn is None else 3), y),
    "asks requires_grad of a constant": lambda model, x, y: mse(model(x) * (2 if x.requires_grad else 3), y),
    "asks requires_grad of a weight": lambda model, x, y: mse(
        model(x) * (2 if model[0].weight.requires_grad else 3), y
    ),
    "asks whether gradients are on": lambda model, x, y: mse(model(x) * (2 if torch.is_grad_enabled() else 3), y),
    "retain_grad": lambda model, x, y: (h := model(x), h.retain_grad(), mse(h, y))[2],
    "normalize": lambda model, x, y: mse(F.normalize(model(x)) + model(x).detach(), y),
}


def assert_right(model: nn.Module, loss: Callable[[], Tensor], d: list[Tensor], same: Any = None) -> None:
    seen = derivatives_along(d, model, seeded(loss))
    expected = reference.derivatives(seeded(same or loss), trained(model), d)
    assert seen == pytest.approx(expected, rel=TOLERANCE, abs=1e-12)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", STOPS)
def test_derivatives_stop_where_autograd_stops_them(name: str) -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: STOPS[name](model, x, y), d)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_no_grad_inside_of_a_checkpoint_stops_derivatives() -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: checkpointed(model, x, y), d, lambda: not_checkpointed(model, x.detach(), y))


EMBEDDINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"padding_idx": 1},
    "padding from the end": {"padding_idx": -6},
    "max_norm": {"max_norm": 1.0},
    "bag": {"bag": True},
    "bag, padding": {"bag": True, "padding_idx": 1, "mode": "sum"},
    "bag, max_norm": {"bag": True, "max_norm": 1.0},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_rows_of_an_embedding_move_if_autograd_moves_them(name: str) -> None:
    """The direction of a row for padding is not zero after weight decay or with momentum from before."""
    model, x, y, d = problem(lambda: Table(**EMBEDDINGS[name]))
    model(x)  # renormalises
    if "bag" not in name:
        assert_right(model, lambda: mse(model(x), y), d)
    else:
        _compare_with_a_plain_table(model, y, d, EMBEDDINGS[name])


def _compare_with_a_plain_table(model: Any, y: Tensor, d: list[Tensor], arguments: dict[str, Any]) -> None:
    """Autograd has no second derivative of a bag."""
    indices = torch.tensor([[1, 2], [0, 1], [5, 6], [2, 2], [3, 1], [1, 1]])
    present = (indices != arguments.get("padding_idx", -1)).double()[..., None]
    total = 1 if arguments.get("mode") == "sum" else present.sum(1)

    def same() -> Tensor:
        return mse(model.head(((model.rows.weight[indices] * present).sum(1) / total).tanh()), y)

    assert_right(model, lambda: mse(model(y), y), d, same)


# ---------------------------------------------------------------------------------- tensors made by the model


def rows(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h, out = model(x), torch.zeros(6, 3)
    for i in range(6):
        out[i] = h[i] * (i + 1)
    return mse(out, y)


def through_views(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h, out = model(x), torch.ones(2, 6, 3)
    before, flat = out[1], out.view(-1)
    flat[:18].mul_(h.flatten())
    out[1, :2] += h[:2]
    before[2:].copy_(h[2:] * 2)
    out.transpose(0, 1)[5, 0] = h[0]
    return mse(out.prod(0) + before, y) + flat[3] ** 2


def written(write: Callable[[Tensor, Tensor], Any], make: Callable[[Tensor], Tensor] | None = None) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        out = torch.zeros(6, 3) if make is None else make(x)
        write(out, model(x))
        return mse(out * out, y)

    return loss


INDEX = torch.tensor([0, 0, 1, 2, 3, 5])
COLUMNS = INDEX[:, None].expand(6, 3)

MADE: dict[str, Loss] = {
    "rows": rows,
    "views": through_views,
    "index_add_": written(lambda out, h: out.index_add_(0, INDEX, h)),
    "index_copy_": written(lambda out, h: out.index_copy_(0, INDEX.unique(), h[:5])),
    "index_put_": written(lambda out, h: out.index_put_((INDEX,), h, accumulate=True)),
    "mask": written(lambda out, h: out.__setitem__(h > 0, h[h > 0])),
    "scatter_": written(lambda out, h: out.scatter_(0, torch.arange(6)[:, None].expand(6, 3).flip(0), h)),
    "scatter_add_": written(lambda out, h: out.scatter_add_(0, COLUMNS, h)),
    "copy_": written(lambda out, h: out.copy_(h)),
    "masked_fill_": written(lambda out, h: out.masked_fill_(h > 0, h[0, 0])),
    "masked_scatter_": written(lambda out, h: out.masked_scatter_(h > 0, h)),
    "add_": written(lambda out, h: out.add_(h, alpha=2)),
    "iadd": written(lambda out, h: out.__iadd__(h)),
    "fill_": written(lambda out, h: out[0].fill_(h[0, 0])),
    "select": written(lambda out, h: [out.select(0, i).copy_(h[i]) for i in range(6)]),
    "empty": written(lambda out, h: out.copy_(h), lambda x: torch.empty(6, 3)),
    "new_zeros": written(lambda out, h: out.copy_(h), lambda x: x.new_zeros(6, 3)),
    "a result": written(lambda out, h: out.mul_(h), lambda x: x[:, :3] * 2),
    "a clone": written(lambda out, h: out.mul_(h), lambda x: x[:, :3].clone()),
    "full": written(lambda out, h: out.mul_(h), lambda x: torch.full((6, 3), 2.0)),
    "in no_grad": written(lambda out, h: (torch.no_grad()(out.copy_)(h), out[2:4].mul_(h[2:4]))),
    "overwritten": written(lambda out, h: (out.copy_(h), out[1:3].zero_(), out[0].mul_(3))),
    "detached after": lambda model, x, y: mse(_filled(model(x)).detach() * model(x), y),
    "state of a loop": lambda model, x, y: mse(functools.reduce(_next, [model(x)] * 3, torch.zeros(6, 3)), y),
}


def _filled(h: Tensor) -> Tensor:
    out = torch.zeros(6, 3)
    out[:4] = h[:4]
    return out


def _next(state: Tensor, h: Tensor) -> Tensor:
    state[:, :1] += h[:, :1]
    return state * h


@pytest.mark.parametrize("name", MADE)
def test_tensors_that_the_model_makes_and_writes_into(name: str) -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: MADE[name](model, x, y), d)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences(kind: type[nn.RNNBase], ordered: bool, batch_first: bool) -> None:
    model = nn.ModuleList([nn.Linear(4, 4), kind(4, 3, num_layers=2, batch_first=batch_first, bidirectional=True)])
    x, lengths = torch.randn(3, 5, 4), torch.tensor([5, 3, 2] if ordered else [3, 5, 2])
    x = x if batch_first else x.transpose(0, 1)
    d = [0.3 * torch.randn_like(p) for p in trained(model)]

    def loss() -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(model[0](x), lengths, batch_first, enforce_sorted=ordered)
        out, seen = nn.utils.rnn.pad_packed_sequence(model[1](packed)[0], batch_first, -1.5, total_length=6)
        assert seen.tolist() == lengths.tolist()
        return out.pow(2).mean() + out.sum().tanh()

    assert_right(model, loss, d)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequences_are_padded(side: str, batch_first: bool) -> None:
    model, x, _, d = problem()

    def loss() -> Tensor:
        parts = list(model(x).split([len(x) - 2, 2]))
        padded = nn.utils.rnn.pad_sequence(parts, batch_first, 0.7, side)
        assert padded.shape[0 if batch_first else 1] == 2
        return padded.pow(2).mean() + padded.sum().tanh()

    assert_right(model, loss, d)


class Plain(torch.Tensor):
    pass


def test_an_input_of_a_tensor_subclass() -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: mse(model(x.as_subclass(Plain)), y.as_subclass(Plain)), d)


class Own(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_input_of_a_subclass_with_functions_of_its_own_is_refused() -> None:
    model, x, y, d = problem()
    assert_refused("subclass", model, lambda: mse(model(x.as_subclass(Own)), y), d)


# ------------------------------------------------------------------------------------- gradients in the loss


def forces(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (torch.func.grad(lambda x: model(x).sum())(x) - 1).pow(2).mean() + mse(model(x), y)


def along_columns(transform: Callable[..., Any]) -> Loss:
    return lambda model, x, y: torch.func.vmap(transform(model))(x).pow(2).mean() + mse(model(x), y)


def maml(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = dict(model.named_parameters())
    g = torch.func.grad(lambda q: mse(torch.func.functional_call(model, q, (x,)), y))(p)
    return mse(torch.func.functional_call(model, {k: p[k] - 0.1 * g[k] for k in p}, (x * 1.2,)), y)


def maml_by_autograd(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = dict(model.named_parameters())
    g = torch.autograd.grad(mse(model(x), y), list(p.values()), create_graph=True)
    moved = {name: w - 0.1 * v for (name, w), v in zip(p.items(), g, strict=True)}
    return mse(torch.func.functional_call(model, moved, (x * 1.2,)), y)


def penalty(create_graph: bool = True, layers: int = 3) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        x = x.clone().requires_grad_(True)
        (g,) = torch.autograd.grad(model[:layers](x).pow(2).sum(), x, create_graph=create_graph)  # type: ignore[index]
        return (g.norm(dim=1) - 1).pow(2).mean() * mse(model(x), y)

    return loss


def penalty_of_features(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    h = model[0](x)  # type: ignore[index]
    g = torch.autograd.grad(model[1:](h).pow(2).sum(), h, create_graph=True)[0]  # type: ignore[index]
    return g.pow(2).mean() + mse(model(x), y)


def hessian_vector(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    _, product = torch.autograd.functional.hvp(
        lambda x: model(x).pow(2).sum(), x, torch.ones_like(x), create_graph=True
    )
    return product.pow(2).mean() + mse(model(x), y)


def linearised(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    value, moved = torch.func.jvp(model, (x,), (torch.ones_like(x),))
    back = torch.func.vjp(model, x)[1](value)[0]
    return mse(value + moved, y) + back.pow(2).mean()


def weights_moved(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    p = dict(model.named_parameters())
    call = lambda q: torch.func.functional_call(model, q, (x,))  # noqa: E731
    value, moved = torch.func.jvp(call, (p,), ({k: v.detach() * 0 + 1 for k, v in p.items()},))
    return mse(value + 0.1 * moved, y)


def ensemble(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    stacked = {k: torch.stack([v, v * 2]) for k, v in model.named_parameters()}
    return torch.func.vmap(lambda q: mse(torch.func.functional_call(model, q, (x,)), y))(stacked).sum()


def over_weights(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.vmap(lambda w: (x @ w).tanh().mean())(model[0].weight).pow(2).sum() + mse(model(x), y)  # type: ignore[index,operator]


def stopped_gradient(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        g = torch.func.grad(lambda x: model(x).pow(2).sum())(x)
    return mse(model(x + 0.1 * g), y)


def stops_inside(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def f(x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = model(x)
        return (model(x) * scale * model(x).detach()).sum()

    return torch.func.grad(f)(x).pow(2).mean() + mse(model(x), y)


def norms(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def f(x: Tensor) -> Tensor:
        return (F.softmax(F.layer_norm(model(x), (3,)), -1) * y).sum()

    return torch.func.grad(f)(x).pow(2).mean() + mse(model(x), y)


def attended(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def f(x: Tensor) -> Tensor:
        h = model(x).view(1, 1, 6, 3)
        return F.scaled_dot_product_attention(h, h, h).pow(2).sum()

    return torch.func.grad(f)(x).pow(2).mean() + mse(model(x), y)


def of_external_input(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    g = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)[0]
    return g.pow(2).mean() + mse(model(x.detach()), y)


def checkpointed_penalty(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    g = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).pow(2).sum(), x, create_graph=True)[0]
    return g.pow(2).mean() + mse(model(x), y)


GRADIENTS: dict[str, Loss] = {
    "forces": forces,
    "jacrev": along_columns(torch.func.jacrev),
    "jacfwd": along_columns(torch.func.jacfwd),
    "hessian": along_columns(torch.func.hessian),
    "jacobian": lambda model, x, y: (
        torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x, create_graph=True).pow(2).mean()
        + mse(model(x), y)
    ),
    "hvp": hessian_vector,
    "log-sigmoid": lambda model, x, y: (
        torch.func.grad(lambda x: (F.logsigmoid(model(x)) + model(x).sin()).pow(2).sum())(x).pow(2).mean()
    ),
    "determinant": lambda model, x, y: torch.func.grad(lambda x: torch.linalg.det(model(x)[:3]))(x).pow(2).mean(),
    "maml": maml,
    "maml by autograd": maml_by_autograd,
    "penalty": penalty(),
    "penalty without graph": penalty(create_graph=False),
    "penalty of features": penalty_of_features,
    "jvp and vjp": linearised,
    "jvp of weights": weights_moved,
    "ensemble": ensemble,
    "vmap over a weight": over_weights,
    "stopped": stopped_gradient,
    "stops inside": stops_inside,
    "checkpointed": checkpointed_penalty,
}


def grouped(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    def f(x: Tensor) -> Tensor:
        return F.group_norm(model(x), 3).mul(y).sum()

    return torch.func.grad(f)(x).pow(2).mean() + mse(model(x), y)


def solved(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return torch.func.grad(lambda x: torch.linalg.solve(model(x)[:3], y[:3]).sum())(x).pow(2).mean()


MAYBE_REFUSED: dict[str, Loss] = {
    "norm and softmax": norms,
    "attention": attended,
    "group norm": grouped,
    "solve": solved,
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_that_the_loss_takes_are_carried(name: str) -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: GRADIENTS[name](model, x, y), d)


def test_a_gradient_with_respect_to_an_input_marked_outside_is_carried() -> None:
    model, x, y, d = problem()
    x.requires_grad_()
    assert_right(model, lambda: of_external_input(model, x, y), d)


def test_a_gradient_penalty_of_a_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2, padding=1), nn.Softplus(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2, groups=1, stride=1),
        nn.LeakyReLU(0.2), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1),
    )  # fmt: skip
    images = torch.randn(4, 2, 7, 7)
    d = [0.3 * torch.randn_like(p) for p in trained(model)]

    def loss() -> Tensor:
        x = images.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(x).pow(2).sum(), x, create_graph=True)
        return (g.flatten(1).norm(dim=1) - 1).pow(2).mean() + model(images).mean()

    assert_right(model, loss, d)
    assert_right(model, lambda: _weight_gradients(model, images), d)


def _weight_gradients(model: nn.Module, x: Tensor) -> Tensor:
    g = torch.autograd.grad(model(x).pow(2).sum(), list(model.parameters()), create_graph=True)
    return sum((each.pow(2).mean() for each in g), torch.zeros(()))


@pytest.mark.parametrize("name", MAYBE_REFUSED)
def test_gradients_of_fused_operators_are_right_or_refused(name: str) -> None:
    model, x, y, d = problem()
    try:
        assert_right(model, lambda: MAYBE_REFUSED[name](model, x, y), d)
    except UnsupportedOperation as error:
        assert "curvature='forward'" in str(error)  # noqa: PT017


# --------------------------------------------------------------------------------------------- what is refused


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -0.5 * g


class NewStyle(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: float = 1.0) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -0.5 * g, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return tangents[0]


class Identity(OldStyle):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -g


class Detached(OldStyle):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class WithGradients(OldStyle):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch.enable_grad():
            return x * 2


class Around(OldStyle):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return Identity.apply(x)  # type: ignore[no-any-return]


class OfWeights(torch.autograd.Function):
    """Moving values come in by the model that the function holds, not by a tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
        return model(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g @ torch.ones(3, 4), None


class OfWeightsWithGradients(OfWeights):
    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module) -> Tensor:
        with torch.enable_grad():
            return model(x)


kept = Identity.apply


class Swish(torch.autograd.Function):
    """Its forward code detaches, which stops nothing there, and its gradient cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.detach() * torch.sigmoid(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return g * (s + x * s * (1 - s))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


class FusedLoss(torch.autograd.Function):
    """Computes its gradients forward, as chunked losses do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        error = x @ weight.t() - target
        ctx.save_for_backward(2 * error @ weight / error.numel(), 2 * error.t() @ x / error.numel())
        return error.pow(2).mean()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        of_x, of_weight = ctx.saved_tensors
        return g * of_x, g * of_weight, None


class Masked(torch.autograd.Function):
    generate_vmap_rule = False

    @staticmethod
    def forward(x: Tensor, p: float) -> tuple[Tensor, Tensor]:
        mask = (torch.rand_like(x) > p).to(x.dtype)
        return x.sin() * mask, mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:
        x, mask = ctx.saved_tensors
        return g * x.cos() * mask, None


class Clipped(OldStyle):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-1, 1)


class ByKernel(OldStyle):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return copied_by_a_kernel(x)


class Rounded(OldStyle):
    """The gradient of its forward code but for rounding, of which only its author knows that it is harmless."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (1 + 1e-4)


def through(function: Callable[[Tensor], Tensor]) -> Loss:
    return lambda model, x, y: mse(model[2](function(model[1](model[0](x)))), y)  # type: ignore[index]


FUNCTIONS: dict[str, tuple[str, Loss]] = {
    "old style": ("OldStyle", through(OldStyle.apply)),
    "new style": ("NewStyle", through(NewStyle.apply)),
    "new style with an argument": ("NewStyle", through(lambda h: NewStyle.apply(h, 2.0))),
    "returns its input": ("Identity", through(Identity.apply)),
    "kept in a variable": ("Identity", through(kept)),
    "detaches": ("Detached", through(Detached.apply)),
    "enables gradients": ("WithGradients", through(WithGradients.apply)),
    "nested": ("Around", through(Around.apply)),
    "clips": ("Clipped", through(Clipped.apply)),
    "rounds": ("Rounded", through(Rounded.apply)),
    "runs a kernel": (r"data_ptr\(\)", through(ByKernel.apply)),
    "disabled for the compiler": ("Identity", through(torch.compiler.disable(Identity.apply))),
    "of a view": ("Identity", through(lambda h: Identity.apply(h.view(-1)).view_as(h))),
    "of a weight": (
        "Identity",
        lambda model, x, y: mse(F.linear(x[:, :4], Identity.apply(model[0].weight)).sum(), y.sum()),
    ),  # type: ignore[index]
    "in vmap": ("NewStyle", through(lambda h: torch.func.vmap(NewStyle.apply)(h))),
    "in a gradient": ("NewStyle", through(lambda h: torch.func.grad(lambda z: NewStyle.apply(z).pow(2).sum())(h))),
    "of a model": ("OfWeights", lambda model, x, y: mse(OfWeights.apply(x.clone().requires_grad_(), model), y)),
    "of a model, enabling gradients": (
        "OfWeightsWithGradients",
        lambda model, x, y: mse(OfWeightsWithGradients.apply(x.clone().requires_grad_(), model), y),
    ),
}


FOLLOWED: dict[str, tuple[Loss, Loss]] = {
    "activation": (through(Swish.apply), through(F.silu)),
    "in place": (through(lambda h: Doubled.apply(h * 1)), through(lambda h: h * 2)),
    "fused loss": (
        lambda model, x, y: FusedLoss.apply(model[1](model[0](x)), model[2].weight, y),  # type: ignore[index]
        lambda model, x, y: mse(F.linear(model[1](model[0](x)), model[2].weight), y),  # type: ignore[index]
    ),
    "nested": (through(lambda h: Swish.apply(Swish.apply(h))), through(lambda h: F.silu(F.silu(h)))),
    "random": (through(lambda h: Masked.apply(h, 0.3)[0]), through(lambda h: Masked.apply(h, 0.3)[0])),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_a_custom_function_is_followed_if_its_gradient_is_that_of_its_forward_code(name: str) -> None:
    model, x, y, d = problem()
    loss, same = FOLLOWED[name]
    assert_right(model, lambda: loss(model, x, y), d, lambda: same(model, x, y))


def test_a_custom_function_that_the_user_trusts_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jets.functions, "_trusted", set())
    model, x, y, d = problem()
    assert jets.trust(Rounded) is Rounded
    assert_right(model, lambda: through(Rounded.apply)(model, x, y), d, lambda: mse(model(x), y))
    with pytest.raises(TypeError, match=r"trust\(\) takes a class"):
        jets.trust(Rounded.apply)


SCRIPTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product": lambda x, bias: torch.tanh(x + bias) * bias,
    "detach": lambda x, bias: (x + bias) * x.detach(),
    "in place": lambda x, bias: (x * x + 1).pow_(-0.5) + bias,
}


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_of_torchscript_are_followed(name: str) -> None:
    """They take weights, which no function mode replaces, and stop derivatives where no function mode sees it."""
    model, x, y, d = problem()
    script = torch.jit.trace(SCRIPTS[name], (torch.randn(6, 5), torch.randn(5)))
    assert_right(model, lambda: mse(model[2](script(model[0](x), model[0].bias)), y), d)  # type: ignore[index]


def with_stops(x: Tensor, bias: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x * x
        scale.add_(bias)
    return scale * x.tanh() + bias.detach() * x


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("times", [1, 3])
def test_derivatives_stop_in_a_function_of_torchscript(times: int) -> None:
    """Also once it is optimized."""
    model, x, y, d = problem()
    script = torch.jit.script(with_stops)
    for _ in range(times):
        assert_right(model, lambda: mse(model[2](script(model[0](x), model[0].bias)), y), d)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_nothing_stops_in_a_function_of_torchscript_that_a_custom_function_calls() -> None:
    """Neither does it without TorchScript: what counts is the gradient that the custom function defines."""
    script = torch.jit.script(with_stops)

    class Scripted(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return script(x, torch.ones(5))  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return g * (2 * x * x.tanh() + (x * x + 1) * (1 - x.tanh() ** 2) + 1)

    model, x, y, d = problem()
    same = lambda h: (h * h + 1) * h.tanh() + h  # noqa: E731
    assert_right(model, lambda: through(Scripted.apply)(model, x, y), d, lambda: through(same)(model, x, y))


class Normalised(nn.Module):
    """With buffers that it writes, a weight that stands still, one used twice, a branch, and a target."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.second.bias.requires_grad_(False)
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x)))
        with torch.no_grad():
            target = self.second(h)
        if h.sum() > -1e9:
            h = torch.relu(self.second(h + 2)) + target
        self.mean.mul_(0.9).add_(h.mean(0).detach(), alpha=0.1)
        return self.last(h * self.mean) + (self.first.weight * self.first.weight).sum()


MODULES: dict[str, tuple[Callable[[nn.Module], nn.Module], Callable[[], nn.Module]]] = {
    "scripted": (torch.jit.script, perceptron),
    "traced": (lambda m: torch.jit.trace(m, torch.randn(6, 4)), perceptron),
    "scripted, with buffers": (torch.jit.script, Normalised),
    "traced, with buffers": (lambda m: torch.jit.trace(m, torch.randn(6, 4), check_trace=False), Normalised),
    "scripted inside": (lambda m: nn.Sequential(torch.jit.script(m), nn.Tanh()), Normalised),
}


@pytest.mark.filterwarnings("ignore:.*is deprecated", "ignore:.*Converting a tensor to a Python")
@pytest.mark.parametrize("trained_before", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torchscript_are_followed(name: str, trained_before: bool) -> None:
    """Also once they are optimized for a backward pass. The oracle is the module without TorchScript.

    But a trace knows no `no_grad`: of one, the oracle is the trace itself.
    """
    scripted, make = MODULES[name]
    plain, x, y, d = problem(make)
    model = scripted(copy.deepcopy(plain))
    if name == "scripted inside":
        plain = nn.Sequential(plain, nn.Tanh())
    elif name == "traced, with buffers":
        plain = model
    if trained_before:
        for each in (model, plain):
            for _ in range(3):
                mse(each(x), y).backward()
    weights, before = [*model.parameters()], copy.deepcopy(model.state_dict())
    seen = derivatives_along(d, model, lambda: mse(model(x), y))
    assert_unchanged(before, model.state_dict())
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert seen == pytest.approx(reference.derivatives(lambda: mse(plain(x), y), trained(plain), d), rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_an_error_in_a_module_of_torchscript_leaves_its_weights_in_place() -> None:
    model, x, y, d = problem(lambda: torch.jit.script(perceptron()))
    weights = [*model.parameters()]
    with pytest.raises(RuntimeError, match="TorchScript interpreter"):
        derivatives_along(d, model, lambda: mse(model(x[:, :2]), y))
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))


@pytest.fixture
def fusing() -> Iterator[None]:
    """TorchScript compiles what it has seen twice, as it does on GPUs."""
    torch._C._jit_override_can_fuse_on_cpu(True)
    torch._C._jit_set_te_must_use_llvm_cpu(False)
    yield
    torch._C._jit_override_can_fuse_on_cpu(False)
    torch._C._jit_set_te_must_use_llvm_cpu(True)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.usefixtures("fusing")
def test_a_compiled_function_of_torchscript_is_refused() -> None:
    """One that it has compiled for tensors without gradients; a jet would give it a null pointer."""
    model, x, y, d = problem()
    script = torch.jit.trace(SCRIPTS["product"], (torch.randn(6, 5), torch.randn(5)))
    with torch.no_grad():
        for _ in range(3):
            script(model[0](x), model[0].bias)  # type: ignore[index]
    loss = lambda: mse(model[2](script(model[0](x), model[0].bias)), y)  # type: ignore[index] # noqa: E731
    assert_refused("TorchScript is compiled", model, loss, d)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_what_a_function_of_torchscript_calls_is_refused_by_name() -> None:
    model, x, _, d = problem()
    script = torch.jit.trace(lambda x: x @ torch.geqrf(x)[0].t(), torch.randn(6, 3))
    assert_refused(r"TorchScript.*aten.geqrf", model, lambda: script(model(x)).sum(), d)


def hooked(register: Callable[[Tensor], Any]) -> Loss:
    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        h = model[0](x)  # type: ignore[index]
        register(h)
        return mse(model[1:](h), y)  # type: ignore[index]

    return loss


HOOKS: dict[str, tuple[str, Loss]] = {
    "register_hook": ("register_hook", hooked(lambda h: h.register_hook(lambda g: -g))),
    "hook of a node": ("hook of a node", hooked(lambda h: h.grad_fn.register_hook(lambda *_: None))),  # type: ignore[union-attr]
    "prehook of a node": ("hook of a node", hooked(lambda h: h.grad_fn.register_prehook(lambda *_: None))),  # type: ignore[union-attr]
    "backward": (r"backward\(\)", lambda model, x, y: (loss := mse(model(x), y), loss.backward())[0]),
    "torch.autograd.backward": (
        r"backward\(\)",
        lambda model, x, y: (loss := mse(model(x), y), torch.autograd.backward(loss))[0],
    ),
}


def assert_refused(name: str, model: nn.Module, loss: Callable[[], Tensor], d: list[Tensor]) -> None:
    with pytest.raises(UnsupportedOperation, match=rf"{name}.*curvature='forward'"):
        derivatives_along(d, model, loss)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", FUNCTIONS | HOOKS)
def test_another_gradient_is_refused_by_name_and_forward_works(name: str) -> None:
    message, loss = (FUNCTIONS | HOOKS)[name]
    model, x, y, d = problem()
    assert_refused(message, model, lambda: loss(model, x, y), d)
    assert_forward_works(model, lambda: loss(model, x, y), d)


def assert_forward_works(model: nn.Module, loss: Callable[[], Tensor], d: list[Tensor]) -> None:
    gradients = [torch.ones_like(p) for p in trained(model)]
    for p, g in zip(trained(model), gradients, strict=True):
        p.grad = g
    _, slope, bend = two_probes(line_of(model, loss, d), 1e-2).numbers[0].tolist()
    for p, g in zip(trained(model), gradients, strict=True):
        assert p.grad is g, "gradients must be restored"
        assert torch.equal(g, torch.ones_like(g)), "gradients must be restored"
    expected = reference.finite_differences(torch.enable_grad()(loss), trained(model), d, 1e-2, 2)
    assert (slope, bend) == pytest.approx(expected, rel=1e-6)


def line_of(model: nn.Module, loss: Callable[[], Tensor], d: list[Tensor]) -> Line:
    direction = Direction([GroupDirection(0, 1.0, trained(model), d)])
    return Line(Layout(model), direction, Slice([MicroBatch(model, closure=loss)]))


@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_a_module_is_refused(register: str) -> None:
    model, x, y, d = problem()
    handle = getattr(model[1], register)(lambda *_: None)  # type: ignore[index]
    assert_refused("a full backward hook", model, lambda: mse(model(x), y), d)
    assert_forward_works(model, lambda: mse(model(x), y), d)
    handle.remove()
    assert_right(model, lambda: mse(model(x), y), d)


def test_a_hook_of_a_parameter_changes_nothing_here() -> None:
    model, x, y, d = problem()
    for p in model.parameters():
        p.register_hook(lambda g: g.clamp(-1, 1))
        p.register_post_accumulate_grad_hook(lambda p: None)
    seen = derivatives_along(d, model, lambda: mse(model(x), y))
    plain = perceptron()
    plain.load_state_dict(model.state_dict())
    assert seen == pytest.approx(reference.derivatives(lambda: mse(plain(x), y), trained(plain), d), rel=TOLERANCE)


def test_a_custom_function_of_constants_is_no_matter() -> None:
    model, x, y, d = problem()
    assert_right(model, lambda: mse(model(OldStyle.apply(x)), NewStyle.apply(y)), d)


@pytest.mark.parametrize("function", ["OldStyle", "Identity", "NewStyle"])
def test_a_custom_function_whose_result_is_stopped_is_no_matter(function: str) -> None:
    model, x, y, d = problem()

    def loss() -> Tensor:
        with torch.no_grad():
            target = globals()[function].apply(model(x))
        return mse(model(x), target + y)

    assert_right(model, loss, d)


@pytest.mark.parametrize("bag", [False, True])
def test_rows_scaled_by_their_frequency_are_refused(bag: bool) -> None:
    model, x, y, d = problem(lambda: Table(bag=bag, scale_grad_by_freq=True))
    assert_refused("scale_grad_by_freq", model, lambda: mse(model(x), y), d)


# ----------------------------------------------------------------------------------- forward, parametrisations


@pytest.mark.parametrize("name", GRADIENTS)
def test_forward_works_where_the_loss_takes_gradients(name: str) -> None:
    model, x, y, d = problem()
    loss = seeded(lambda: GRADIENTS[name](model, x, y))
    _, slope, bend = two_probes(line_of(model, loss, d), 1e-3).numbers[0].tolist()
    _, true_slope, true_bend = reference.derivatives(loss, trained(model), d)
    if "without graph" not in name and "stop" not in name:
        assert (slope, bend) == pytest.approx((true_slope, true_bend), rel=2e-2, abs=1e-3)


PARAMETRISED: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
    "old weight_norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3))),
    "spectral_norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3))),
    "old spectral_norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 3))),
    "orthogonal": lambda: nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 3), orthogonal_map="cayley")),
}


class Squared(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return w * w.abs()


def squared() -> nn.Module:
    model = perceptron()
    parametrize.register_parametrization(model[0], "weight", Squared())  # type: ignore[index]
    return model


@pytest.mark.parametrize("curvature", ["exact", "forward", "gauss-newton"])
def test_weights_that_are_cached_move(curvature: str) -> None:
    model, x, y, d = problem(squared)
    line = Line(
        Layout(model), Direction([GroupDirection(0, 1.0, trained(model), d)]), Slice([MicroBatch(model, mse, x, y)])
    )
    expected = reference.estimate(model, mse, x, y, d, curvature, 1e-3, 2)
    with parametrize.cached():
        before = model[0].weight  # type: ignore[index]
        seen = estimator(curvature).measure(line, 1e-3, None).numbers[0].tolist()[1:]
        assert model[0].weight is before, "the cache must be restored"  # type: ignore[index]
    assert seen == pytest.approx(expected, rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_weights(name: str) -> None:
    model, x, y, d = problem(PARAMETRISED[name])
    model(x)

    def loss() -> Tensor:
        return mse(model(x), y)

    model.eval() if "spectral" in name else None
    if "weight_norm" in name:  # autograd's second derivative of the fused operator misses a term (torch 2.13)
        g, v = trained(model)[-2:] if name == "weight_norm" else trained(model)[1:]
        bias = trained(model)[0]
        assert_right(model, loss, d, lambda: mse(F.linear(x, v * (g / v.norm(dim=1, keepdim=True)), bias), y))
        return
    try:
        assert_right(model, loss, d)
    except UnsupportedOperation as error:
        assert name == "orthogonal", error  # noqa: PT017
