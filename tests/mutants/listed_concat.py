"""The listed mutants of the kernels of concat, as those of listed_kernels.py."""

from mutant import Mutant

CONCAT: tuple[Mutant, ...] = (
    Mutant(
        "kernels/concat_factors.py",
        'tl.where(y == y, tl.abs(y), float("inf"))',
        'tl.where(y == y, -y, float("inf"))',
        ("tests/test_concat_exactness.py", "-k", "tiles_that_exceed or any_size"),
        "the bound of a tile sees negative numbers alone",
    ),
    Mutant(
        "kernels/concat.py",
        "tl.fma(tl.fma(v0, x1, v1 * x0), reciprocal",
        "tl.fma(tl.fma(v0, x0, v1 * x1), reciprocal",
        ("tests/test_concat.py", "-k", "kernel_matches"),
        "a pair's reciprocals are exchanged",
    ),
    Mutant(
        "kernels/concat.py",
        "                    s = v_sum - 2.0 * s",
        "                    s = -2.0 * s",
        ("tests/test_concat_cotangents.py", "-k", "free_gradients"),
        "the constant of the factored tanh is missing, which the weights do not need and l does",
    ),
    Mutant(
        "kernels/concat.py",
        "    return tl.fma(a_rest, b, tl.fma(a, b_rest, tl.fma(a, b, one)))",
        "    return tl.fma(a_rest, b, tl.fma(a, b, one))",
        ("tests/test_concat_exactness.py", "-k", "cancel or one_sign or large_v"),
        "a factor's second part is cut",
    ),
    Mutant(
        "kernels/concat_walk.py",
        "p * (dp - delta[:, None])",
        "p * dp",
        ("tests/test_concat_cotangents.py", "-k", "free_gradients"),
        "δ is missing",
    ),
    Mutant(
        "kernels/concat_walk.py",
        "                    s2 += g1 * (r1 - r1 * r1)",
        "                    s2 += g1 * (r1 + r1 * r1)",
        ("tests/test_concat_cotangents.py", "-k", "free_gradients"),
        "the derivative of tanh has a sign wrong",
    ),
    Mutant(
        "kernels/concat_bwd.py",
        "            total += tl.sum(tl.load(g_tile + n[:, None] * blocks.M + m[None, :]), axis=0)",
        "            total += 0.0",
        ("tests/test_concat_cotangents.py", "-k", "free_gradients"),
        "dv lacks the sum of g",
    ),
    Mutant(
        "kernels/concat_bwd.py",
        "j < k_hi, d, size.A, q_item0)",
        "j < k_hi, d, size.A, 0)",
        ("tests/test_concat_structure.py", "-k", "workspace"),
        "dk of earlier launches is overwritten",
    ),
    Mutant(
        "kernels/concat_bwd.py",
        "j < k_hi, d, size.DV, q_item0)",
        "j < k_hi, d, size.DV, 0)",
        ("tests/test_concat_structure.py", "-k", "workspace"),
        "dvalue of earlier launches is overwritten",
    ),
    Mutant(
        "kernels/concat_walk.py",
        "            dp = tl.fma(do, values - out, dp)",
        "            dp = tl.fma(do, values, dp)",
        ("tests/test_concat.py", "-k", "every_pair"),
        "δ is missing where the difference is taken pair by pair",
    ),
    Mutant(
        "kernels/concat_walk.py",
        "    k_at = (k_start + j).to(tl.int64)",
        "    k_at = k_start + j",
        ("tests/test_concat_structure.py", "-k", "past_int32"),
        "a key's number is int32 when it meets a stride",
    ),
    Mutant(
        "kernels/concat_bwd_packed.py",
        "                s1 = total[:, None] - 2.0 * s1",
        "                s1 = -2.0 * s1",
        ("tests/test_concat_cotangents.py", "-k", "packed_rows"),
        "dv lacks the sum of g",
    ),
    Mutant(
        "kernels/concat_bwd_packed.py",
        "tl.load(ptrs, mask=d < size.AP, other=0.0) + tl.sum(s1, axis=0)",
        "tl.sum(s1, axis=0)",
        ("tests/test_pairs.py", "-k", "any_segments"),
        "dv of earlier tiles is overwritten",
    ),
    Mutant(
        "kernels/concat_bwd_packed.py",
        "window_tiles(mirrored(window), k_lo, k_hi, q_length",
        "window_tiles(mirrored(window), k_lo, k_lo, q_length",
        ("tests/test_pairs.py", "-k", "any_segments"),
        "the last tile of queries in a window's left side is not walked",
    ),
    Mutant(
        "kernels/concat_bwd_packed.py",
        "                add_rows(grads.value + before * size.DV + at * size.DV, new, k_keep, d, size.DV)",
        "                ptrs = (grads.value + before * size.DV + at * size.DV)[:, None] + d[None, :]\n"
        "                tl.store(ptrs, new, mask=k_keep[:, None] & (d < size.DV)[None, :])",
        ("tests/test_pairs.py", "-k", "any_segments"),
        "dvalue of earlier tiles is overwritten",
    ),
    Mutant(
        "kernels/concat_factors.py",
        "        delta -= load_dlse(saved.dlse + rows * 2, saved.lse + rows * 2, inside)",
        "        delta -= 0.0",
        ("tests/test_concat_cotangents.py",),
        "the gradient of the normaliser does not reach the scores",
    ),
)
