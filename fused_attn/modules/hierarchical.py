"""The hierarchical family as a module, and recurrent layers over ragged rows for between its levels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .._checks import (
    argument,
    check_cu_seqlens,
    check_flag,
    module_checker,
    offsets_of,
    weight_of,
    width_of,
)
from .._habits import explicit
from .._ops import Impl, exports_from_one, forward_mode
from .._ragged_rnn import pack, ragged_rnn, run_packed
from ..hierarchical import HierarchicalOutput, Score, hierarchical_attention
from ..location import check_context
from ..segments import Offsets, as_offsets
from ..states import State
from ._layers import Attention, counts, factory, optional_counts, project, read
from .location import LocationAttention, gate_of

_CONTEXT = "{1} {0} | {2} {0} | {1} 1 {0} | 1 {2} {0}"
_INPUTS = {
    "h": argument("N dim", hint="pack the rows of all segments, one after the other"),
    "inner_offsets": offsets_of("S", optional=False),
    "outer_offsets": offsets_of("G", optional=False),
    "inner_context": argument(_CONTEXT.format("inner_context_dim", "S", "N")),
    "outer_context": argument(_CONTEXT.format("outer_context_dim", "G", "S")),
}

_RNN = {"rows": argument("S input_size")}


class RaggedRNN(nn.Module):
    """A recurrent layer of PyTorch over packed rows: each group is a sequence of its own.

    It makes what `HierarchicalAttention` takes as `between` of an `nn.GRU`, `nn.LSTM` or `nn.RNN`. PyTorch wants the
    lengths on the CPU, so on a GPU it waits for the device once a call. `torch.export` takes it as one operator, and
    so does `torch.compile` where ``torch._dynamo.config.allow_rnn`` is True; else PyTorch breaks the graph at an
    `nn.GRU`, `nn.LSTM` or `nn.RNN`, or with ``fullgraph=True`` refuses it.

    Parameters
    ----------
    rnn
        The layer; `batch_first` makes no difference.

    Raises
    ------
    TypeError
        For what is no recurrent layer of PyTorch.

    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        if not isinstance(rnn, nn.RNNBase):
            raise TypeError(f"rnn: expected an nn.GRU, nn.LSTM or nn.RNN; got {type(rnn).__name__}")
        self.rnn = rnn

    @exports_from_one
    def forward(self, rows: Tensor, offsets: Offsets) -> Tensor:
        """The states ``(S, D')`` of the last layer, for ``rows (S, D)`` and int32 ``offsets (G + 1,)`` or `Segments`.

        Raises
        ------
        ValueError, TypeError
            For shapes and dtypes, and for offsets that do not go from 0 to S, as in `hierarchical_attention`.

        """
        offsets = as_offsets(offsets)
        check = module_checker(_RNN, next(self.rnn.parameters()), input_size=self.rnn.input_size)
        check("rows", rows)
        check_cu_seqlens("offsets", offsets, rows.shape[0], rows.device)
        lazy = torch.compiler.is_compiling() or rows.device.type == "meta"  # no number of the offsets can be read
        if lazy or torch._C._are_functorch_transforms_active() or forward_mode():
            return ragged_rnn(self.rnn, rows, offsets)

        def run(data: Tensor, batch_sizes: Tensor) -> Tensor:
            states: Tensor = self.rnn(PackedSequence(data, batch_sizes))[0].data
            return states

        return run_packed(run, rows, *pack(offsets, rows.shape[0]))


