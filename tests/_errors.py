"""Bad calls that the matrix of test_inputs.py does not make: which good call, what is changed, what is raised.

Of the matrix are: a tensor of another kind, dtype or device, an axis longer by one, offsets whose numbers are wrong,
options and sizes of modules that are none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _inputs import CU_N, DV, INDICES, INDPTR, SCORE, TK, TQ, A, B, C, D, E, G, H, M, N, R, S, bools, floats, ints
from torch import nn

from fused_attn import (
    ConcatAttention,
    GraphAttention,
    HierarchicalAttention,
    LocationAttention,
    LocationAwareAttention,
    Score,
    transpose_csr,
)


class Bad(NamedTuple):
    """What is changed of a good call, and the error: its type and how its text starts."""

    error: type[Exception]
    text: str
    changed: dict[str, Any]


def _raises(error: type[Exception]) -> Callable[..., Bad]:
    def bad(text: str, **changed: Any) -> Bad:
        """`text`: the name of an argument, or with a colon more of the message."""
        return Bad(error, text if ": " in text else f"{text}: expected ", changed)

    return bad


value_error, type_error = _raises(ValueError), _raises(TypeError)

JAGGED = torch.nested.nested_tensor_from_jagged(floats(N, D), CU_N.long())
OTHER_JAGGED = torch.nested.nested_tensor_from_jagged(floats(N + 1, D), ints(0, 3, 3, N + 1, dtype=torch.int64))
NONE = dict.fromkeys(("context", "value", "mask", "score_bias"))
EQUAL = {"w": None, "b": None, "v": None, "context": None}  # statistics without a score

LOCATION = {
    "h of rank 1": value_error("h", h=floats(D)),
    "h of rank 2 without cu_seqlens": value_error("h", h=floats(TK, D)),
    "h of rank 4": value_error("h", h=floats(1, B, TK, D)),
    "h without features": value_error("h", h=floats(B, TK, 0), w=floats(0, A)),
    "h with channels first": value_error(
        "w: expected shape (D, A) with D = 5 from h; got (6, 4): D is 6; "
        "looks as if h had channels first: pass h.transpose(1, 2)",
        h=floats(B, D, TK),
    ),
    "w of a layer": value_error(
        "w: expected shape (D, A) with D = 6 from h; got (4, 6): D is 4; looks like `nn.Linear.weight`: pass `w.t()`",
        w=floats(A, D),
    ),
    "w of rank 1 with v": value_error("w", w=floats(D)),
    "w of rank 3": value_error("w", w=floats(D, A, 1)),
    "w without columns": value_error("w", w=floats(D, 0), b=floats(0), v=floats(0)),
    "b of rank 0 for hops": value_error("b", w=floats(D, R), b=floats(), v=None, gate=None, context=None),
    "b of rank 2": value_error("b", b=floats(1, A)),
    "v of rank 3": value_error("v", v=floats(A, R, 1)),
    "v without hops": value_error("v", v=floats(A, 0)),
    "neither w nor v": value_error("w", w=None, b=None, v=None, gate=None, context=None),
    "gate without w": value_error("w", w=None, b=None, v=floats(D)),
    "v of another width than h, without w": value_error("v", w=None, b=None, gate=None),
    "gate without v": value_error("gate", v=None, context=None),
    "gate without a weight": type_error(
        "gate: expected a pair (weight, bias or None), or None for no gate; got None as its weight",
        gate=(None, floats(A)),
    ),
    "gate weight of another width": value_error("gate[0]", gate=(floats(D, A + 1), None)),
    "gate weight of another dtype": type_error("gate[0]", gate=(floats(D, A).half(), None)),
    "gate bias of another width": value_error("gate[1]", gate=(floats(D, A), floats(A + 1))),
    "gate bias of another dtype": type_error("gate[1]", gate=(floats(D, A), floats(A).half())),
    "context of other rows": value_error("context", context=floats(B, TK + 1, A)),
    "context of rank 1": value_error("context", context=floats(A)),
    "the second context of other rows": value_error(
        "context[1]: expected shape (B, A) or (B, T, A) or (B, 1, A) with B = 2 from h, A = 4 from w, T = 5 from h; "
        "got (2, 2, 4)",
        context=[floats(B, A), floats(B, 2, A)],
    ),
    "no context in a list": value_error("context: expected a tensor, or one or more of them; got none", context=[]),
    "None among contexts": type_error(
        "context[1]: expected a torch.Tensor; got NoneType", context=[floats(B, A), None]
    ),
    "values of rank 2": value_error("value", value=floats(B, TK)),
    "mask of rank 1": value_error("mask", mask=bools(TK)),
    "score_bias of rank 3": value_error("score_bias", score_bias=floats(B, TK, 1)),
    "cu_seqlens with padded keys": value_error("h", cu_seqlens=CU_N),
    "dropout_p of 1": value_error("dropout_p: expected 0 <= dropout_p < 1; got 1.0", dropout_p=1.0),
    "another score_activation": value_error(
        "score_activation: expected one of identity, logsigmoid; got 'sigmoid'", score_activation="sigmoid"
    ),
    "score_activation is a function": type_error("score_activation", score_activation=torch.sigmoid),
    "jagged h with a mask": value_error("mask", h=JAGGED, **NONE | {"mask": bools(N)}),
    "jagged h with cu_seqlens": value_error("cu_seqlens", h=JAGGED, **NONE, cu_seqlens=CU_N),
    "jagged h with a context of other sequences": value_error(
        "context: expected a vector a sequence, S = 3 from h, or a jagged tensor of one a row; got (5, 4)",
        h=JAGGED,
        **NONE | {"context": floats(5, A)},
    ),
    "jagged h with packed values": value_error("value", h=JAGGED, **NONE | {"value": floats(N, D)}),
    "jagged h with values of other segments": value_error("value", h=JAGGED, **NONE | {"value": OTHER_JAGGED}),
    "jagged h with a list as values": type_error("value", h=JAGGED, **NONE | {"value": [0.0]}),
    "jagged h with packed score_bias": value_error("score_bias", h=JAGGED, **NONE | {"score_bias": floats(N)}),
}
LOCATION_PACKED = {
    "h of rank 3": value_error("h", h=floats(1, N, D)),
    "context of other segments": value_error("context", context=floats(S + 1, A)),
    "context of S = N": value_error("context", context=floats(N, A), cu_seqlens=ints(*range(N + 1))),
    "cu_seqlens of rank 0": value_error("cu_seqlens", cu_seqlens=ints(0)[0]),
    "weights of a window": value_error("return_weights", window=(None, 0), return_weights=True, **NONE),
}
LOCATION_WINDOW = {
    "weights over jagged rows": value_error("return_weights", h=JAGGED, mask=None, return_weights=True),
    "a state over jagged rows": value_error("return_state", h=JAGGED, mask=None, return_state=True),
}
LOCATION_MODULE = {
    "h with channels first": value_error(
        "h: expected shape (B, T, dim) with dim = 6 from the constructor; got (2, 6, 5): dim is 5; "
        "looks like channels first: pass h.transpose(1, 2)",
        h=floats(B, D, TK),
    ),
    "h of a dtype that the parameters have not": type_error(
        "h: expected dtype float32, that of the module's parameters; got bfloat16: "
        "use module.to(torch.bfloat16) or torch.autocast",
        h=floats(B, TK, D).bfloat16(),
    ),
    "sparse h": type_error(
        "h: expected a dense tensor; got layout torch.sparse_coo: pass h.to_dense()", h=floats(B, TK, D).to_sparse()
    ),
    "jagged h with a context of other sequences": value_error(
        "context: expected a vector a sequence, S = 3 from h, or a jagged tensor of one a row; got (5, 3)",
        h=JAGGED,
        **NONE | {"context": floats(5, C)},
    ),
}

STATISTICS = {
    "h is missing": type_error("h: expected a torch.Tensor; got NoneType", h=None),
    "h of rank 2": value_error(
        "h: expected shape (B, T, D); got (5, 6); packed rows go with cu_seqlens", h=floats(TK, D)
    ),
    "h of rank 1, equal weights": value_error("h: expected shape (B, T, D); got (6,)", h=floats(D), **EQUAL),
    "h of rank 0": value_error("h: expected shape (B, T, D); got ()", h=floats()),
    "h of rank 0, equal weights": value_error("h: expected shape (B, T, D); got ()", h=floats(), **EQUAL),
    "h of integers": type_error(
        "h: expected dtype float16, bfloat16, float32, float64; got", h=ints(*range(B * TK * D)).view(B, TK, D)
    ),
    "h without features": value_error("h: expected at least one feature", h=floats(B, TK, 0), w=floats(0, A)),
    "w of another width": value_error("w: expected shape (D, A)", w=floats(D + 1, A)),
    "w of rank 1": value_error("w: expected shape (D, A)", w=floats(D)),
    "v of projected frames of another width": value_error(
        "v: expected shape (A,) or (A, C) with A = 6 from h, C = 7 from value; got (4,): A is 4", w=None, b=None
    ),
    "v alone is missing": value_error("v: expected a tensor with w; got None", v=None),
    "b without v": value_error("b: expected None without v", w=None, v=None),
    "context without v": value_error("context: expected None without v", **EQUAL | {"context": floats(B, A)}),
    "w of another dtype": type_error("w: expected dtype float32; got float16", w=floats(D, A).half()),
    "b of another width": value_error("b: expected shape (A,) with A = 4 from w; got (5,): A is 5", b=floats(A + 1)),
    "v of another width": value_error(
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 7 from value; got (5,): A is 5", v=floats(A + 1)
    ),
    "v of other channels": value_error(
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 6 from h; got (4, 7): C is 7",
        v=floats(A, D + 1),
        value=None,
    ),
    "v of the channels of h": value_error(
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 7 from value; got (4, 6): C is 6", v=floats(A, D)
    ),
    "v without channels": value_error(
        "v: expected shape (A,) or (A, C) with A = 4 from w, C = 7 from value; got (4, 0): C is 0", v=floats(A, 0)
    ),
    "v is a number": type_error("v: expected a torch.Tensor; got float", v=1.0),
    "context of another width": value_error(
        "context: expected shape (B, A) or (B, T, A) or (B, 1, A) with B = 2 from h, A = 4 from w, T = 5 from h; "
        "got (2, 5)",
        context=floats(B, A + 1),
    ),
    "values of other rows": value_error(
        "value: expected shape (B, T, C) with B = 2 from h, T = 5 from h; got (2, 6, 3): T is 6",
        value=floats(B, TK + 1, 3),
    ),
    "values without channels": value_error("value: expected at least one channel", value=floats(B, TK, 0)),
    "values of another dtype": type_error(
        "value: expected dtype float32; got float64", value=floats(B, TK, D).double()
    ),
    "mask of numbers": type_error(
        "mask: expected dtype bool; got float32; True = may be attended", mask=floats(B, TK)
    ),
    "mask of other rows": value_error(
        "mask: expected shape (B, T) with B = 2 from h, T = 5 from h; got (2, 6): T is 6", mask=bools(B, TK + 1)
    ),
    "jagged h with a mask": value_error(
        "mask: expected None with a jagged h", h=JAGGED, mask=bools(N), context=None, value=None
    ),
    "cu_seqlens with padded keys": value_error("h: expected shape (N, D); got (2, 5, 6)", cu_seqlens=CU_N),
    "unknown activation": value_error("activation: expected one of identity, tanh", activation="softplus"),
    "floor under 0": value_error("floor: expected a finite number of at least 0; got -1e-06", floor=-1e-6),
    "floor of NaN": value_error("floor: expected a finite number of at least 0; got nan", floor=float("nan")),
    "floor of infinity": value_error("floor: expected a finite number of at least 0; got inf", floor=float("inf")),
    "floor is None": type_error("floor: expected a float; got NoneType", floor=None),
    "eps of 1e79": value_error("eps: expected a number whose root torch.float32 holds; got 1e+79", eps=1e79),
    "unknown impl": value_error("impl: expected one of auto, triton, reference; got 'cuda'", impl="cuda"),
}
STATISTICS_PACKED = {
    "context of other segments": value_error(
        "context: expected shape (S, A) or (N, A) or (S, 1, A) or (1, N, A) with S = 3 from cu_seqlens, A = 4 from w",
        context=floats(S + 1, A),
    ),
    "cu_seqlens of int64": type_error("cu_seqlens: expected dtype int32; got int64", cu_seqlens=CU_N.long()),
}

TARGET = {
    "query is missing": type_error("query: expected a torch.Tensor; got NoneType", query=None),
    "query with an axis of queries": value_error(
        "query: expected shape (B, D); got (2, 1, 6); pass query.squeeze(1)", query=floats(B, 1, D)
    ),
    "query of another width": value_error(
        "key: expected shape (B, T, D) with B = 2 from query, D = 7 from query; got (2, 5, 6): D is 6",
        query=floats(B, D + 1),
    ),
    "key without cu_seqlens": value_error("key: expected shape (B, T, D)", key=floats(N, D)),
    "w1 of a layer": value_error("w1: expected shape (4D, A) with 4D = 24 from query", w1=floats(A, 4 * D)),
    "w1 of three parts": value_error("w1: expected shape (4D, A) with 4D = 24 from query", w1=floats(3 * D, A)),
    "w2 of other units": value_error("w2: expected shape (A, K) with A = 4 from w1", w2=floats(A + 1, C)),
    "v of the first layer": value_error("v: expected shape (K,) with K = 3 from w2; got (4,): K is 4", v=floats(A)),
    "b2 without w2": value_error("b2: expected None without w2; got a tensor", w2=None, v=floats(A)),
    "b3 of rank 1": value_error("b3: expected shape ()", b3=floats(1)),
    "values of other rows": value_error("value: expected shape (B, T, Dv)", value=floats(B, TK + 1, DV)),
    "mask of numbers": type_error("mask: expected dtype bool; got float32", mask=floats(B, TK)),
    "mask of other rows": value_error("mask: expected shape (B, T)", mask=bools(B, TK + 1)),
    "unknown activation": value_error("activation: expected one of identity, tanh", activation="dice"),
    **{
        f"{name} without a softmax": value_error(
            f"{name}: expected False without softmax=True, which it is of; got True", **{name: True}
        )
        for name in ("return_log_weights", "return_lse", "return_state")
    },
    "jagged key with cu_seqlens": value_error(
        "cu_seqlens: expected None with a jagged key, which has offsets; got a tensor",
        key=JAGGED,
        query=floats(S, D),
        value=None,
        mask=None,
        cu_seqlens=CU_N,
    ),
    "jagged key with packed values": value_error(
        "value: expected a jagged tensor, as key is; got (8, 6)",
        key=JAGGED,
        query=floats(S, D),
        value=floats(N, D),
        mask=None,
    ),
    "jagged key of other users": value_error(
        "query: expected shape (S, D) with S = 3 from cu_seqlens; got (2, 6): S is 2",
        key=JAGGED,
        value=None,
        mask=None,
    ),
    "softmax of a number": type_error("softmax: expected True or False; got 1", softmax=1),
    "scale of infinity": value_error("scale: expected a finite number", scale=float("inf")),
}
TARGET_PACKED = {
    "query of other users": value_error(
        "query: expected shape (S, D) with S = 3 from cu_seqlens; got (4, 6): S is 4", query=floats(S + 1, D)
    ),
    "cu_seqlens of int64": type_error("cu_seqlens: expected dtype int32; got int64", cu_seqlens=CU_N.long()),
}

# Queries and keys: concat and general.
MASK = (
    "mask: expected shape (B, Tk), (B, Tq, Tk) or (B, H, Tq, Tk), 1 for any but Tk, with B = 2 from query, "
    "{heads}Tq = 3 from query, Tk = 5 from key; got {came}; True = may be attended"
)
BIAS = (
    "score_bias: expected shape (B, Tq, Tk), 1 for any, or (Tk,), with B = {} from query, Tq = 3 from query, "
    "Tk = 5 from key; got {}; pass "
)
BIAS_HEADS = (
    "score_bias: expected shape (B, H, Tq, Tk), 1 for any, or (Tk,), with B = 2 from query, H = 2 from query, "
    "Tq = 3 from query, Tk = 5 from key; got {}; pass "
)
PAIRS = {
    "query of rank 2 without cu_seqlens": value_error("query", query=floats(TQ, A)),
    "query of rank 5": value_error("query", query=floats(1, B, H, TQ, A)),
    "query is missing": type_error("query", query=None),
    "key with heads alone": value_error("key", key=floats(B, H, TK, A)),
    "key is missing": type_error("key", key=None),
    "value without features": value_error("value", value=floats(B, TK, 0)),
    "mask of other queries": value_error("mask", mask=bools(B, TQ + 1, TK)),
    "mask of the queries": value_error("mask", mask=bools(B, TQ)),
    "mask of pairs alone": value_error(
        MASK.format(heads="", came="(3, 5), pass (Tq, Tk) as mask[None]"), mask=bools(TQ, TK)
    ),
    "mask of other keys": value_error(MASK.format(heads="", came=(2, 6)), mask=bools(B, TK + 1)),
    "mask of one key": value_error(MASK.format(heads="", came=(2, 3, 1)), mask=bools(B, TQ, 1)),
    "mask of heads": value_error(MASK.format(heads="", came=(2, 2, 3, 5)), mask=bools(B, H, TQ, TK)),
    "mask of rank 5": value_error("mask", mask=bools(1, 1, 1, 1, TK)),
    "mask that is added": type_error(
        "mask: expected dtype bool; got float32; True = may be attended: pass mask.bool() of 0 and 1; "
        "what is added to the scores is no mask: pass it as score_bias=",
        mask=floats(B, TK),
    ),
    "mask of rank 1": value_error("mask", mask=bools(TK)),
    "score_bias of other keys": value_error("score_bias", score_bias=floats(TK + 1)),
    "score_bias of other queries": value_error("score_bias", score_bias=floats(TQ + 1, 1)),
    "score_bias with heads alone": value_error("score_bias", score_bias=floats(B, 1, TQ, TK)),
    "score_bias of a mask's form": value_error(
        BIAS.format(2, (2, 5)) + "score_bias[:, None] of (B, Tk)", score_bias=floats(B, TK)
    ),
    "score_bias of pairs alone": value_error(
        BIAS.format(2, (3, 5)) + "score_bias[None] of (Tq, Tk)", score_bias=floats(TQ, TK)
    ),
    "score_bias of as many queries as sequences": value_error(
        BIAS.format(3, (3, 5)) + "score_bias[None] of (Tq, Tk), score_bias[:, None] of (B, Tk)",
        query=floats(TQ, TQ, A),
        key=floats(TQ, TK, A),
        value=floats(TQ, TK, DV),
        mask=None,
        score_bias=floats(TQ, TK),
    ),
    "score_bias of no keys": value_error("score_bias", score_bias=floats(0)),
    "window is a number": type_error("window: expected a pair (left, right) of int or None; got 3", window=3),
}
PAIRS_HEADS = {
    "key without heads": value_error("key", key=floats(B, TK, A)),
    "value without heads": value_error("value", value=floats(B, TK, DV)),
    "mask of other heads": value_error(
        MASK.format(heads="H = 2 from query, ", came=(2, 3, 3, 5)), mask=bools(B, H + 1, TQ, TK)
    ),
    "score_bias of other heads": value_error("score_bias", score_bias=floats(H + 1, 1, 1)),
    "score_bias of a mask's form, of keys": value_error(
        BIAS_HEADS.format((2, 5)) + "score_bias[:, None, None] of (B, Tk)", score_bias=floats(B, TK)
    ),
    "score_bias of heads or sequences": value_error(
        BIAS_HEADS.format((2, 3, 5)) + "score_bias[None] of (H, Tq, Tk), score_bias[:, None] of (B, Tq, Tk)",
        score_bias=floats(H, TQ, TK),
    ),
}
PAIRS_PACKED = {
    "query of rank 4": value_error("query", query=floats(1, 1, N, A)),
    "query of rank 1": value_error("query", query=floats(N)),
    "key with heads alone": value_error("key", key=floats(M, H, A)),
    "key of other heads": value_error("key", query=floats(N, H, A), key=floats(M, H + 1, A)),
    "mask of the queries": value_error(
        "mask: expected shape (M,) or (P, 1) with M = 9 from key; got (8,): M is 8; True = may be "
        "attended; one of pairs has two axes",
        mask=bools(N),
    ),
    "mask of queries and keys": value_error("mask: expected shape (M,) or (P, 1)", mask=bools(N, M)),
    "mask of fewer pairs": value_error(
        "mask: expected P = 21 pairs, each query's with the keys of its sequence; got 20", mask=bools(20, 1)
    ),
    "mask of heads alone": value_error("mask", mask=bools(21, H)),
    "mask that is added": type_error("mask: expected dtype bool; got float32", mask=floats(M)),
    "score_bias": value_error(
        "score_bias: expected P = 21 pairs, each query's with the keys of its sequence; got 9", score_bias=floats(M)
    ),
    "score_bias of heads alone": value_error(
        "score_bias: expected shape (P,) or (P, 1); got (21, 2)", score_bias=floats(21, H)
    ),
    "score_bias of other pairs than the mask": value_error(
        "score_bias: expected shape (P,) or (P, 1) with P = 21 from mask; got (20,)",
        score_bias=floats(20),
        mask=bools(21, 1),
    ),
    "score_bias that is integers": type_error("score_bias", score_bias=floats(21).long()),
    "cu_seqlens_q alone": value_error("key", cu_seqlens_k=None),
    "cu_seqlens_k alone": value_error("query", cu_seqlens_q=None),
    "cu_seqlens_k of other sequences than padded queries": value_error(
        "cu_seqlens_k: expected shape (B + 1,) with B + 1 = 3 from query; got (4,)",
        query=floats(B, TQ, A),
        key=floats(M, A),
        value=floats(M, DV),
        cu_seqlens_q=None,
    ),
    "cu_seqlens_q of other sequences than padded keys": value_error(
        "cu_seqlens_q: expected shape (B + 1,) with B + 1 = 3 from key; got (4,)",
        query=floats(N, A),
        key=floats(B, TK, A),
        value=floats(B, TK, DV),
        cu_seqlens_k=None,
    ),
    "mask of packed keys that are padded": value_error(
        "mask: expected shape (B, Tk) or (P, 1) with B = 2 from key, Tk = 5 from key; got (10,)",
        query=floats(N, A),
        key=floats(B, TK, A),
        value=floats(B, TK, DV),
        cu_seqlens_q=ints(0, 3, N),
        cu_seqlens_k=None,
        mask=bools(B * TK),
    ),
    "cu_seqlens_k of other sequences": value_error("cu_seqlens_k", cu_seqlens_k=ints(0, 1, 5, 5, M)),
}
CONCAT = PAIRS | {
    "query without features": value_error("query", query=floats(B, TQ, 0), key=floats(B, TK, 0), v=floats(0)),
    "value is missing": type_error("value", value=None),
    "another score_activation": value_error("score_activation", score_activation="sigmoid"),
    "v with heads alone": value_error("v", v=floats(H, A)),
    "v of rank 0": value_error("v", v=floats()),
    "v of a layer with one output": value_error(
        "v: expected shape (A,) with A = 4 from query; got (1, 4); "
        "looks like the weight of a layer with one output: pass v.squeeze(0)",
        v=floats(1, A),
    ),
    "key of another batch": value_error(
        "key: expected shape (B, Tk, A) with B = 2 from query, A = 4 from query; got (3, 5, 4): B is 3",
        key=floats(B + 1, TK, A),
    ),
}
GENERAL = PAIRS | {
    "key without features": value_error("key", key=floats(B, TK, 0)),
    "weight with heads alone": value_error("weight", weight=floats(H, A, A)),
    "weight of rank 1": value_error("weight", weight=floats(A)),
    "scale a head without heads": value_error("scale: expected shape (); got (2,)", scale=floats(H)),
    "another score_activation": value_error("score_activation", score_activation="sigmoid"),
    "scale of another dtype": type_error("scale", scale=floats().half()),
}
GENERAL_HEADS = PAIRS_HEADS | {
    "key of other heads": value_error(
        "key: expected shape (B, H, Tk, Dk) or (B, 1, Tk, Dk) with B = 2 from query, H = 2 from query; "
        "got (2, 3, 5, 4)",
        key=floats(B, H + 1, TK, A),
    ),
    "scale of other heads": value_error(
        "scale: expected shape () or (H,) with H = 2 from query; got (3,)", scale=floats(H + 1)
    ),
    "scale a query": value_error("scale", scale=floats(B, H, TQ)),
}
GENERAL_DOT = {
    "query without features": value_error("query", query=floats(B, TQ, 0), key=floats(B, TK, 0)),
    "key of another width": value_error("key", key=floats(B, TK, A + 1)),
}
CONCAT_PACKED = {
    "no offsets": value_error(
        "query: expected shape (B, Tq, A) or (B, H, Tq, A); got (8, 4); "
        "packed rows go with cu_seqlens_q, and one query a sequence is query[:, None]",
        cu_seqlens_q=None,
        cu_seqlens_k=None,
    ),
}
CONCAT_MODULE = {
    "query of rank 2": value_error(
        "query: expected shape (B, Tq, query_dim) with query_dim = 6 from the constructor; got (3, 6); "
        "packed rows go with cu_seqlens_q, and one query a sequence is query[:, None]",
        query=floats(TQ, D),
    ),
    "query of another width": value_error(
        "query: expected shape (B, Tq, query_dim) with query_dim = 6 from the constructor; got (2, 3, 7): "
        "query_dim is 7",
        query=floats(B, TQ, D + 1),
    ),
    "key of rank 2": value_error(
        "key: expected shape (B, Tk, key_dim) with B = 2 from query, key_dim = 3 from the constructor; got (5, 3); "
        "packed rows go with cu_seqlens_k",
        key=floats(TK, C),
    ),
    "a context that is no list, packed queries": type_error(
        "contexts: expected a list or tuple, one for each of context_dims; got Tensor",
        query=floats(N, D),
        cu_seqlens_q=ints(0, 3, N),
        contexts=floats(B, R),
    ),
    "two contexts": value_error("contexts", contexts=[floats(B, R)] * 2),
    "context of rank 1": value_error("contexts[0]", contexts=[floats(R)]),
    "context of other rows": value_error("contexts[0]", contexts=[floats(B, TQ + 9, R)]),
    "context of rank 4": value_error("contexts[0]", contexts=[floats(B, 1, TQ, R)]),
    "context of batch 1": value_error(
        "contexts[0]: expected shape (B, C) or (B, Tq, C) or (B, Tk, C) or (B, 1, C) with B = 2 from query, "
        "C = 2 from context_dims[0], Tq = 3 from query, Tk = 5 from key; got (1, 2): B is 1",
        contexts=[floats(1, R)],
    ),
    "context of the keys, of batch 1": value_error(
        "contexts[0]: expected shape (B, Tk, C) with B = 2 from query, Tk = 5 from key, C = 2 from context_dims[0]; "
        "got (1, 5, 2): B is 1",
        contexts=[("key", floats(1, TK, R))],
    ),
    "context of the sequence, with a side": value_error(
        "contexts[0]: expected shape (B, Tq, C) with ", contexts=[("query", floats(B, R))]
    ),
    "context of the other side": value_error("contexts[0]", contexts=[("key", floats(B, TQ, R))]),
    "context of one row each, as many queries as keys": value_error(
        'contexts[0]: expected (B, C), (B, Tq, C) or (B, Tk, C), where Tq = Tk = 5 as ("query", x) or ("key", x)',
        query=floats(B, TK, D),
        contexts=[floats(B, TK, R)],
        score_bias=None,
    ),
}
GENERAL_MODULE = {
    "query of rank 2": value_error("query", query=floats(TQ, D)),
    "key of rank 2": value_error("key", key=floats(TK, C)),
}

TRANSPOSED = transpose_csr(INDPTR, INDICES, 4)


def _transposed(error: Callable[..., Bad], at: int, x: torch.Tensor) -> Bad:
    return error(f"transposed[{at}]", transposed=(*TRANSPOSED[:at], x, *TRANSPOSED[at + 1 :]))


EDGES = {"indices": None, "edge": None, "transposed": None}  # beside a list of edges
GRAPH = {
    "query of rank 1": value_error("query", query=floats(A)),
    "query of rank 4": value_error("query", query=floats(1, 4, H, A)),
    "query without features": value_error("query", query=floats(4, 0), key=floats(4, 0), v=floats(0)),
    "key with heads alone": value_error("key", key=floats(4, H, A)),
    "v with heads alone": value_error("v", v=floats(H, A)),
    "v is missing": type_error("v", v=None),
    "value without features": value_error("value", value=floats(4, 0)),
    "indptr of other nodes": value_error("indptr", indptr=ints(0, E)),
    "indices of rank 2": value_error("indices", indices=INDICES[None]),
    "indices of 16 bits": type_error("indices", indices=INDICES.short()),
    "key is missing beside a list of edges": type_error(
        "key: expected a torch.Tensor; got NoneType", key=None, indptr=ints(0, 1, 1, 0).view(2, 2), **EDGES
    ),
    "query of rank 0 beside a list of edges": value_error(
        "query: expected shape (Nq, A)", query=floats(), indptr=ints(0, 1, 1, 0).view(2, 2), **EDGES
    ),
    "permutation of other edges": _transposed(value_error, 2, ints(0, 1)),
    "permutation of numbers": _transposed(type_error, 2, floats(E)),
    "transposed of other nodes": _transposed(value_error, 0, ints(0, 1, E)),
    "transposed of other edges": _transposed(value_error, 1, ints(0)),
}
GRAPH_HEADS = {
    "key of other heads": value_error("key", key=floats(4, H + 1, A)),
    "value without heads": value_error("value", value=floats(4, DV)),
    "edge without heads": value_error("edge", edge=floats(E, A)),
}
GRAPH_MODULE = {
    "x of rank 3": value_error("x", x=floats(4, D, 1)),
    "edge is missing": value_error("edge", edge=None),
    "edge of rank 1": value_error("edge", edge=floats(E)),
}
GRAPH_MODULE_TWO = {
    "keys of another width": value_error("x[1]", x=(floats(4, D), floats(4, C + 1))),
    "edge without edge_dim": value_error("edge", edge=floats(E, 2)),
}

HIERARCHICAL = {
    "h of rank 3": value_error("h", h=floats(1, N, D)),
    "h without features": value_error("h", h=floats(N, 0)),
    "outer_offsets of rank 0": value_error("outer_offsets", outer_offsets=ints(0)[0]),
    "outer_offsets empty": value_error("outer_offsets", outer_offsets=ints()),
    "outer_offsets of int64": type_error("outer_offsets", outer_offsets=ints(0, 1, S, dtype=torch.int64)),
    "inner w of another width": value_error("inner.w", inner=SCORE._replace(w=floats(D + 1, A))),
    "inner w of another dtype": type_error("inner.w", inner=SCORE._replace(w=floats(D, A).half())),
    "inner w with hops": value_error("inner.w", inner=Score(floats(D, 2))),
    "inner b of another width": value_error("inner.b", inner=SCORE._replace(b=floats(A + 1))),
    "inner v of another width": value_error("inner.v", inner=SCORE._replace(v=floats(A + 1))),
    "inner gate of another width": value_error("inner.gate[0]", inner=SCORE._replace(gate=(floats(D, A + 1), None))),
    "inner context of groups": value_error("inner.context", inner=SCORE._replace(context=floats(G, A))),
    "inner activation": value_error("inner.activation", inner=SCORE._replace(activation="softplus")),
    "outer w of another width": value_error("outer.w", outer=SCORE._replace(w=floats(D + 1, A))),
    "outer w missing": value_error("outer.w", outer=Score(None)),
    "outer v of another width": value_error("outer.v", outer=SCORE._replace(v=floats(A + 1))),
    "outer v with hops": value_error("outer.v", outer=SCORE._replace(v=floats(A, 2))),
    "outer gate is a tensor": type_error("outer.gate", outer=SCORE._replace(gate=floats(D, A))),
    "outer gate_activation": value_error("outer.gate_activation", outer=SCORE._replace(gate_activation="softplus")),
    "outer context of another width": value_error("outer.context", outer=SCORE._replace(context=floats(G, A + 1))),
    "outer context of rows": value_error("outer.context", outer=SCORE._replace(context=floats(N, A))),
    "outer context where G = S": value_error(
        "outer.context", outer=SCORE._replace(context=floats(S, A)), outer_offsets=ints(0, 1, 2, S)
    ),
    "between of another width": value_error("between", between=lambda segments, _: segments[:, :2]),
    "between of other rows": value_error("between", between=lambda segments, _: segments[:2]),
    "between of another dtype": type_error("between", between=lambda segments, _: segments.half()),
    "between gives a pair": type_error("between", between=lambda segments, _: (segments, None)),
}

WORDS = {
    "premise of rank 2": value_error("premise", premise=floats(TK, D)),
    "premise without features": value_error("premise", premise=floats(B, TK, 0)),
    "premise is missing": type_error("premise", premise=None),
    "w of rank 2": value_error("w", w=floats(A, 1)),
    "w of no width": value_error("w", w=floats(0)),
    "w_h of the other width": value_error("w_h", w_h=floats(D, A)),
    "w_r transposed": value_error("w_r", w_r=floats(A, D)),
    "w_t of the other width": value_error("w_t", w_t=floats(D, A)),
    "mask of the hypothesis": value_error("mask", mask=bools(B, TQ)),
}
WORDS_PACKED = {
    "padded premise": value_error("premise", premise=floats(B, TK, D)),
    "padded hypothesis": value_error("hypothesis", hypothesis=floats(B, TQ, C)),
    "mask": value_error("mask", mask=bools(N)),
    "return_weights": value_error("return_weights", return_weights=True),
    "cu_seqlens_premise is missing": value_error(
        "premise: expected shape (B, Ty, D); got (8, 6); packed rows go with cu_seqlens_premise",
        cu_seqlens_premise=None,
    ),
    "cu_seqlens_hypothesis is missing": value_error(
        "hypothesis: expected shape (B, Th, Dh); got (9, 3); packed rows go with cu_seqlens_hypothesis",
        cu_seqlens_hypothesis=None,
    ),
    "premise padded alone, of another batch": value_error(
        "cu_seqlens_hypothesis: expected shape (B + 1,) with B + 1 = 3 from premise; got (4,)",
        premise=floats(B, TK, D),
        cu_seqlens_premise=None,
        state=None,
    ),
    "hypothesis padded alone, of another batch": value_error(
        "cu_seqlens_premise: expected shape (B + 1,) with B + 1 = 3 from hypothesis; got (4,)",
        hypothesis=floats(B, TQ, C),
        cu_seqlens_hypothesis=None,
        state=None,
    ),
    "hypothesis padded alone, with weights": value_error(
        "return_weights: expected False with a packed premise, pad the batch to see them; got True",
        hypothesis=floats(S, TQ, C),
        cu_seqlens_hypothesis=None,
        return_weights=True,
    ),
    "cu_seqlens_hypothesis of other pairs": value_error("cu_seqlens_hypothesis", cu_seqlens_hypothesis=ints(0, M)),
}
STEP = {
    "query with an axis of queries": value_error("query", query=floats(B, 1, A)),
    "query is missing": type_error("query", query=None),
    "conv_weight of a layer": value_error("conv_weight", conv_weight=floats(C, 1, 3)),
    "conv_weight of even width": value_error("conv_weight", conv_weight=floats(C, 4)),
    "conv_weight without channels": value_error("conv_weight", conv_weight=floats(0, 3)),
    "u transposed": value_error("u", u=floats(A, C)),
    "mask with an axis of queries": value_error("mask", mask=bools(B, 1, TK)),
    "score_bias of rank 1": value_error("score_bias", score_bias=floats(TK)),
}
STEP_MODULE = {
    "query with an axis of queries": value_error(
        "query: expected shape (B, query_dim) with query_dim = 6 from the constructor; got (2, 1, 6); "
        "pass query.squeeze(1)",
        query=floats(B, 1, D),
    ),
    "projected keys of other keys": value_error(
        "projected: expected shape (B, Tk, attn_dim) with B = 2 from query, Tk = 5 from key, "
        "attn_dim = 4 from the constructor; got (2, 6, 4): Tk is 6",
        projected=floats(B, TK + 1, A),
    ),
}

BAD = {
    f"{row}: {title}": (row, bad)
    for row, table in {
        "location, gated": LOCATION,
        "location, linear": {"b of rank 1": value_error("b", b=floats(1))},
        "location, packed hops": LOCATION_PACKED,
        "location, window": LOCATION_WINDOW,
        "LocationAttention": LOCATION_MODULE,
        "statistics": STATISTICS,
        "statistics, packed": STATISTICS_PACKED,
        "target": TARGET,
        "target, packed": TARGET_PACKED,
        "concat": CONCAT,
        "concat, heads": PAIRS_HEADS,
        "concat, packed": PAIRS_PACKED | CONCAT_PACKED,
        "ConcatAttention": CONCAT_MODULE,
        "general": GENERAL,
        "general, dot": GENERAL_DOT,
        "general, heads": GENERAL_HEADS,
        "general, packed": PAIRS_PACKED,
        "GeneralAttention": GENERAL_MODULE,
        "graph": GRAPH,
        "graph, heads": GRAPH_HEADS,
        "GraphAttention": GRAPH_MODULE,
        "GraphAttention, two kinds": GRAPH_MODULE_TWO,
        "csr_from_edges": {"edge_index of rank 1": value_error("edge_index", edge_index=ints(0, 1))},
        "hierarchical": HIERARCHICAL,
        "word by word": WORDS,
        "word by word, packed": WORDS_PACKED,
        "location aware": STEP,
        "LocationAwareAttention": STEP_MODULE,
    }.items()
    for title, bad in table.items()
}

# Of the CPU: wrong numbers in a structure stop the program on a GPU.
ON_CPU = {
    f"{row}: {title}": (row, bad)
    for row, table in {
        "LocationAttention": {
            "h on another device": value_error(
                "h: expected device cpu; got meta: that of the module's parameters is cpu",
                h=floats(B, TK, D).to("meta"),
            )
        },
        "statistics, packed": {
            "from under 0": value_error("cu_seqlens: expected non-decreasing offsets", cu_seqlens=CU_N - 1)
        },
        "graph": {
            "indptr of degrees": value_error(
                f"indptr: expected non-decreasing offsets from 0 to the number of edges, {E}; got [4, 0, 3, 1, 0]; "
                "looks like lengths: pass their sums, F.pad(x.cumsum(0), (1, 0)), of them",
                indptr=ints(4, 0, 3, 1, 0),
            ),
            "indptr not from 0": value_error("indptr", indptr=ints(1, 4, 4, 7, E)),
            "indptr that ends early": value_error("indptr", indptr=ints(0, 4, 4, 7, E - 1)),
            "indptr that ends late": value_error("indptr", indptr=ints(0, 4, 4, 7, E + 1)),
            "indptr that decreases": value_error("indptr", indptr=ints(0, 4, 3, 7, E)),
            "indices under 0": value_error("indices", indices=INDICES - 1),
            "indices past the last key": value_error("indices", indices=INDICES + 1),
            "transposed without its end": _transposed(value_error, 0, ints(0, 1, 2, 3, 4)),
            "transposed past the last query": _transposed(value_error, 1, TRANSPOSED[1] + 1),
            "permutation past the last edge": _transposed(value_error, 2, TRANSPOSED[2] + 1),
        },
        "csr_from_edges": {
            "a query past the last": value_error("edge_index[1]", edge_index=ints(0, 1, 0, 3).view(2, 2)),
            "a key under 0": value_error("edge_index[0]", edge_index=ints(0, -1, 0, 1).view(2, 2)),
        },
        "transpose_csr": {
            "indices past the last key": value_error("indices", num_keys=3),
            "indptr that ends late": value_error("indptr", indptr=ints(0, 4, 4, 7, E + 1)),
            "indptr empty": value_error("indptr", indptr=ints(), indices=ints()),
        },
        "hierarchical": {
            "outer_offsets not from 0": value_error(
                "outer_offsets: expected non-decreasing offsets from 0", outer_offsets=ints(1, 2, S)
            ),
            "outer_offsets of counts": value_error(
                "outer_offsets: expected non-decreasing offsets from 0 to the number of segments, 3; got [1, 2]; "
                "looks like lengths: pass Segments.from_lengths(...) of them",
                outer_offsets=ints(1, 2),
            ),
            "outer_offsets past S": value_error(
                "outer_offsets: expected non-decreasing offsets from 0", outer_offsets=ints(0, 1, S + 1)
            ),
        },
        "word by word, packed": {
            "premise short": value_error("cu_seqlens_premise", cu_seqlens_premise=ints(0, 2, 4, N - 1)),
        },
    }.items()
    for title, bad in table.items()
}

# Offsets into nine rows that are wrong, and what the error says of why.
_LENGTHS = "looks like lengths: pass Segments.from_lengths(...) of them"
CAUSES = {
    "lengths": ([3, 2, 4], _LENGTHS),
    "lengths with a 0 before": ([0, 5, 4], _LENGTHS),
    "one length": ([9], _LENGTHS),
    "lengths of other rows": ([3, 2, 5], f"{_LENGTHS}, here of 10 packed rows"),
    "no leading 0": ([3, 5, 9], "looks as if the leading 0 is missing"),
    "counted from 1": ([1, 4, 6, 10], "looks as if they count from 1: pass cu_seqlens - 1"),
    "from 2 to nowhere": ([2, 4, 8], None),
    "no end": ([0, 3, 5], "they end at 5, and the last is to be 9: packed rows of padding are left out"),
    "one 0": ([0], "they end at 0, and the last is to be 9: packed rows of padding are left out"),
    "of other rows": ([0, 3, 5, 10], "they are offsets into 10 packed rows"),
    "a fall": ([0, 5, 3, 9], "cu_seqlens[2] = 3 is less than cu_seqlens[1] = 5"),
    "under 0": ([0, -1, 3, 9], "cu_seqlens[1] = -1 is less than cu_seqlens[0] = 0"),
    "a sequence a row": (
        [0, 0, 0, 1, 1, 2, 2, 2, 2],
        "looks like the sequence of each row: pass Segments.from_lengths(...) of torch.bincount(...) of them",
    ),
    "offsets taken for lengths": (
        [0, 0, 3, 8, 17],
        "looks as if lengths were expected and offsets came: pass Segments.from_offsets(...) of these",
    ),
}

CONSTRUCTORS = {
    "a gate without attn_dim": (lambda: LocationAttention(D, gated=True), "attn_dim"),
    "another score activation": (lambda: LocationAttention(D, score_activation="tanh"), "score_activation"),
    "another score activation of steps": (
        lambda: LocationAwareAttention(D, C, A, score_activation="tanh"),
        "score_activation",
    ),
    "a context of no width": (lambda: ConcatAttention(D, C, A, context_dims=(R, 0)), "context_dims[1]"),
    "one projection of two widths": (lambda: GraphAttention(D, A, key_dim=C, share_weights=True), "share_weights"),
    "nothing between, of a width": (lambda: HierarchicalAttention(D, A, between_dim=C), "between_dim"),
    "between, of no width": (
        lambda: HierarchicalAttention(D, A, between=nn.Tanh(), between_dim=0),
        "between_dim",
    ),
    "a convolution of even width": (lambda: LocationAwareAttention(D, C, A, width=4), "width"),
}
