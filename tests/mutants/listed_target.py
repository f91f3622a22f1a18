"""The listed mutants of target attention."""

from mutant import Mutant

_FACTORS = ("tests/test_target.py", "-k", "every_pair")

TARGET: tuple[Mutant, ...] = (
    Mutant(
        "kernels/target.py",
        "        matrix = of_key.to(tl.float32) + q[:, None] * of_product.to(tl.float32)",
        "        matrix = of_key.to(tl.float32) + of_product.to(tl.float32)",
        _FACTORS,
        "the query is not in the first layer's matrix",
    ),
    Mutant(
        "kernels/target.py",
        "            acc *= alpha",
        "            acc *= 1.0",
        ("tests/test_target.py", "-k", "in_parts or other_sizes"),
        "the running sum is not scaled to the new maximum",
    ),
    Mutant(
        "kernels/target.py",
        "        l = tl.where(lo == 0, tl.full([1], 1.0, tl.float32), 0.0)",
        "        l = tl.full([1], 1.0, tl.float32)",
        ("tests/test_target.py", "-k", "in_parts or of_every_length"),
        "parts of a plain sum are averaged",
    ),
    Mutant(
        "kernels/target.py",
        "            p = tl.where(keep[:, None], s, 0.0)",
        "            p = s",
        ("tests/test_target.py", "-k", "hidden_keys"),
        "a hidden key has the weight -inf",
    ),
    Mutant(
        "kernels/target_bwd.py",
        "        grad += q[None, :] * product",
        "        grad += product",
        _FACTORS,
        "the gradient of keys has not met the query",
    ),
    Mutant(
        "kernels/target_bwd.py",
        "        of_product += q[:, None] * part",
        "        of_product += part",
        _FACTORS,
        "the gradient of the product's weight has not met the query",
    ),
    Mutant(
        "kernels/target_bwd.py",
        "    ds *= scale",
        "    ds *= 1.0",
        _FACTORS,
        "gradients of the scores are not scaled",
    ),
    Mutant(
        "kernels/target_bwd.py",
        "        dz2 = ds * v[None, :] * activate_grad(z2, u2, flags.ACT, flags.FAST)",
        "        dz2 = ds * v[None, :]",
        _FACTORS,
        "the second activation has the derivative 1",
    ),
    Mutant(
        "kernels/target_bwd.py",
        "    sends = visible & (cotangent != 0)[None, :]",
        "    sends = visible",
        ("tests/test_target.py", "-k", "without_a_cotangent"),
        "a user of NaN without a cotangent sends NaN",
    ),
    Mutant(
        "kernels/target_bwd.py",
        '        args |= {"item0": item0, "items": count, "items_per_split": cdiv(count, splits)}',
        '        args |= {"item0": 0, "items": count, "items_per_split": cdiv(count, splits)}',
        ("tests/test_target.py", "-k", "many_launches"),
        "every launch of a backward has the first items",
    ),
    Mutant(
        "fused_attn/target.py",
        "    of_all = of_query + of_difference",
        "    of_all = of_query - of_difference",
        ("tests/test_target.py", "-k", "formula"),
        "the difference has the other sign for the query",
    ),
    Mutant(
        "fused_attn/reference.py",
        "weights, scores = scores.masked_fill(~mask[..., None], 0), ",
        "weights, scores = scores, ",
        ("tests/test_target.py", "-k", "formula or made_of_the_scores"),
        "without a softmax hidden keys are summed",
    ),
    Mutant(
        "fused_attn/modules/target.py",
        "            b3=None if score.bias is None else score.bias[0],",
        "            b3=None,",
        ("tests/test_target.py", "-k", "mlp_of_the_four_parts"),
        "the module forgets its last bias",
    ),
)