class HierarchicalAttention(Attention):
    r"""Two levels of attention pooling with learned parameters, see `hierarchical_attention`.

    .. math:: s_j = v \cdot act(W h_j + b), \quad s_j = v \cdot (act(W h_j + b) \odot \sigma(G h_j + g))

    Parameters
    ----------
    dim
        Width D of the rows.
    inner_dim, outer_dim
        Width A of the score of rows, and of the score of segments, by default the same.
    between
        ``(segments (S, D), outer_offsets) -> (S, D')``, a module or another callable; `RaggedRNN` makes one of a
        recurrent layer. `reset_parameters` draws the parameters of a module anew too.
    between_dim
        Its width D', by default D.
    gated
        Multiply the features of both scores with a sigmoid gate.
    inner_context_dim, outer_context_dim
        Width of a context that is projected without bias and added into the score; None for no context.
    activation
        identity, tanh, relu, sigmoid, leaky_relu, elu, gelu or silu.
    bias
        Biases b and g.
    device, dtype
        Of the parameters, as `torch.nn.Linear` has them.

    Raises
    ------
    ValueError, TypeError
        For a size under 1, an unknown activation, `between_dim` without `between`, and one that cannot be called.

    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        outer_dim: int | None = None,
        *,
        between: Callable[[Tensor, Tensor], Tensor] | None = None,
        between_dim: int | None = None,
        gated: bool = False,
        inner_context_dim: int | None = None,
        outer_context_dim: int | None = None,
        activation: str = "tanh",
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        outer_dim = inner_dim if outer_dim is None else outer_dim
        counts(dim=dim, inner_dim=inner_dim, outer_dim=outer_dim)
        optional_counts(
            between_dim=between_dim, inner_context_dim=inner_context_dim, outer_context_dim=outer_context_dim
        )
        check_flag("gated", gated)
        if between is None and between_dim is not None:
            raise ValueError(f"between_dim: expected None without between; got {between_dim}")
        if between is not None and not callable(between):
            raise TypeError(f"between: expected a callable or None; got {type(between).__name__}")
        super().__init__()
        factory(device, dtype)

        def level(width: int, attn_dim: int, context_dim: int | None) -> LocationAttention:
            return LocationAttention(
                width,
                attn_dim,
                gated=gated,
                activation=activation,
                bias=bias,
                context_dim=context_dim,
                device=device,
                dtype=dtype,
            )

        self.inner = level(dim, inner_dim, inner_context_dim)
        self.between = between
        self.outer = level(between_dim or dim, outer_dim, outer_context_dim)

    @explicit
    def forward(
        self,
        h: Tensor,
        inner_offsets: Offsets,
        outer_offsets: Offsets,
        *,
        mask: Tensor | None = None,
        inner_context: Tensor | None = None,
        outer_context: Tensor | None = None,
        return_segments: bool = False,
        return_weights: bool = False,
        return_scores: bool = False,
        return_lse: bool = False,
        return_state: bool = False,
        impl: Impl = "auto",
    ) -> Tensor | State | HierarchicalOutput:
        """Pool `h`; shapes, results and errors are those of `hierarchical_attention`.

        Raises
        ------
        ValueError, TypeError
            Also for inputs of other widths, dtypes or devices than the parameters', and where a context is given
            without its width, or missing with it.

        """
        inner_offsets, outer_offsets = as_offsets(inner_offsets), as_offsets(outer_offsets)
        sizes = {
            f"{name}_context_dim": width_of(x.context) for name, x in (("inner", self.inner), ("outer", self.outer))
        }
        check = module_checker(_INPUTS, weight_of(self.inner.proj), dim=width_of(self.inner.proj), **sizes)
        check("h", h)
        check("inner_offsets", inner_offsets)
        check("outer_offsets", outer_offsets)
        check.bind_sequences("S", inner_offsets, "inner_offsets")
        check.bind_sequences("G", outer_offsets, "outer_offsets")
        for name, level, context in (("inner", self.inner, inner_context), ("outer", self.outer, outer_context)):
            _check_given(name, level, context)
            if context is not None:
                check_context(check, f"{name}_context", context)
        return hierarchical_attention(
            h,
            inner_offsets,
            outer_offsets,
            _score_of("inner", self.inner, inner_context),
            _score_of("outer", self.outer, outer_context),
            between=self.between,
            mask=mask,
            return_segments=return_segments,
            return_weights=return_weights,
            return_scores=return_scores,
            return_lse=return_lse,
            return_state=return_state,
            impl=impl,
        )


def _check_given(name: str, level: LocationAttention, context: Tensor | None) -> None:
    """Check that a context is given where the level has a width for it."""
    if (context is None) != (level.context is None):
        given = "None" if context is None else "a tensor"
        option = f"{name}_context_dim"
        wanted = f"None, since {option} is None" if level.context is None else f"a tensor, by {option}"
        raise ValueError(f"{name}_context: expected {wanted}; got {given}")


def _score_of(name: str, level: LocationAttention, context: Tensor | None) -> Score:
    """The parameters of a level, and its context projected."""
    assert level.score is not None
    proj, score = read(f"{name}.proj", level.proj), read(f"{name}.score", level.score)
    return Score(
        proj.weight.t(),
        proj.bias,
        score.weight[0],
        gate_of(level, f"{name}.gate"),
        None if level.context is None or context is None else project(level.context, context),
        level.activation,
        level.gate_activation,
    )
