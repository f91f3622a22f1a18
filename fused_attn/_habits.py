"""Keyword arguments that other libraries have, passed here by habit: an error that says what this one has for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_WEIGHTS = ("return_weights=True", "return_weights")
_CAUSAL = ("window=(None, 0) for causal attention", "window")
_MASK = "mask=, where True = may be attended"
_PADDED = "torch.arange(T, device=lengths.device) < lengths[:, None], T rows a sequence"

# Name: what to pass instead, each with the argument that it is about. The first that the callable has is said.
_HABITS: dict[str, tuple[tuple[str, str], ...]] = {
    "attn_mask": ((f"{_MASK}, or score_bias=, which is added to the scores", "score_bias"), (_MASK, "mask")),
    "attention_mask": (("mask=attention_mask.bool(), where True = may be attended", "mask"),),
    "key_padding_mask": (
        ("mask=~key_padding_mask: True hides a key in PyTorch, here True = may be attended", "mask"),
    ),
    "padding_mask": ((_MASK, "mask"),),
    "src_key_padding_mask": (
        ("mask=~src_key_padding_mask: True hides a key in PyTorch, here True = may be attended", "mask"),
    ),
    "is_causal": (_CAUSAL,),
    "causal": (_CAUSAL,),
    "window_size": (("window=(left, right), None for an open side", "window"),),
    "need_weights": (_WEIGHTS, ("no such option, the weights are always returned", "previous")),
    "output_attentions": (_WEIGHTS,),
    "return_attention": (_WEIGHTS,),
    "return_attention_scores": (_WEIGHTS,),
    "use_causal_mask": (_CAUSAL,),
    "key_mask": ((_MASK, "mask"),),
    "memory_mask": ((_MASK, "mask"),),
    "valid_lens": ((f"mask={_PADDED}", "mask"),),
    "max_seqlen": (("no such argument, lengths are read from the offsets", "cu_seqlens"),),
    "max_seqlen_q": (("no such argument, lengths are read from the offsets", "cu_seqlens_q"),),
    "max_seqlen_k": (("no such argument, lengths are read from the offsets", "cu_seqlens_k"),),
    "return_attention_weights": (_WEIGHTS,),
    "attn_bias": (("score_bias=", "score_bias"),),
    "dropout": (("dropout_p=", "dropout_p"),),
    "softmax_scale": (("scale=", "scale"),),
    "cu_seqlens": (
        ("cu_seqlens_q= and cu_seqlens_k=", "cu_seqlens_q"),
        ("cu_seqlens_premise= and cu_seqlens_hypothesis=", "cu_seqlens_premise"),
        ("inner_offsets and outer_offsets", "inner_offsets"),
    ),
    "lengths": (
        (f"mask={_PADDED}, or packed rows with cu_seqlens=Segments.from_lengths(lengths)", "cu_seqlens"),
        (f"mask={_PADDED}", "mask"),
    ),
    "values": (("value=", "value"),),
    "weights": (("weight=", "weight"),),
    "edge_attr": (("edge=, in the order of indices", "edge"),),
    "edge_index": (("a structure, graph, order = Graph.from_edges(edge_index, ...)", "indptr"),),
    "backend": (("impl=", "impl"),),
}


def explicit(fn: Callable[P, T]) -> Callable[P, T]:
    """Let a TypeError say what to pass in place of a keyword that `fn` has not got, where a habit is known.

    The signature stays: explicit, typed, and what `inspect.signature` shows.
    """
    has = inspect.signature(fn).parameters
    hints = {
        name: next((text for text, about in texts if about in has), None)
        for name, texts in _HABITS.items()
        if name not in has
    }
    hints = {name: text for name, text in hints.items() if text is not None}

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name in hints:  # of a forward the module's name: a base class may have it
                who = type(args[0]).__name__ if fn.__name__ == "forward" else fn.__name__
                raise TypeError(f"{name}: expected {hints[name]}; got {name}=, which {who} does not have")
        return fn(*args, **kwargs)

    return call
