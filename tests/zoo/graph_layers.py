"""The convolutions of torch_geometric, and its aggregations, on a small graph: one line is a layer and its call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric import nn as graph

from zoo.case import Case, case

NODES, WIDTH, OUT = 8, 6, 4
AGGREGATIONS = (
    "MeanAggregation SumAggregation MaxAggregation MinAggregation MulAggregation VarAggregation StdAggregation "
    "SoftmaxAggregation PowerMeanAggregation MedianAggregation"
).split()


def _mlp(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 5), nn.SiLU(), nn.Linear(5, outputs))


class _Inputs:
    """A graph with no node alone, and what layers ask for besides."""

    def __init__(self) -> None:
        ring = torch.arange(NODES)
        more = torch.tensor([[0, 2, 5, 7], [3, 6, 1, 4]])
        one_way = torch.cat([torch.stack([ring, ring.roll(1)]), more], 1)
        self.edges = torch.cat([one_way, one_way.flip(0)], 1)
        count = self.edges.shape[1]
        self.weights = torch.rand(count) + 0.5
        self.features = torch.randn(count, 3)
        self.coordinates = torch.rand(count, 2)
        self.kinds = torch.arange(count) % 2
        self.node_kinds = torch.arange(NODES) % 2
        self.positions = torch.randn(NODES, 3)
        self.normals = nn.functional.normalize(torch.randn(NODES, 3), dim=1)
        self.batch = torch.zeros(NODES, dtype=torch.long)
        self.neighbours = torch.stack([ring.roll(k) for k in (1, 2, 3, 4)], 1)


Row = tuple[Callable[[], nn.Module], Callable[[Any, Tensor, _Inputs], Any]]


def _plain(layer: Any, x: Tensor, g: _Inputs) -> Any:
    return layer(x, g.edges)


def _layers() -> dict[str, Row]:
    rows: dict[str, Row] = {
        name: (functools.partial(getattr(graph, name), WIDTH, OUT), _plain)
        for name in (
            "GCNConv SAGEConv GraphConv ResGatedGraphConv GATConv GATv2Conv TransformerConv ARMAConv SGConv TAGConv "
            "MFConv FeaStConv HypergraphConv LEConv ClusterGCNConv GENConv FiLMConv SuperGATConv GeneralConv MixHopConv"
        ).split()
    }
    return rows | {
        "SimpleConv": (graph.SimpleConv, _plain),
        "ChebConv": (lambda: graph.ChebConv(WIDTH, OUT, 3), _plain),
        "SAGEConv max": (lambda: graph.SAGEConv(WIDTH, OUT, aggr="max"), _plain),
        "SAGEConv lstm": (lambda: graph.SAGEConv(WIDTH, OUT, aggr="lstm"), _sorted),
        "SAGEConv normalized": (lambda: graph.SAGEConv(WIDTH, OUT, normalize=True, project=True), _plain),
        "GCNConv weighted": (lambda: graph.GCNConv(WIDTH, OUT), lambda layer, x, g: layer(x, g.edges, g.weights)),
        "GATConv edges": (lambda: graph.GATConv(WIDTH, OUT, 2, edge_dim=3), _with_features),
        "GravNetConv": (lambda: graph.GravNetConv(WIDTH, OUT, 3, 4, 2), lambda layer, x, g: layer(x, g.batch)),
        "GatedGraphConv": (lambda: graph.GatedGraphConv(WIDTH, 2), _plain),
        "AGNNConv": (graph.AGNNConv, _plain),
        "GINConv": (lambda: graph.GINConv(_mlp(WIDTH, OUT), train_eps=True), _plain),
        "GINEConv": (lambda: graph.GINEConv(_mlp(WIDTH, OUT), edge_dim=3), _with_features),
        "SSGConv": (lambda: graph.SSGConv(WIDTH, OUT, 0.1, 2), _plain),
        "APPNP": (lambda: graph.APPNP(2, 0.1), _plain),
        "RGCNConv": (lambda: graph.RGCNConv(WIDTH, OUT, 2), _with_kinds),
        "RGCNConv bases": (lambda: graph.RGCNConv(WIDTH, OUT, 2, num_bases=2), _with_kinds),
        "FastRGCNConv": (lambda: graph.FastRGCNConv(WIDTH, OUT, 2), _with_kinds),
        "RGATConv": (lambda: graph.RGATConv(WIDTH, OUT, 2), _with_kinds),
        "SignedConv": (
            lambda: graph.SignedConv(WIDTH, OUT, first_aggr=True),
            lambda layer, x, g: layer(x, g.edges[:, ::2], g.edges[:, 1::2]),
        ),
        "DNAConv": (
            lambda: graph.DNAConv(WIDTH, 2),
            lambda layer, x, g: layer(torch.stack([x, x.sin()], 1), g.edges),
        ),
        "PointNetConv": (
            lambda: graph.PointNetConv(_mlp(WIDTH + 3, OUT), _mlp(OUT, OUT)),
            lambda layer, x, g: layer(x, g.positions, g.edges),
        ),
        "GMMConv": (lambda: graph.GMMConv(WIDTH, OUT, 2, 3), lambda layer, x, g: layer(x, g.edges, g.coordinates)),
        "NNConv": (lambda: graph.NNConv(WIDTH, OUT, _mlp(3, WIDTH * OUT)), _with_features),
        "CGConv": (lambda: graph.CGConv(WIDTH, 3, batch_norm=True), _with_features),
        "EdgeConv": (lambda: graph.EdgeConv(_mlp(2 * WIDTH, OUT)), _plain),
        "DynamicEdgeConv": (
            lambda: graph.DynamicEdgeConv(_mlp(2 * WIDTH, OUT), 2),
            lambda layer, x, g: layer(x, g.batch),
        ),
        "XConv": (lambda: graph.XConv(WIDTH, OUT, 3, 3), lambda layer, x, g: layer(x, g.positions, g.batch)),
        "PPFConv": (
            lambda: graph.PPFConv(_mlp(WIDTH + 4, OUT)),
            lambda layer, x, g: layer(x, g.positions, g.normals, g.edges),
        ),
        "PointTransformerConv": (
            lambda: graph.PointTransformerConv(WIDTH, OUT),
            lambda layer, x, g: layer(x, g.positions, g.edges),
        ),
        "HypergraphConv attention": (
            lambda: graph.HypergraphConv(WIDTH, OUT, use_attention=True),
            lambda layer, x, g: layer(x, g.edges, hyperedge_attr=x.sin()),
        ),
        "PNAConv": (
            lambda: graph.PNAConv(
                WIDTH, OUT, ["mean", "min", "max", "std", "var"], ["identity", "amplification"], DEGREES
            ),
            _plain,
        ),
        "GCN2Conv": (lambda: graph.GCN2Conv(WIDTH, 0.1, 0.5, 1), lambda layer, x, g: layer(x, x.sin(), g.edges)),
        "PANConv": (lambda: graph.PANConv(WIDTH, OUT, 2), lambda layer, x, g: layer(x, g.edges)[0]),
        "WLConvContinuous": (graph.WLConvContinuous, _plain),
        "FAConv": (lambda: graph.FAConv(WIDTH), lambda layer, x, g: layer(x, x.sin(), g.edges)),
        "EGConv": (lambda: graph.EGConv(WIDTH, OUT, ["sum", "symnorm", "std"], 2, 2), _plain),
        "PDNConv": (lambda: graph.PDNConv(WIDTH, OUT, 3, 5), _with_features),
        "HGTConv": (lambda: graph.HGTConv(WIDTH, OUT, HETERO), _of_two_kinds),
        "HANConv": (lambda: graph.HANConv(WIDTH, OUT, HETERO), _of_two_kinds),
        "HeteroConv": (
            lambda: graph.HeteroConv({edge: graph.SAGEConv((-1, -1), OUT) for edge in HETERO[1]}),
            _of_two_kinds,
        ),
        "HEATConv": (
            lambda: graph.HEATConv(WIDTH, OUT, 2, 2, 3, 3, 3),
            lambda layer, x, g: layer(x, g.edges, g.node_kinds, g.kinds, g.features),
        ),
        "LGConv": (graph.LGConv, _plain),
        "PointGNNConv": (
            lambda: graph.PointGNNConv(_mlp(WIDTH, 3), _mlp(WIDTH + 3, OUT), _mlp(OUT, WIDTH)),
            lambda layer, x, g: layer(x, g.positions, g.edges),
        ),
        "GPSConv": (lambda: graph.GPSConv(WIDTH, graph.GCNConv(WIDTH, WIDTH), 2), _plain),
        "AntiSymmetricConv": (lambda: graph.AntiSymmetricConv(WIDTH), _plain),
        "DirGNNConv": (lambda: graph.DirGNNConv(graph.GCNConv(WIDTH, OUT)), _plain),
        "MeshCNNConv": (lambda: graph.MeshCNNConv(WIDTH, OUT), lambda layer, x, g: layer(x, _edge_pairs())),
    }  # fmt: skip


DEGREES = torch.tensor([0, 0, 2, 4, 2])  # how many nodes have how many neighbours
HETERO = (["a", "b"], [("a", "to", "b"), ("b", "to", "a")])


def _of_two_kinds(layer: Any, x: Tensor, g: _Inputs) -> Any:
    nodes = {"a": x, "b": x.sin()}
    return layer(nodes, {HETERO[1][0]: g.edges, HETERO[1][1]: g.edges})


def _with_features(layer: Any, x: Tensor, g: _Inputs) -> Any:
    return layer(x, g.edges, g.features)


def _with_kinds(layer: Any, x: Tensor, g: _Inputs) -> Any:
    return layer(x, g.edges, g.kinds)


def _sorted(layer: Any, x: Tensor, g: _Inputs) -> Any:
    return layer(x, g.edges[:, g.edges[1].argsort(stable=True)])


def _edge_pairs() -> Tensor:
    """Four neighbours for each edge of a mesh."""
    ring = torch.arange(NODES)
    return torch.stack([ring.repeat_interleave(4), torch.stack([ring.roll(k) for k in (1, 2, 3, 4)], 1).flatten()])


def names() -> list[str]:
    return [*_layers(), *AGGREGATIONS]


def build(name: str) -> Case:
    x, g = torch.randn(NODES, WIDTH), _Inputs()
    model = nn.ModuleDict({"before": nn.Linear(WIDTH, WIDTH)}).double()
    if name in AGGREGATIONS:
        layer = getattr(graph.aggr, name)(**({"learn": True} if name.startswith(("Softmax", "Power")) else {})).double()
        model["layer"] = layer
        return case(model, lambda: layer(model["before"](x).sigmoid(), g.node_kinds.sort().values))
    make, call = _layers()[name]
    layer = model["layer"] = make().double()
    call(layer, x, g)  # initialises lazy weights
    return case(model, lambda: call(layer, model["before"](x), g))
