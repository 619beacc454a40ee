"""Other packages that find `d'Hd` or a learning rate, as training iterations for update_cost.py.

Each is optional (pip install "gen_dist[benchmarks]"). A package that gives `d'Hd` must give the value of double
backward. Otherwise it is left out, because the time for another number says nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gen_dist as gen

Criterion = Callable[[Tensor, Tensor], Tensor]
Product = Callable[[list[Tensor]], list[Tensor]]
TOLERANCE = 1e-3  # in float32


class Unable(Exception):
    """A package cannot do what is compared; the message says why."""


def double_backward(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> Product:
    """With PyTorch alone. All packages are compared with this product."""
    parameters = [*model.parameters()]

    def product(d: list[Tensor]) -> list[Tensor]:
        gradient = torch.autograd.grad(criterion(model(x), y), parameters, create_graph=True)
        return list(torch.autograd.grad(gradient, parameters, grad_outputs=d))

    return product


def eigenthings(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> Product:
    from hessian_eigenthings.operators.distributed.ddp import DDPHessianOperator

    operator = DDPHessianOperator(model, [(x, y)], lambda module, batch: criterion(module(batch[0]), batch[1]))

    def product(d: list[Tensor]) -> list[Tensor]:
        flat = operator.matvec(torch.cat([part.flatten() for part in d]))
        return list(flat.split([part.numel() for part in d]))

    return product


def curvlinops(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> Product:
    from curvlinops import HessianLinearOperator

    class Mean(nn.Module):
        reduction = "mean"

        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return criterion(output, target)

    parameters = [*model.parameters()]
    operator = HessianLinearOperator(
        model, Mean(), parameters, [(x, y)], check_deterministic=False, num_data=len(x), batch_size_fn=len
    )

    def product(d: list[Tensor]) -> list[Tensor]:
        return list(operator @ d)

    return product


def pyhessian(model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor) -> Product:
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    def product(d: list[Tensor]) -> list[Tensor]:
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Using backward.. with create_graph")
            at = hessian(model, criterion, data=(x, y), cuda=False)
        model.train()  # it puts the model in evaluation mode
        products = list(hessian_vector_product(at.gradsH, at.params, d))
        model.zero_grad()
        return products

    return product


PRODUCTS: dict[str, Callable[..., Product]] = {
    "double backward": double_backward,
    "eigenthings DDP": eigenthings,
    "curvlinops": curvlinops,
    "PyHessian": pyhessian,
}
PEERS = [*PRODUCTS, "gen-optim"]


def iteration(
    peer: str,
    model: nn.Module,
    criterion: Criterion,
    x: Tensor,
    y: Tensor,
    *,
    tolerance: float = TOLERANCE,
    fused: bool | None = None,
) -> Callable[[], None]:
    """An iteration of AdamW with this package's number. Raises `ImportError`, or `Unable` if the number is wrong."""
    if peer == "gen-optim":
        return gen_optim(model, criterion, x, y, fused)
    optimizer = gen.make_gen_optimizer(torch.optim.AdamW, model.parameters(), lr=1e-4, fused=fused)
    product = PRODUCTS[peer](model, criterion, x, y)

    def curvature(product: Product) -> float:
        assert optimizer.direction is not None
        d = [update for _, update in optimizer.direction.items()]
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            return sum(torch.dot(a.flatten(), b.flatten()) for a, b in zip(product(d), d, strict=True)).item()  # type: ignore[union-attr]

    def run() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.compute_param_updates()
        curvature(product)
        optimizer.step()

    optimizer.zero_grad()
    criterion(model(x), y).backward()
    optimizer.compute_param_updates()
    try:
        found, true = curvature(product), curvature(double_backward(model, criterion, x, y))
    except RuntimeError as error:
        raise Unable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    optimizer.reset()
    if abs(found - true) > tolerance * abs(true):
        raise Unable(f"its d'Hd is {found:.6g}, double backward's {true:.6g}")
    print(f"      {peer:<18} d'Hd {found:.6g}, double backward {true:.6g}")
    return run


def gen_optim(
    model: nn.Module, criterion: Criterion, x: Tensor, y: Tensor, fused: bool | None = None
) -> Callable[[], None]:
    from GeN import lr_parabola

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)

    def run() -> None:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        lr_parabola(
            model,
            optimizer,
            criterion,
            tr_iter=iter([(x, y)]),
            device=str(x.device),
            task="image_cls",
            lr_factor=[-1, 0, 1],
        )
        optimizer.step()

    return run
