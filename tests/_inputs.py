"""Good calls of every public function and module, and ways to make them bad."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import Score

B, TQ, TK, D, A, R, DV, C, H, N, M, S, G, E, K = 2, 3, 5, 6, 4, 2, 7, 3, 2, 8, 9, 3, 2, 10, 3


def floats(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + len(shape))
    return torch.randn(shape, generator=generator)


def ints(*numbers: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


def bools(*shape: int) -> Tensor:
    return floats(*shape) > -1


class Row(NamedTuple):
    """A call that is good: of a function, or of a module that `make` makes."""

    make: Callable[[], Callable[..., Any]]
    arguments: dict[str, Any]

    @property
    def function(self) -> Callable[..., Any]:
        made = self.make()
        return made.forward if isinstance(made, nn.Module) else made

    def options(self) -> list[str]:
        """The arguments that are no tensors and no offsets."""
        return [n for n in inspect.signature(self.function).parameters if n in BAD_OPTIONS]


def _function(name: str) -> Callable[[], Any]:
    return lambda: getattr(fused_attn, name)


def _module(name: str, *args: Any, **options: Any) -> Callable[[], Any]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return getattr(fused_attn, name)(*args, **options).eval()

    return make


CU_N, CU_M = ints(0, 3, 3, N), ints(0, 2, 6, M)
P = 3 * 2 + 5 * 3  # pairs of queries of the one with keys of the other
INDPTR, INDICES = ints(0, 4, 4, 7, E), ints(0, 3, 2, 2, 1, 0, 2, 1, 1, 3)
MLP = {"w": floats(D, A), "b": floats(A), "v": floats(A)}
PAIRS = {"query": floats(B, TQ, A), "key": floats(B, TK, A), "value": floats(B, TK, DV)}
HEADS = {"query": floats(B, H, TQ, A), "key": floats(B, H, TK, A), "value": floats(B, H, TK, DV)}
PACKED = {
    "query": floats(N, A),
    "key": floats(M, A),
    "value": floats(M, DV),
    "cu_seqlens_q": CU_N,
    "cu_seqlens_k": CU_M,
}
MASKED = {"mask": bools(B, TK), "score_bias": floats(B, TQ, TK)}
MASKED_HEADS = {**MASKED, "score_bias": floats(B, H, TQ, TK)}
SCORE = Score(floats(D, A), floats(A), floats(A))
WORDS = {"w_y": floats(D, A), "w_h": floats(C, A), "w_r": floats(D, A), "w": floats(A), "w_t": floats(D, D)}
STEP = {
    "query": floats(B, A),
    "key": floats(B, TK, A),
    "value": floats(B, TK, DV),
    "v": floats(A),
    "previous": floats(B, TK).abs(),
    "conv_weight": floats(C, K),
    "u": floats(C, A),
    "mask": bools(B, TK),
    "score_bias": floats(B, TK),
}
STEP_PACKED = STEP | {
    "query": floats(S, A),
    "key": floats(N, A),
    "value": floats(N, DV),
    "previous": floats(N, R).abs(),
    "conv_weight": floats(C, R, K),
    "mask": bools(N),
    "score_bias": floats(N),
    "cu_seqlens": CU_N,
}
MLP_OF_FOUR = {
    "w1": floats(4 * D, A),
    "w2": floats(A, C),
    "v": floats(C),
    "b1": floats(A),
    "b2": floats(C),
    "b3": floats(),
}
HEADS_PACKED = PACKED | {"query": floats(N, H, A), "key": floats(M, H, A)}
NODES = {"query": floats(4, A), "key": floats(4, A), "v": floats(A), "indptr": INDPTR, "indices": INDICES}

ROWS: dict[str, Row] = {
    "location, linear": Row(
        _function("location_attention"),
        {"h": floats(B, TK, D), "w": floats(D), "b": floats(), "context": floats(B, TK), "mask": bools(B, TK)},
    ),
    "location, gated": Row(
        _function("location_attention"),
        {
            "h": floats(B, TK, D),
            **MLP,
            "gate": (floats(D, A), floats(A)),
            "context": floats(B, A),
            "value": floats(B, TK, DV),
            "mask": bools(B, TK),
            "score_bias": floats(B, TK),
        },
    ),
    "location, packed hops": Row(
        _function("location_attention"),
        {
            "h": floats(N, D),
            "w": floats(D, A),
            "b": floats(A),
            "v": floats(A, R),
            "context": floats(S, 1, A),
            "value": floats(N, DV),
            "mask": bools(N),
            "score_bias": floats(N),
            "cu_seqlens": CU_N,
        },
    ),
    "location, window": Row(
        _function("location_attention"), {"h": floats(B, TK, D), **MLP, "mask": bools(B, TK), "window": (None, 0)}
    ),
    "statistics": Row(
        _function("statistics_pooling"),
        {
            "h": floats(B, TK, D),
            **MLP,
            "context": floats(B, TK, A),
            "value": floats(B, TK, DV),
            "mask": bools(B, TK),
        },
    ),
    "statistics, packed": Row(
        _function("statistics_pooling"),
        {"h": floats(N, D), "w": floats(D, A), "b": floats(A), "v": floats(A, D), "cu_seqlens": CU_N},
    ),
    "statistics, hops": Row(
        _function("statistics_pooling"),
        {
            "h": floats(B, TK, D),
            **MLP,
            "v": floats(A, R),
            "value": floats(B, TK, DV),
            "score_bias": floats(B, R, TK),
            "hops": R,
            "mask": bools(B, TK),
        },
    ),
    "statistics, packed hops": Row(
        _function("statistics_pooling"),
        {"h": floats(N, D), "weight": floats(N, R).abs(), "hops": R, "cu_seqlens": CU_N},
    ),
    "target": Row(
        _function("target_attention"),
        {
            "query": floats(B, D),
            "key": floats(B, TK, D),
            **MLP_OF_FOUR,
            "value": floats(B, TK, DV),
            "mask": bools(B, TK),
        },
    ),
    "target, packed": Row(
        _function("target_attention"),
        {
            "query": floats(S, D),
            "key": floats(N, D),
            **MLP_OF_FOUR,
            "value": floats(N, DV),
            "mask": bools(N),
            "cu_seqlens": CU_N,
        },
    ),
    "concat": Row(_function("concat_attention"), {**PAIRS, "v": floats(A), **MASKED}),
    "concat, heads": Row(_function("concat_attention"), {**HEADS, "v": floats(H, A), **MASKED_HEADS}),
    "concat, packed": Row(_function("concat_attention"), {**PACKED, "v": floats(A)}),
    "distance": Row(_function("distance_attention"), {**PAIRS, "v": floats(A), **MASKED}),
    "distance, packed": Row(_function("distance_attention"), {**PACKED, "v": floats(A)}),
    "concat, packed heads": Row(
        _function("concat_attention"),
        {
            **HEADS_PACKED,
            "value": floats(M, H, DV),
            "v": floats(A),
            "score_bias": floats(P),
            "mask": bools(P, H),
        },
    ),
    "general": Row(_function("general_attention"), {**PAIRS, "weight": floats(A, A), **MASKED}),
    "general, heads": Row(_function("general_attention"), {**HEADS, "weight": floats(H, A, A), **MASKED_HEADS}),
    "general, dot": Row(_function("general_attention"), {"query": PAIRS["query"], "key": PAIRS["key"]}),
    "general, packed": Row(_function("general_attention"), {**PACKED, "weight": floats(A, A)}),
    "general, packed keys": Row(
        _function("general_attention"), {**PACKED, "query": floats(S, TQ, A), "cu_seqlens_q": None, "mask": bools(M)}
    ),
    "concat, packed queries": Row(
        _function("concat_attention"),
        {
            **PACKED,
            "key": floats(S, TK, A),
            "value": floats(S, TK, DV),
            "v": floats(A),
            "cu_seqlens_k": None,
            "mask": bools(S, TK),
        },
    ),
    "general, packed heads": Row(
        _function("general_attention"),
        {**HEADS_PACKED, "value": None, "weight": floats(A, A), "score_bias": floats(P, H)},
    ),
    "graph": Row(
        _function("graph_attention"),
        {
            **NODES,
            "value": floats(4, DV),
            "edge": floats(E, A),
            "transposed": fused_attn.transpose_csr(INDPTR, INDICES, 4),
        },
    ),
    "graph, heads": Row(
        _function("graph_attention"),
        {
            **NODES,
            "query": floats(4, H, A),
            "key": floats(4, H, A),
            "v": floats(H, A),
            "value": floats(4, H, DV),
            "edge": floats(E, H, A),
        },
    ),
    "csr_from_edges": Row(
        _function("csr_from_edges"), {"edge_index": ints(0, 1, 2, 2, 1, 0).view(2, 3), "num_queries": 3}
    ),
    "transpose_csr": Row(_function("transpose_csr"), {"indptr": INDPTR, "indices": INDICES, "num_keys": 4}),
    "hierarchical": Row(
        _function("hierarchical_attention"),
        {
            "h": floats(N, D),
            "inner_offsets": CU_N,
            "outer_offsets": ints(0, 1, S),
            "inner": SCORE,
            "outer": SCORE,
            "mask": bools(N),
        },
    ),
    "word by word": Row(
        _function("word_by_word_attention"),
        {
            "premise": floats(B, TK, D),
            "hypothesis": floats(B, TQ, C),
            **WORDS,
            "state": floats(B, D),
            "mask": bools(B, TK),
        },
    ),
    "word by word, packed": Row(
        _function("word_by_word_attention"),
        {
            "premise": floats(N, D),
            "hypothesis": floats(M, C),
            **WORDS,
            "state": floats(S, D),
            "cu_seqlens_premise": CU_N,
            "cu_seqlens_hypothesis": CU_M,
        },
    ),
    "word by word, packed premise": Row(
        _function("word_by_word_attention"),
        {
            "premise": floats(N, D),
            "hypothesis": floats(S, TQ, C),
            **WORDS,
            "state": floats(S, D),
            "cu_seqlens_premise": CU_N,
        },
    ),
    "word by word, packed hypothesis": Row(
        _function("word_by_word_attention"),
        {
            "premise": floats(S, TK, D),
            "hypothesis": floats(M, C),
            **WORDS,
            "state": floats(S, D),
            "mask": bools(S, TK),
            "cu_seqlens_hypothesis": CU_M,
        },
    ),
    "location aware": Row(_function("location_aware_attention"), STEP),
    "location aware, packed": Row(_function("location_aware_attention"), STEP_PACKED),
    "LocationAttention": Row(
        _module("LocationAttention", D, A, hops=R, gated=True, context_dim=C),
        {
            "h": floats(B, TK, D),
            "context": floats(B, C),
            "value": floats(B, TK, DV),
            "mask": bools(B, TK),
            "score_bias": floats(B, TK),
        },
    ),
    "LocationAttention, packed": Row(
        _module("LocationAttention", D, context_dim=C),
        {"h": floats(N, D), "context": floats(S, 1, C), "cu_seqlens": CU_N},
    ),
    "StatisticsPooling": Row(
        _module("StatisticsPooling", D, A, per_channel=True, global_context=True),
        {"h": floats(N, D), "mask": bools(N), "cu_seqlens": CU_N},
    ),
    "TargetAttention": Row(
        _module("TargetAttention", D, A, C),
        {"query": floats(B, D), "key": floats(B, TK, D), "value": floats(B, TK, DV), "mask": bools(B, TK)},
    ),
    "TargetAttention, packed": Row(
        _module("TargetAttention", D, A, None, softmax=True),
        {"query": floats(S, D), "key": floats(N, D), "mask": bools(N), "cu_seqlens": CU_N},
    ),
    "DistanceAttention": Row(
        _module("DistanceAttention", D, C, A, num_heads=H),
        {"query": floats(B, TQ, D), "key": floats(B, TK, C), "value": floats(B, TK, DV), **MASKED_HEADS},
    ),
    "ConcatAttention": Row(
        _module("ConcatAttention", D, C, A, context_dims=[R], num_heads=H),
        {
            "query": floats(B, TQ, D),
            "key": floats(B, TK, C),
            "value": floats(B, TK, DV),
            "contexts": [floats(B, R)],
            **MASKED_HEADS,
        },
    ),
    "GeneralAttention": Row(
        _module("GeneralAttention", D, C, num_heads=H),
        {"query": floats(B, TQ, D), "key": floats(B, TK, C), "value": floats(B, TK, DV), **MASKED_HEADS},
    ),
    "GeneralAttention, packed": Row(
        _module("GeneralAttention", D, C),
        {"query": floats(N, D), "key": floats(M, C), "cu_seqlens_q": CU_N, "cu_seqlens_k": CU_M},
    ),
    "GraphAttention": Row(
        _module("GraphAttention", D, A, num_heads=H, edge_dim=C),
        {"x": floats(4, D), "indptr": INDPTR, "indices": INDICES, "edge": floats(E, C)},
    ),
    "GraphAttention, two kinds": Row(
        _module("GraphAttention", D, A, key_dim=C),
        {"x": (floats(4, D), floats(4, C)), "indptr": INDPTR, "indices": INDICES},
    ),
    "GraphAttention, self loops": Row(
        _module("GraphAttention", D, A, edge_dim=C, self_loops=True),
        {"x": floats(4, D), "indptr": ints(0, 1, 2, 2, 1, 3).view(2, 3), "edge": floats(3, C)},
    ),
    "HierarchicalAttention": Row(
        _module("HierarchicalAttention", D, A, inner_context_dim=C, outer_context_dim=R),
        {
            "h": floats(N, D),
            "inner_offsets": CU_N,
            "outer_offsets": ints(0, 1, S),
            "mask": bools(N),
            "inner_context": floats(S, C),
            "outer_context": floats(G, R),
        },
    ),
    "RaggedRNN": Row(
        lambda: fused_attn.RaggedRNN(nn.GRU(D, C)),
        {"rows": floats(N, D), "offsets": CU_N},
    ),
    "WordByWordAttention": Row(
        _module("WordByWordAttention", D, C, A),
        {"premise": floats(B, TK, D), "hypothesis": floats(B, TQ, C), "state": floats(B, D), "mask": bools(B, TK)},
    ),
    "LocationAwareAttention": Row(
        _module("LocationAwareAttention", D, C, A, channels=4, width=3),
        {
            "query": floats(B, D),
            "key": floats(B, TK, C),
            "value": floats(B, TK, DV),
            "previous": floats(B, TK).abs(),
            "projected": floats(B, TK, A),
            "mask": bools(B, TK),
            "score_bias": floats(B, TK),
        },
    ),
    "LocationAwareAttention, packed": Row(
        _module("LocationAwareAttention", D, C, A, channels=4, width=3),
        {"query": floats(S, D), "key": floats(N, C), "previous": floats(N).abs(), "cu_seqlens": CU_N},
    ),
}

HUGE, NAN, INFINITE = 10**400, float("nan"), float("inf")
TENSOR = torch.tensor(0.5)
BAD_OPTIONS: dict[str, dict[type[Exception], list[Any]]] = {
    "activation": {ValueError: ["Tanh ", "softplus"], TypeError: [[], {}, None, 3, NAN, b"tanh"]},
    "p": {
        ValueError: [NAN, INFINITE, 0, -1, 1.5, 3, HUGE, 10**5000, 1e300],
        TypeError: ["1", None, [], {}, True, 1j, TENSOR],
    },
    "impl": {ValueError: ["cuda"], TypeError: [[], {}, None, 3, NAN, TENSOR]},
    "dropout_p": {
        ValueError: [NAN, INFINITE, -0.1, 1, HUGE, 10**5000],
        TypeError: ["0.5", None, [], {}, True, 1j, TENSOR],
    },
    "scale": {
        ValueError: [NAN, INFINITE, -HUGE, 10**5000, 1e300],
        TypeError: ["1", None, [], {}, True, 1j, TENSOR],
    },
    "floor": {ValueError: [NAN, INFINITE, -1.0, HUGE, 1e300], TypeError: ["1", None, [], {}, False]},
    "window": {
        TypeError: [
            *(3, [], {}, "ab", {3, 5}, [None, 0.5], (1,), (1, 2, 3), [1, 2, 3]),
            *((0.5, 0), (None, 0.5), (True, 0), (None, True), (NAN, 0), ([], 0)),
        ]
    },
    "return_weights": {TypeError: [None, "yes", 1, 0.0, [], {}, NAN]},
    "hops": {ValueError: [0, -1, HUGE, 10**5000], TypeError: ["2", 2.0, True, [], NAN]},
    "num_queries": {ValueError: [-1, HUGE, 10**5000], TypeError: [None, "3", 3.0, True, [], NAN]},
    "between": {TypeError: [3, "x", [], {}]},
    "gate": {
        TypeError: [
            *(3, (), {}, floats(D, A), (floats(D, A),), (floats(D, A), floats(A), floats(A))),
            *((None, floats(A)), (None, None)),
        ]
    },
    "transposed": {TypeError: [3, (), {}, INDPTR, (INDPTR, INDICES), [INDPTR, INDICES, INDICES], (None, None, None)]},
    "inner": {
        TypeError: [None, 3, (floats(D, A),), SCORE._replace(gate=(None, None)), SCORE._replace(activation=[])]
    },
    "outer": {
        ValueError: [SCORE._replace(w=None, v=None)],
        TypeError: [None, 3, floats(D), SCORE._replace(gate_activation={})],
    },
    "contexts": {
        ValueError: [[], [("value", floats(B, R))]],
        TypeError: [3, None, "x", [3], [None], [("query",)], [(3, floats(B, R))]],
    },
    "x": {ValueError: [(), (floats(4, D),), (floats(4, D),) * 3], TypeError: [3, None, (None, None)]},
}
BAD_OPTIONS |= {
    "gate_activation": BAD_OPTIONS["activation"],
    **dict.fromkeys(
        ("return_segments", "softmax", "return_log_weights", "return_scores", "return_lse", "return_state"),
        BAD_OPTIONS["return_weights"],
    ),
    "num_keys": BAD_OPTIONS["num_queries"],
    "score_activation": BAD_OPTIONS["activation"],
    **dict.fromkeys(("deviation", "cumulative"), BAD_OPTIONS["return_weights"]),
    **dict.fromkeys(("correction", "eps", "ceiling"), BAD_OPTIONS["floor"]),
}


def tensors(arguments: dict[str, Any]) -> list[str]:
    return [name for name, x in arguments.items() if isinstance(x, Tensor)]


def map_tensors(change: Callable[[Tensor], Any], x: Any) -> Any:
    """`change` of every tensor in nested tuples, lists and dicts."""
    if isinstance(x, Tensor):
        return change(x)
    if isinstance(x, dict):
        return {name: map_tensors(change, item) for name, item in x.items()}
    if isinstance(x, (tuple, list)):
        y = [map_tensors(change, item) for item in x]
        return type(x)(*y) if hasattr(x, "_fields") else type(x)(y)
    return x


WRONG_VALUES = {"rank + 3", "rank 0", "meta"}  # of the kinds below; the others are wrong types


def bad_tensors(x: Tensor) -> dict[str, Any]:
    """What is no good in place of `x`, whatever it is for."""
    bad: dict[str, Any] = {
        "complex": x.to(torch.complex64),
        "int8": x.to(torch.int8),
        "float8": x.to(torch.float8_e4m3fn),
        "list": x.tolist(),
        "array": x.numpy(),
        "string": "x",
        "number": 1.0,
        "sparse": x.to_sparse() if x.dim() else 1j,
        "nested": torch.nested.nested_tensor([x, x]),
        "quantised": torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
        "rank + 3": x[None, None, None],
        "meta": x.to("meta"),
    }
    if x.dim() > 1:
        bad["jagged"] = torch.nested.as_nested_tensor([x, x], layout=torch.jagged)
        bad["rank 0"] = x.flatten()[0]
    if x.dim() == 2:
        bad["compressed"] = x.to_sparse_csr()
    if x.is_floating_point():
        bad |= {"float64": x.double(), "bool": x > 0, "int64": x.long()}
        bad |= {"mkldnn": x.to_mkldnn()} if x.dim() else {}
    else:
        bad |= {"float32": x.float(), "uint8": x.to(torch.uint8)}
    return bad


def bad_numbers(last: int) -> dict[str, Tensor]:
    """Four offsets whose numbers are wrong."""
    return {
        "decrease": ints(0, last, 1, last),
        "start past 0": ints(1, 2, 3, last),
        "start before 0": ints(-1, 2, 3, last),
        "end short": ints(0, 1, 2, last - 1),
        "end late": ints(0, 1, 2, last + 1),
        "far": ints(0, 2**31 - 1, 2, last),
    }


def bad_offsets(cu: Tensor, last: int) -> dict[str, Any]:
    """Offsets that are wrong, where there are four of them."""
    return bad_numbers(last) | {
        "int64": cu.long(),
        "int16": cu.short(),
        "none": ints(),
        "of rank 2": cu[None],
        "list": cu.tolist(),
        "meta": cu.to("meta"),
    }
