"""Bad input to graph attention: an error that names the argument."""

import pytest
import torch
from _compare import IMPLS

from fused_attn import GraphAttention, csr_from_edges, graph_attention, transpose_csr

NQ, NK, E, H, A, DV = 3, 4, 5, 2, 6, 7


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def ints(*numbers, dtype=torch.int64):
    return torch.tensor(numbers, dtype=dtype)


PLAIN = {
    "query": zeros(NQ, A), "key": zeros(NK, A), "v": zeros(A), "indptr": ints(0, 2, 2, E),
    "indices": ints(0, 3, 1, 1, 2),
}  # fmt: skip
HEADS = PLAIN | {"query": zeros(NQ, H, A), "key": zeros(NK, H, A), "v": zeros(H, A)}
STATIC = transpose_csr(PLAIN["indptr"], PLAIN["indices"], NK)


def transposed(at, x):
    return PLAIN | {"transposed": (*STATIC[:at], x, *STATIC[at + 1 :])}


BAD = {
    "query of rank 1": (PLAIN | {"query": zeros(A)}, ValueError, "query"),
    "query of rank 4": (PLAIN | {"query": zeros(1, NQ, H, A)}, ValueError, "query"),
    "query without features": (
        PLAIN | {"query": zeros(NQ, 0), "key": zeros(NK, 0), "v": zeros(0)},
        ValueError,
        "query",
    ),
    "query is a list": (PLAIN | {"query": [[0.0]]}, TypeError, "query"),
    "query of integers": (PLAIN | {"query": zeros(NQ, A, dtype=torch.int64)}, TypeError, "query"),
    "key of another width": (PLAIN | {"key": zeros(NK, A + 1)}, ValueError, "key"),
    "key with heads alone": (PLAIN | {"key": zeros(NK, H, A)}, ValueError, "key"),
    "key with other heads": (HEADS | {"key": zeros(NK, H + 1, A)}, ValueError, "key"),
    "key of another dtype": (PLAIN | {"key": zeros(NK, A, dtype=torch.float16)}, TypeError, "key"),
    "key on another device": (PLAIN | {"key": zeros(NK, A).to("meta")}, ValueError, "key"),
    "v of another width": (PLAIN | {"v": zeros(A + 1)}, ValueError, "v"),
    "v with heads alone": (PLAIN | {"v": zeros(H, A)}, ValueError, "v"),
    "v of other heads": (HEADS | {"v": zeros(H + 1, A)}, ValueError, "v"),
    "v is missing": (PLAIN | {"v": None}, TypeError, "v"),
    "value of other nodes": (PLAIN | {"value": zeros(NK + 1, DV)}, ValueError, "value"),
    "value without heads": (HEADS | {"value": zeros(NK, DV)}, ValueError, "value"),
    "value without features": (PLAIN | {"value": zeros(NK, 0)}, ValueError, "value"),
    "value of another dtype": (PLAIN | {"value": zeros(NK, DV, dtype=torch.float64)}, TypeError, "value"),
    "edge of other edges": (PLAIN | {"edge": zeros(E + 1, A)}, ValueError, "edge"),
    "edge of another width": (PLAIN | {"edge": zeros(E, A + 1)}, ValueError, "edge"),
    "edge without heads": (HEADS | {"edge": zeros(E, A)}, ValueError, "edge"),
    "edge of another dtype": (PLAIN | {"edge": zeros(E, A, dtype=torch.bfloat16)}, TypeError, "edge"),
    "indptr of other nodes": (PLAIN | {"indptr": ints(0, E)}, ValueError, "indptr"),
    "indptr of numbers": (PLAIN | {"indptr": zeros(NQ + 1)}, TypeError, "indptr"),
    "indptr not from 0": (PLAIN | {"indptr": ints(1, 2, 2, E)}, ValueError, "indptr"),
    "indptr that ends early": (PLAIN | {"indptr": ints(0, 2, 2, E - 1)}, ValueError, "indptr"),
    "indptr that ends late": (PLAIN | {"indptr": ints(0, 2, 2, E + 1)}, ValueError, "indptr"),
    "indptr that decreases": (PLAIN | {"indptr": ints(0, 3, 2, E)}, ValueError, "indptr"),
    "indices of rank 2": (PLAIN | {"indices": PLAIN["indices"][None]}, ValueError, "indices"),
    "indices of 16 bits": (PLAIN | {"indices": PLAIN["indices"].short()}, TypeError, "indices"),
    "indices under 0": (PLAIN | {"indices": ints(0, 3, -1, 1, 2)}, ValueError, "indices"),
    "indices past the last key": (PLAIN | {"indices": ints(0, 3, NK, 1, 2)}, ValueError, "indices"),
    "unknown activation": (PLAIN | {"activation": "softplus"}, ValueError, "activation"),
    "dropout_p of 1": (PLAIN | {"dropout_p": 1.0}, ValueError, "dropout_p"),
    "dropout_p is None": (PLAIN | {"dropout_p": None}, TypeError, "dropout_p"),
    "unknown impl": (PLAIN | {"impl": "cuda"}, ValueError, "impl"),
    "transposed is a tensor": (PLAIN | {"transposed": STATIC[0]}, TypeError, "transposed"),
    "transposed of two": (PLAIN | {"transposed": STATIC[:2]}, TypeError, "transposed"),
    "transposed of other nodes": (transposed(0, ints(0, 1, E)), ValueError, r"transposed\[0\]"),
    "transposed without its end": (transposed(0, ints(0, 1, 2, 3, 4)), ValueError, r"transposed\[0\]"),
    "transposed of other edges": (transposed(1, ints(0)), ValueError, r"transposed\[1\]"),
    "transposed past the last query": (transposed(1, ints(0, 0, NQ, 1, 1)), ValueError, r"transposed\[1\]"),
    "permutation of other edges": (transposed(2, ints(0, 1)), ValueError, r"transposed\[2\]"),
    "permutation past the last edge": (transposed(2, ints(0, 1, 2, 3, E)), ValueError, r"transposed\[2\]"),
    "permutation of numbers": (transposed(2, zeros(E)), TypeError, r"transposed\[2\]"),
}


