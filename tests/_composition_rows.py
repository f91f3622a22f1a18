"""The rows of the table of compositions: every operator and module, padded and packed, plain and with all options."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_attn import (
    ConcatAttention,
    DistanceAttention,
    GeneralAttention,
    GraphAttention,
    HierarchicalAttention,
    LocationAttention,
    LocationAwareAttention,
    RaggedRNN,
    Score,
    State,
    StatisticsPooling,
    TargetAttention,
    WordByWordAttention,
    concat_attention,
    distance_attention,
    general_attention,
    graph_attention,
    hierarchical_attention,
    location_attention,
    location_aware_attention,
    location_aware_sequence,
    merge,
    statistics_pooling,
    target_attention,
    word_by_word_attention,
)

CPU = torch.device("cpu")


@dataclasses.dataclass
class Row:
    """call: from `impl` and tensors to a tensor or several. make: from batch and length to the tensors.

    columns: those that it has a cell in, all where None. kept: what autocast leaves in float32.
    """

    name: str
    call: Callable
    make: Callable[[int, int], dict[str, Tensor]]
    module: nn.Module | None = None
    columns: tuple[str, ...] | None = None
    kept: tuple[str, ...] = ("score_bias",)
    device: torch.device = CPU

    def tensors(self, impl: str, batch: int = 2, length: int = 5) -> dict[str, Tensor]:
        torch.manual_seed(0)
        made = {name: x.to(self.device) for name, x in self.make(batch, length).items()}
        if impl != "triton":
            made = {name: x.double() if x.is_floating_point() else x for name, x in made.items()}
        if self.module is not None:
            self.module.to(self.device, torch.float32 if impl == "triton" else torch.float64)
        return made

    def run(self, impl: str, tensors: dict[str, Tensor]) -> list[Tensor]:
        results = self.call(impl, **tensors)
        results = results if isinstance(results, tuple) else (results,)
        return [x for x in results if x is not None]

    def loss(self, impl: str, tensors: dict[str, Tensor]) -> Tensor:
        def one(x: Tensor, i: int) -> Tensor:
            return (torch.cos(torch.arange(x.numel(), device=x.device).view(x.shape) + i) * x + x * x).sum()

        return torch.stack([one(x, i) for i, x in enumerate(self.run(impl, tensors))]).sum()

    def parameters(self) -> dict[str, Tensor]:
        return {} if self.module is None else {f"module.{n}": x for n, x in self.module.named_parameters()}


def offsets(rows: int, parts: int) -> Tensor:
    return torch.tensor([rows * i // parts for i in range(parts + 1)], dtype=torch.int32)


ROWS: dict[str, Row] = {}


def r(*shape: int) -> Tensor:
    return torch.randn(*shape)


def add(name: str, call: Callable, make: Callable, module: nn.Module | None = None, **options) -> None:
    ROWS[name] = Row(name, call, make, module, **options)


def seen(*shape: int) -> Tensor:
    return torch.arange(shape[0] * shape[1]).view(shape) % 3 > 0


def widens(x: Tensor, _: Tensor) -> Tensor:  # as a normalisation does
    return x.to(torch.promote_types(x.dtype, torch.float32)) if torch.is_autocast_enabled(x.device.type) else x


def score(t: dict[str, Tensor], p: str) -> Score:
    gate = (t[p + "gw"], t[p + "gb"]) if p + "gw" in t else None
    return Score(t[p + "w"], t.get(p + "b"), t[p + "v"], gate, t.get(p + "ctx"))


def two_neighbours(nodes: int) -> dict[str, Tensor]:
    """A graph in CSR."""
    return {"indptr": torch.arange(nodes + 1) * 2, "indices": torch.arange(2 * nodes) % nodes}


def two_levels(B: int, T: int) -> dict[str, Tensor]:
    """Rows in twice as many segments as groups, and a score for each level."""
    rows = {"h": r(B * T, 4), "a": offsets(B * T, 2 * B), "b": offsets(2 * B, B)}
    return rows | {"iw": r(4, 3), "iv": r(3), "ow": r(4, 3), "ov": r(3)}


def _location() -> None:
    add(
        "location padded", lambda i, h, w: location_attention(h, w, impl=i), lambda B, T: {"h": r(B, T, 4), "w": r(4)}
    )
    add(
        "location padded, all options",
        lambda i, gw, gb, c_row, c_seq, **t: location_attention(
            **t,
            gate=(gw, gb),
            context=(c_row, c_seq),
            score_activation="logsigmoid",
            return_weights=True,
            impl=i,
        ),
        lambda B, T: {
            "h": r(B, T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "gw": r(4, 3),
            "gb": r(3),
            "c_row": r(B, T, 3),
            "c_seq": r(B, 1, 3),
            "value": r(B, T, 2),
            "score_bias": r(B, T),
            "mask": seen(B, T),
        },
    )
    add(
        "location packed",
        lambda i, c, **t: location_attention(**t, cu_seqlens=c, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4), "c": offsets(B * T, B)},
    )
    add(
        "location packed, all options",
        lambda i, gw, gb, c, context, **t: location_attention(
            **t, gate=(gw, gb), context=context[:, None], cu_seqlens=c, return_weights=True, impl=i
        ),
        lambda B, T: {
            "h": r(B * T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "gw": r(4, 3),
            "gb": r(3),
            "context": r(B, 3),
            "value": r(B * T, 2),
            "score_bias": r(B * T),
            "mask": seen(B, T).flatten(),
            "c": offsets(B * T, B),
        },
    )
    for name, window in (("causal", (None, 0)), ("window", (1, 1))):
        add(
            f"location padded, {name}",
            lambda i, window=window, **t: location_attention(**t, window=window, return_weights=True, impl=i),
            lambda B, T: {"h": r(B, T, 4), "w": r(4, 2), "value": r(B, T, 3), "mask": seen(B, T)},
        )
        add(
            f"location packed, {name}",
            lambda i, c, window=window, **t: location_attention(**t, cu_seqlens=c, window=window, impl=i),
            lambda B, T: {"h": r(B * T, 4), "w": r(4), "c": offsets(B * T, B)},
        )


def _pairs() -> None:
    add(
        "concat padded",
        lambda i, **t: concat_attention(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4), "value": r(B, T, 4), "v": r(4)},
    )
    add(
        "concat padded, all options",
        lambda i, **t: concat_attention(**t, window=(2, 1), return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 4),
            "key": r(B, 2, T, 4),
            "value": r(B, 2, T, 3),
            "v": r(2, 4),
            "score_bias": r(1, 2, T, T),
            "mask": seen(B, T),
        },
    )
    add(
        "concat padded, one query",
        lambda i, **t: concat_attention(**t, impl=i),
        lambda B, T: {"query": r(B, 1, 4), "key": r(B, T, 4), "value": r(B, T, 4), "v": r(4)},
    )
    add(
        "distance padded, all options",
        lambda i, **t: distance_attention(**t, p=1, window=(2, 1), return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 4),
            "key": r(B, 2, T, 4),
            "value": r(B, 2, T, 4),
            "v": r(2, 4),
            "mask": seen(B, T),
            "score_bias": r(1, 2, T, T),
        },
    )
    add(
        "distance packed",
        lambda i, c, **t: distance_attention(**t, p=2, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {"query": r(B * T, 4), "key": r(B * T, 4), "value": r(B * T, 4), "c": offsets(B * T, B)},
    )
    add(
        "concat packed",
        lambda i, c, **t: concat_attention(**t, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {
            "query": r(B * T, 2, 4),
            "key": r(B * T, 2, 4),
            "value": r(B * T, 2, 4),
            "v": r(4),
            "c": offsets(B * T, B),
        },
    )
    add(
        "concat, packed keys",
        lambda i, c, **t: concat_attention(**t, cu_seqlens_k=c, window=(1, 1), impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 4),
            "key": r(B * T, 2, 4),
            "value": r(B * T, 2, 4),
            "v": r(4),
            "c": offsets(B * T, B),
        },
    )
    add(
        "concat packed, a term a pair",
        lambda i, c, mask, **t: concat_attention(**t, mask=mask, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {
            "query": r(B * T, 2, 4),
            "key": r(B * T, 2, 4),
            "value": r(B * T, 2, 4),
            "v": r(4),
            "score_bias": r(B * T * T),
            "mask": seen(B * T * T, 2),
            "c": offsets(B * T, B),
        },
    )
    add(
        "general packed, a term a pair",
        lambda i, c, **t: general_attention(**t, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {
            "query": r(B * T, 2, 4),
            "key": r(B * T, 2, 4),
            "score_bias": r(B * T * T, 2),
            "mask": seen(B * T * T, 1),
            "c": offsets(B * T, B),
        },
    )
    add(
        "general padded",
        lambda i, **t: general_attention(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
    )
    add(
        "general padded, all options",
        lambda i, **t: general_attention(**t, activation="tanh", window=(2, 1), return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, T, 3),
            "key": r(B, 2, T, 4),
            "value": r(B, 2, T, 3),
            "weight": r(2, 3, 4),
            "scale": r(2),
            "score_bias": r(1, 2, T, T),
            "mask": seen(B, T),
        },
        kept=("score_bias", "scale"),
    )
    add(
        "general padded, one query, keys of one head",
        lambda i, **t: general_attention(**t, return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, 1, 3),
            "key": r(B, 1, T, 4),
            "weight": r(2, 3, 4),
            "score_bias": r(1, 2, 1, T),
            "mask": seen(B, T),
        },
    )
    add(
        "general packed",
        lambda i, c, **t: general_attention(**t, cu_seqlens_q=c, cu_seqlens_k=c, impl=i),
        lambda B, T: {"query": r(B * T, 4), "key": r(B * T, 4), "value": r(B * T, 4), "c": offsets(B * T, B)},
    )
    add(
        "general, packed queries",
        lambda i, c, **t: general_attention(**t, cu_seqlens_q=c, impl=i),
        lambda B, T: {"query": r(B * T, 4), "key": r(B, T, 4), "mask": seen(B, T), "c": offsets(B * T, B)},
    )


def _statistics_and_graph() -> None:
    add("statistics padded", lambda i, h: statistics_pooling(h, impl=i), lambda B, T: {"h": r(B, T, 4)})
    add(
        "statistics padded, all options",
        lambda i, **t: statistics_pooling(**t, return_weights=True, impl=i),
        lambda B, T: {
            "h": r(B, T, 4),
            "w": r(4, 3),
            "b": r(3),
            "v": r(3, 2),
            "context": r(B, T, 3),
            "value": r(B, T, 2),
            "mask": torch.arange(T).expand(B, T) < max(1, T - 1),
        },
    )
    add(
        "statistics of projected frames",
        lambda i, **t: statistics_pooling(**t, activation="identity", return_weights=True, impl=i),
        lambda B, T: {"h": r(B, T, 4), "v": r(4, 2), "value": r(B, T, 2)},
    )
    add(
        "statistics of scores a channel, the mean",
        lambda i, **t: statistics_pooling(**t, deviation=False, impl=i),
        lambda B, T: {"h": r(B, T, 4), "score_bias": r(B, T, 4)},
    )
    add(
        "statistics of weights, all options",
        lambda i, c, weight, **t: statistics_pooling(
            **t,
            weight=weight.square(),
            cu_seqlens=c,
            correction=0.5,
            ceiling=9.0,
            eps=0.1,
            return_weights=True,
            impl=i,
        ),
        lambda B, T: {"h": r(B * T, 4), "weight": r(B * T), "c": offsets(B * T, B)},
        kept=("weight",),
    )
    add(
        "statistics padded, hops",
        lambda i, **t: statistics_pooling(**t, hops=2, return_weights=True, impl=i),
        lambda B, T: {"h": r(B, T, 4), "w": r(4, 3), "v": r(3, 2), "score_bias": r(B, 2, T), "mask": seen(B, T)},
    )
    add(
        "statistics packed, means of hops",
        lambda i, c, **t: statistics_pooling(
            **t, cu_seqlens=c, hops=2, deviation=False, return_weights=True, return_lse=True, impl=i
        ),
        lambda B, T: {"h": r(B * T, 4), "w": r(4, 3), "v": r(3, 2), "c": offsets(B * T, B)},
    )
    add(
        "statistics packed, weights of hops",
        lambda i, c, weight, **t: statistics_pooling(**t, weight=weight.square(), cu_seqlens=c, hops=2, impl=i),
        lambda B, T: {"h": r(B * T, 4), "weight": r(B * T, 2), "c": offsets(B * T, B)},
        kept=("weight",),
    )
    add(
        "statistics packed",
        lambda i, c, **t: statistics_pooling(**t, cu_seqlens=c, return_weights=True, return_log_weights=True, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4, 3), "v": r(3), "c": offsets(B * T, B)},
    )
    mlp = {"w1": r(16, 3), "w2": r(3, 2), "v": r(2)}
    add(
        "target padded",
        lambda i, **t: target_attention(**t, impl=i),
        lambda B, T: {"query": r(B, 4), "key": r(B, T, 4), **mlp},
    )
    add(
        "target padded, all options",
        lambda i, **t: target_attention(**t, softmax=True, scale=0.5, return_weights=True, impl=i),
        lambda B, T: {
            "query": r(B, 4),
            "key": r(B, T, 4),
            **mlp,
            **{"b1": r(3), "b2": r(2)},  # no b3, whose gradient is 0
            "value": r(B, T, 2),
            "mask": seen(B, T),
        },
    )
    add(
        "target packed",
        lambda i, c, **t: target_attention(**t, w2=None, cu_seqlens=c, return_weights=True, impl=i),
        lambda B, T: {"query": r(B, 4), "key": r(B * T, 4), "w1": r(16, 3), "v": r(3), "c": offsets(B * T, B)},
    )
    add(
        "graph",
        lambda i, **t: graph_attention(**t, impl=i),
        lambda B, T: {"query": r(T, 4), "key": r(T, 4), "v": r(4), **two_neighbours(T)},
    )
    add(
        "graph, all options",
        lambda i, **t: graph_attention(**t, return_weights=True, return_log_weights=True, impl=i),
        lambda B, T: {
            "query": r(T, 2, 4),
            "key": r(T, 2, 4),
            "v": r(2, 4),
            "value": r(T, 2, 4),
            "edge": r(2 * T, 2, 4),
            **two_neighbours(T),
        },
    )


def _two_levels_and_steps() -> None:
    add(
        "hierarchical",
        lambda i, h, a, b, **t: hierarchical_attention(h, a, b, score(t, "i"), score(t, "o"), impl=i),
        two_levels,
    )
    add(
        "hierarchical, all options",
        lambda i, h, a, b, mask, **t: hierarchical_attention(
            h, a, b, score(t, "i"), score(t, "o"), mask=mask, return_segments=True, return_weights=True, impl=i
        ),
        lambda B, T: {
            "h": r(B * T, 4),
            "a": offsets(B * T, 2 * B),
            "b": offsets(2 * B, B),
            "mask": seen(B, T).flatten(),
            **{
                p + n: x
                for p in "io"
                for n, x in (("w", r(4, 3)), ("b", r(3)), ("v", r(3)), ("gw", r(4, 3)), ("gb", r(3)))
            },
        },
    )
    words = {"w_y": (4, 3), "w_h": (4, 3), "w_r": (4, 3), "w": (3,), "w_t": (4, 4)}
    add(
        "word by word padded",
        lambda i, **t: word_by_word_attention(**t, impl=i),
        lambda B, T: {"premise": r(B, T, 4), "hypothesis": r(B, T, 4), **{n: r(*s) for n, s in words.items()}},
    )
    add(
        "word by word padded, all options",
        lambda i, **t: word_by_word_attention(**t, return_weights=True, impl=i),
        lambda B, T: {
            "premise": r(B, T, 4),
            "hypothesis": r(B, T, 4),
            **{n: r(*s) for n, s in words.items()},
            "state": r(B, 4),
            "mask": seen(B, T),
        },
    )
    add(
        "word by word packed",
        lambda i, c, **t: word_by_word_attention(**t, cu_seqlens_premise=c, cu_seqlens_hypothesis=c, impl=i),
        lambda B, T: {
            "premise": r(B * T, 4),
            "hypothesis": r(B * T, 4),
            **{n: r(*s) for n, s in words.items()},
            "state": r(B, 4),
            "c": offsets(B * T, B),
        },
    )
    for side, other in (("premise", "hypothesis"), ("hypothesis", "premise")):
        asked = {"return_scores": True, "return_lse": True} if side == "hypothesis" else {}
        add(
            f"word by word, packed {side}",
            lambda i, c, side=side, asked=asked, **t: word_by_word_attention(
                **t, **asked, **{f"cu_seqlens_{side}": c}, impl=i
            ),
            lambda B, T, side=side, other=other: {
                side: r(B * T, 4),
                other: r(B, T, 4),
                **{n: r(*s) for n, s in words.items()},
                "state": r(B, 4),
                "c": offsets(B * T, B),
            },
        )
    add(
        "location-aware",
        lambda i, **t: location_aware_attention(**t, impl=i),
        lambda B, T: {
            "query": r(B, 4),
            "key": r(B, T, 4),
            "value": r(B, T, 4),
            "v": r(4),
            "previous": r(B, T),
            "conv_weight": r(2, 3),
            "u": r(2, 4),
            "mask": torch.ones(B, T, dtype=torch.bool),
            "score_bias": r(B, T),
        },
    )
    add(
        "location-aware packed",
        lambda i, c, **t: location_aware_attention(**t, cu_seqlens=c, return_scores=True, return_lse=True, impl=i),
        lambda B, T: {
            "query": r(B, 4),
            "key": r(B * T, 4),
            "value": r(B * T, 4),
            "v": r(4),
            "previous": r(B * T, 2),
            "conv_weight": r(2, 2, 3),
            "u": r(2, 4),
            "mask": torch.ones(B * T, dtype=torch.bool),
            "score_bias": r(B * T),
            "c": offsets(B * T, B),
        },
    )
    add(
        "location-aware sequence",
        lambda i, **t: location_aware_sequence(**t, cumulative=True, impl=i),
        lambda B, T: {
            "query": r(B, 2, 4),
            "key": r(B, T, 4),
            "value": r(B, T, 4),
            "v": r(4),
            "previous": r(B, T),
            "conv_weight": r(2, 3),
            "u": r(2, 4),
            "mask": torch.ones(B, T, dtype=torch.bool),
            "score_bias": r(B, T),
        },
    )


def _scores_and_states() -> None:
    asked = {"value": False, "return_log_weights": True, "return_scores": True, "return_lse": True}

    def sunk(state: State) -> tuple[Tensor, ...]:
        """Beside one more key, of score and value 0. m is a constant of the gradient, m + log_l is not."""
        state = merge([state, State(*map(torch.zeros_like, state))])
        return state.out, state.lse

    add(
        "location padded, scores alone",
        lambda i, **t: location_attention(**t, **asked, impl=i),
        lambda B, T: {"h": r(B, T, 4), "w": r(4, 3), "b": r(3), "v": r(3, 2), "score_bias": r(B, T)},
    )
    add(
        "location padded, states",
        lambda i, **t: sunk(location_attention(**t, return_state=True, impl=i)),
        lambda B, T: {"h": r(B, T, 4), "w": r(4, 2)},
    )
    add(
        "target padded, states",
        lambda i, **t: sunk(target_attention(**t, w2=None, softmax=True, return_state=True, impl=i)),
        lambda B, T: {"query": r(B, 4), "key": r(B, T, 4), "w1": r(16, 3), "v": r(3), "mask": seen(B, T)},
    )
    pairs: tuple[tuple[str, Callable, dict[str, Tensor]], ...] = (
        ("concat", concat_attention, {"v": r(4)}),
        ("general", general_attention, {}),
    )
    for name, op, more in pairs:
        add(
            f"{name} padded, scores alone",
            lambda i, op=op, **t: op(**t, **asked, impl=i),
            lambda B, T, more=more: {"query": r(B, 2, T, 4), "key": r(B, 2, T, 4), **more},
        )
        add(
            f"{name} padded, states",
            lambda i, op=op, **t: sunk(op(**t, return_state=True, impl=i)),
            lambda B, T, more=more: {"query": r(B, T, 4), "key": r(B, T, 4), "value": r(B, T, 3), **more},
        )
        add(
            f"{name} padded, a mask a head",
            lambda i, op=op, **t: op(**t, return_weights=True, impl=i),
            lambda B, T, more=more: {
                "query": r(B, 2, T, 4),
                "key": r(B, 2, T, 4),
                "value": r(B, 2, T, 3),
                "mask": seen(2 * T, T).view(1, 2, T, T),
                **more,
            },
        )
    add(
        "graph, scores",
        lambda i, **t: graph_attention(**t, return_scores=True, return_lse=True, impl=i),
        lambda B, T: {"query": r(T, 4), "key": r(T, 4), "v": r(4), **two_neighbours(T)},
    )
    for name, op, steps in (
        ("location-aware", location_aware_attention, ()),
        ("location-aware sequence", location_aware_sequence, (2,)),
    ):
        add(
            f"{name}, several histories",
            lambda i, op=op, **t: op(**t, impl=i),
            lambda B, T, steps=steps: {
                "query": r(B, *steps, 4),
                "key": r(B, T, 4),
                "value": r(B, T, 4),
                "v": r(4),
                "previous": r(B, 2, T),
                "conv_weight": r(2, 2, 3),
                "u": r(2, 4),
            },
        )


def _dropout_and_jagged() -> None:
    drops = (
        "compile",
        "inference_mode",
        "checkpoint",
        "checkpoint, reentrant",
        "saved-tensor hooks",
        "double backward",
    )
    add(
        "location packed, dropout",
        lambda i, c, **t: location_attention(**t, cu_seqlens=c, dropout_p=0.5, return_weights=True, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4, 2), "c": offsets(B * T, B)},
        columns=drops,
    )
    add(
        "location padded, window, dropout",
        lambda i, **t: location_attention(**t, window=(1, 1), dropout_p=0.5, impl=i),
        lambda B, T: {"h": r(B, T, 4), "w": r(4, 2)},
        columns=drops,
    )
    add(
        "concat padded, dropout",
        lambda i, **t: concat_attention(**t, dropout_p=0.5, return_weights=True, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4), "value": r(B, T, 4), "v": r(4)},
        columns=drops,
    )
    add(
        "general padded, dropout",
        lambda i, **t: general_attention(**t, dropout_p=0.5, return_weights=True, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
        columns=drops,
    )
    add(
        "graph, dropout",
        lambda i, **t: graph_attention(**t, dropout_p=0.5, return_weights=True, impl=i),
        lambda B, T: {"query": r(T, 4), "key": r(T, 4), "v": r(4), **two_neighbours(T)},
        columns=drops,
    )
    add(
        "location jagged",
        lambda i, h, c, **t: location_attention(torch.nested.nested_tensor_from_jagged(h, c.long()), **t, impl=i),
        lambda B, T: {"h": r(B * T, 4), "w": r(4, 3), "v": r(3, 2), "c": offsets(B * T, B)},
        columns=("compile", "inference_mode", "saved-tensor hooks"),
    )
    add(
        "target jagged",
        lambda i, key, c, **t: target_attention(
            key=torch.nested.nested_tensor_from_jagged(key, c.long()), **t, w2=None, softmax=True, impl=i
        ),
        lambda B, T: {"key": r(B * T, 4), "query": r(B, 4), "w1": r(16, 3), "v": r(3), "c": offsets(B * T, B)},
        columns=("compile", "inference_mode", "saved-tensor hooks"),
    )
    add(
        "hierarchical, a layer between that widens",
        lambda i, h, a, b, **t: hierarchical_attention(h, a, b, score(t, "i"), score(t, "o"), between=widens, impl=i),
        two_levels,
        columns=("compile", "autocast"),
    )


def _modules() -> None:
    torch.manual_seed(1)
    m: nn.Module
    m = LocationAttention(4, 3, hops=2, gated=True, context_dim=2)
    add(
        "LocationAttention", lambda i, m=m, **t: m(**t, impl=i), lambda B, T: {"h": r(B, T, 4), "context": r(B, 2)}, m
    )
    m = ConcatAttention(4, 4, 3, num_heads=2, bias=True, context_dims=(2,))
    add(
        "ConcatAttention",
        lambda i, x, m=m, **t: m(**t, contexts=(x,), impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4), "x": r(B, 2)},
        m,
    )
    m = DistanceAttention(4, 4, 3, num_heads=2)
    add(
        "DistanceAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
        m,
    )
    m = GeneralAttention(4, num_heads=2, learn_scale=True)
    add(
        "GeneralAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"query": r(B, T, 4), "key": r(B, T, 4)},
        m,
    )
    m = StatisticsPooling(4, 3, per_channel=True, global_context=True)
    add(
        "StatisticsPooling",
        lambda i, c, m=m, **t: m(**t, cu_seqlens=c, impl=i),
        lambda B, T: {"h": r(B * T, 4), "c": offsets(B * T, B)},
        m,
    )
    m = TargetAttention(4, 3, 2, softmax=True)
    add(
        "TargetAttention",
        lambda i, c, m=m, **t: m(**t, cu_seqlens=c, impl=i),
        lambda B, T: {"query": r(B, 4), "key": r(B * T, 4), "c": offsets(B * T, B)},
        m,
    )
    m = GraphAttention(4, 3, num_heads=2, share_weights=True, edge_dim=2)
    add(
        "GraphAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {
            "x": r(T, 4),
            **two_neighbours(T),
            "edge": r(2 * T, 2),
        },
        m,
    )
    m = HierarchicalAttention(4, 3, between=RaggedRNN(nn.GRU(4, 3, bidirectional=True)), between_dim=6)
    add(
        "HierarchicalAttention, RaggedRNN",
        lambda i, h, a, b, m=m: m(h, a, b, impl=i),
        lambda B, T: {"h": r(B * T, 4), "a": offsets(B * T, 2 * B), "b": offsets(2 * B, B)},
        m,
    )
    m = WordByWordAttention(4, 4, 3)
    add(
        "WordByWordAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"premise": r(B, T, 4), "hypothesis": r(B, T, 4)},
        m,
    )
    m = LocationAwareAttention(4, 4, 3, channels=2, width=3)
    add(
        "LocationAwareAttention",
        lambda i, m=m, **t: m(**t, impl=i),
        lambda B, T: {"query": r(B, 4), "key": r(B, T, 4), "previous": r(B, T)},
        m,
    )


for _rows in (
    _location,
    _pairs,
    _statistics_and_graph,
    _two_levels_and_steps,
    _scores_and_states,
    _dropout_and_jagged,
    _modules,
):
    _rows()
