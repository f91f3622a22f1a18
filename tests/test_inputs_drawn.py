"""Thousands of calls with one or two arguments spoiled: each is right, or raises an error that names an argument."""

import functools
import inspect
import random
import re

import pytest
import torch
from _inputs import BAD_OPTIONS, ROWS, bad_offsets, bad_tensors, map_tensors, tensors

pytestmark = pytest.mark.long
SHARES, CALLS = 12, 500

GOOD_OPTIONS = {
    "activation": ["identity", "tanh", "relu", "sigmoid", "leaky_relu", "elu", "gelu", "silu"],
    "gate_activation": ["tanh", "sigmoid"],
    "impl": ["auto", "reference", "triton"],
    "p": [1, 2, 1.0],
    "scale": [0, 0.5, -2, 1e-30],
    "floor": [0, 1e-3, 10**6],
    "window": [None, (None, 0), (None, -1), (1, 1), (0, None), (-2, 5), (10**30, 10**5000), (-3, -4)],
    "return_weights": [True, False],
    "return_segments": [True, False],
}


def resized(x, axis, size):
    """`x` with another size along an axis, by repeating it."""
    if size > x.shape[axis] > 0:
        x = torch.cat([x] * -(-size // x.shape[axis]), axis)
    return x.narrow(axis, 0, min(size, x.shape[axis]))


def kind(draw, arguments, names, row):
    name = draw.choice(names)
    if not isinstance(arguments[name], torch.Tensor) or arguments[name].layout != torch.strided:
        return
    bad = bad_tensors(ROWS[row].arguments[name])
    arguments[name] = bad[draw.choice(list(bad))]


def size(draw, arguments, names, row):
    x = arguments[name := draw.choice(names)]
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested and x.dim():
        axis = draw.randrange(x.dim())
        arguments[name] = resized(x, axis, draw.choice([0, 1, x.shape[axis] + 1, max(x.shape[axis] - 1, 0), 2, 7]))


def size_of_all(draw, arguments, names, row):
    """Every axis of a size gets another."""
    old, new = draw.choice([2, 3, 4, 5, 6, 7, 8, 9]), draw.choice([0, 0, 1, 1, 2, 5])

    def change(x):
        if x.layout != torch.strided or x.is_nested or not (x.is_floating_point() or x.dtype == torch.bool):
            return x
        for axis, n in enumerate(x.shape):
            x = resized(x, axis, new) if n == old else x
        return x

    arguments.update(map_tensors(change, arguments))


def option(draw, arguments, names, row):
    has = [n for n in inspect.signature(ROWS[row].function).parameters if n in BAD_OPTIONS or n in GOOD_OPTIONS]
    if has:
        name = draw.choice(has)
        bad = [x for values in BAD_OPTIONS.get(name, {}).values() for x in values]
        arguments[name] = draw.choice(bad + 2 * GOOD_OPTIONS.get(name, []))


def offsets(draw, arguments, names, row):
    has = [n for n in names if "cu_seqlens" in n or n.endswith("offsets") or n == "indptr"]
    if has:
        cu = ROWS[row].arguments[name := draw.choice(has)]
        bad = bad_offsets(cu, int(cu[-1]))
        arguments[name] = bad[draw.choice(list(bad))]


def swap(draw, arguments, names, row):
    one, other = draw.choice(names), draw.choice(names)
    arguments[one], arguments[other] = arguments[other], arguments[one]


def drop(draw, arguments, names, row):
    arguments[draw.choice(names)] = None


def turn(draw, arguments, names, row):
    x = arguments[name := draw.choice(names)]
    if isinstance(x, torch.Tensor) and x.dim() > 1 and x.layout == torch.strided and not x.is_nested:
        arguments[name] = x.mT


def dtype(draw, arguments, names, row):
    to = draw.choice([torch.float16, torch.bfloat16, torch.float64])

    def change(x):
        return x.to(to) if x.dtype == torch.float32 and x.layout == torch.strided and not x.is_nested else x

    arguments.update(map_tensors(change, arguments))


def layout(draw, arguments, names, row):
    x = arguments[name := draw.choice(names)]
    if isinstance(x, torch.Tensor) and x.layout == torch.strided and not x.is_nested and x.dim():
        arguments[name] = torch.stack([x, x], -1)[..., 0]


def nothing_visible(draw, arguments, names, row):
    if isinstance(ROWS[row].arguments.get("mask"), torch.Tensor):
        arguments["mask"] = torch.zeros_like(ROWS[row].arguments["mask"])


SPOIL = [
    kind,
    kind,
    size,
    size,
    size_of_all,
    option,
    option,
    offsets,
    swap,
    drop,
    turn,
    dtype,
    layout,
    nothing_visible,
]


def drawn(draw):
    """The name of a row, and its arguments with one or two of them changed."""
    row = draw.choice(list(ROWS))
    arguments = dict(ROWS[row].arguments)
    names = tensors(arguments)
    for spoil in draw.sample(SPOIL, draw.choice([1, 1, 2, 3])):
        spoil(draw, arguments, names, row)
    return row, arguments


def outcome(row, arguments):
    """The result of a call, or the text of its error."""
    torch.manual_seed(0)
    made = ROWS[row].make()
    dtypes = {
        x.dtype for x in flat(list(arguments.values())) if isinstance(x, torch.Tensor) and x.is_floating_point()
    }
    if isinstance(made, torch.nn.Module) and len(dtypes) == 1:
        made = made.to(dtypes.pop())
    try:
        return made(**arguments)
    except (ValueError, TypeError) as error:
        return str(error)


def flat(x):
    return [z for y in x for z in flat(y)] if isinstance(x, (tuple, list)) else [] if x is None else [x]


@pytest.mark.parametrize("share", range(SHARES))
def test_spoiled_calls_are_right_or_name_an_argument(share):
    draw = random.Random(share)
    for i in range(CALLS):
        row, arguments = drawn(draw)
        got = outcome(row, arguments)
        if isinstance(got, str):
            named = re.match(r"([a-z_]+)[\w.\[\]]*: ", got)
            assert named, (share, i, row, got)
            assert named[1] in inspect.signature(ROWS[row].function).parameters, (share, i, row, got)
            continue
        exact = map_tensors(lambda x: x.double() if x.is_floating_point() else x, arguments)
        if "impl" in inspect.signature(ROWS[row].function).parameters:
            exact["impl"] = "reference"
        want = outcome(row, exact)
        assert not isinstance(want, str), (share, i, row, want)
        for x, y in zip(flat(got), flat(want), strict=True):
            assert x.shape == y.shape, (share, i, row)
            if x.device.type != "meta":
                error = {torch.float16: 2e-2, torch.bfloat16: 2e-1, torch.float32: 1e-3}.get(x.dtype, 1e-9)
                where = f"{share, i, row}: "
                torch.testing.assert_close(
                    x.double(), y.double(), rtol=error, atol=error, msg=functools.partial(str.__add__, where)
                )