def on(device, x):
    return x.to(device) if isinstance(x, torch.Tensor) and x.device.type == "cpu" else x


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("arguments", [PLAIN, HEADS], ids=["plain", "heads"])
def test_the_good_calls_are_good(arguments, impl, device):
    arguments = {name: on(device, x) for name, x in arguments.items()}
    given = tuple(on(device, x) for x in STATIC)
    assert graph_attention(**arguments, transposed=given, impl=impl).shape == arguments["query"].shape


@pytest.mark.parametrize(("arguments", "error", "name"), BAD.values(), ids=BAD.keys())
def test_bad_input_raises_with_the_name(arguments, error, name):
    """On the CPU; on a GPU wrong numbers in a structure stop the program, which a test cannot survive."""
    with pytest.raises(error, match=rf"^{name}: expected .*; got "):
        graph_attention(**arguments)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: csr_from_edges(ints(0, 1), 2), ValueError, "edge_index"),
        (lambda: csr_from_edges(zeros(2, 3), 2), TypeError, "edge_index"),
        (lambda: csr_from_edges(ints([0, 1], [0, 2]), 2), ValueError, r"edge_index\[1\]"),
        (lambda: csr_from_edges(ints([0, -1], [0, 1]), 2), ValueError, r"edge_index\[0\]"),
        (lambda: csr_from_edges(ints([0, 1], [0, 1]), 2.0), TypeError, "num_queries"),
        (lambda: csr_from_edges(ints([0, 1], [0, 1]), -1), ValueError, "num_queries"),
        (lambda: transpose_csr(ints(0, 2), ints(0, 1), 1), ValueError, "indices"),
        (lambda: transpose_csr(ints(0, 3), ints(0, 1), 2), ValueError, "indptr"),
        (lambda: transpose_csr(ints(), ints(), 2), ValueError, "indptr"),
        (lambda: transpose_csr(ints(0, 2), ints(0, 1), True), TypeError, "num_keys"),
        (lambda: GraphAttention(0, 2), ValueError, "query_dim"),
        (lambda: GraphAttention(2, 0), ValueError, "head_dim"),
        (lambda: GraphAttention(2, 2, num_heads=0), ValueError, "num_heads"),
        (lambda: GraphAttention(2, 2, key_dim=0), ValueError, "key_dim"),
        (lambda: GraphAttention(2, 2, edge_dim=0), ValueError, "edge_dim"),
        (lambda: GraphAttention(2, 2, key_dim=3, share_weights=True), ValueError, "share_weights"),
        (lambda: GraphAttention(2, 2, activation="softplus"), ValueError, "activation"),
        (lambda: GraphAttention(2, 2, dropout=1.0), ValueError, "dropout"),
        (lambda: GraphAttention(A, 2)(zeros(NQ, A, 1), ints(0), ints()), ValueError, "x"),
        (lambda: GraphAttention(A, 2)((zeros(NQ, A), zeros(NK, 3)), ints(0), ints()), ValueError, r"x\[1\]"),
        (lambda: GraphAttention(A, 2)(zeros(0, A), ints(0), ints(), edge=zeros(0, 2)), ValueError, "edge"),
        (lambda: GraphAttention(A, 2, edge_dim=3)(zeros(0, A), ints(0), ints()), ValueError, "edge"),
        (lambda: GraphAttention(A, 2, edge_dim=3)(zeros(0, A), ints(0), ints(), edge=zeros(0)), ValueError, "edge"),
    ],
)  # fmt: skip
def test_bad_structures_and_modules_raise_with_the_name(call, error, name):
    with pytest.raises(error, match=rf"^{name}: expected .*; got "):
        call()


@pytest.mark.parametrize("title", ["key of another width", "indices of 16 bits"])
def test_compiled_calls_raise_the_same_errors(title, device):
    torch.compiler.reset()
    arguments, error, name = BAD[title]
    with pytest.raises(error, match=rf"^{name}: expected "):
        torch.compile(lambda: graph_attention(**arguments), backend="eager")()
