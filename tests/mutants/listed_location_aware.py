"""The listed mutants of the location-aware kernels."""

from mutant import Mutant

LOCATION_AWARE: tuple[Mutant, ...] = (
    Mutant(
        "kernels/location_aware.py",
        "    at = t[:, None] + (k - size.K // 2)[None, :]\n",
        "    at = t[:, None] + (k - size.K // 2 + 1)[None, :]\n",
        ("tests/test_location_aware.py", "-k", "by_hand"),
        "the windows are one place off",
    ),
    Mutant(
        "kernels/location_aware.py",
        "        at = seq * per_seq + i\n",
        "        at = seq + i\n",
        ("tests/test_location_aware.py", "-k", "every_size"),
        "parts of other sequences are merged",
    ),
    Mutant(
        "kernels/location_aware.py",
        "_store_weights(result, row0 + t, exp(s - shift, flags.FMA) * inv, t < hi)",
        "_store_weights(result, row0 + t, exp(s - shift, flags.FMA), t < hi)",
        ("tests/test_location_aware.py", "-k", "by_hand"),
        "weights are not divided by their sum",
    ),
    Mutant(
        "kernels/location_aware_bwd.py",
        "tl.load(given.g + row * Tk + t, mask=keep, other=0.0) - delta)",
        "tl.load(given.g + row * Tk + t, mask=keep, other=0.0))",
        ("tests/test_location_aware.py", "-k", "one_gradient_alone"),
        "δ is missing",
    ),
    Mutant(
        "kernels/location_aware_bwd.py",
        "        tl.store(ptrs + r, zero, mask=there & (r < k[:, None] - half) & (part == 0))\n",
        "",
        ("tests/test_location_aware.py", "-k", "one_gradient_alone"),
        "what is past the first key is not zero",
    ),
    Mutant(
        "kernels/location_aware_bwd.py",
        "mask=some & ((t0 > lo) | (step > 0)), other=0.0)",
        "mask=some & (t0 < lo), other=0.0)",
        ("tests/test_location_aware.py", "-k", "every_size"),
        "the filters' gradient is of the last tile alone",
    ),
    Mutant(
        "kernels/location_aware.py",
        "    f_ptr = filters.f + channel * filters.stride_fp\n",
        "    f_ptr = filters.f\n",
        ("tests/test_location_aware.py", "-k", "channels_of_history_match and float32"),
        "all channels of a history have the filters of the first",
    ),
    Mutant(
        "kernels/location_aware_bwd.py",
        "row = ((group + place) * num_seqs + seq) * flags.P + channel\n",
        "row = ((group + place) * num_seqs + seq) * flags.P\n",
        ("tests/test_location_aware.py", "-k", "channels_of_history_match and float32"),
        "the gradients of a history's channels are in one place",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "                if p + 1 < flags.P - flags.SUM:\n",
        "                if p + 1 < flags.P:\n",
        ("tests/test_location_aware_sequence.py", "-k", "channels_of_history_match and sum"),
        "the sum goes on as the last weights",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "            if flags.SUM and flags.P > 1:  # of the last weights too\n",
        "            if False:\n",
        ("tests/test_location_aware_sequence.py", "-k", "channels_of_history_match and sum"),
        "weights have the gradient of their sum alone",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "                elif p > 0:\n",
        "                elif False:\n",
        ("tests/test_location_aware_sequence.py", "-k", "channels_of_history_match and last"),
        "gradients of weights before the last are lost",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "                alpha += tl.load(now_ptr + last, mask=inside, other=0.0)\n",
        "                alpha += 0.0\n",
        ("tests/test_location_aware_sequence.py", "-k", "step_after"),
        "a step sees the last weights where it is to see their sum",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "[:, None] + (size.K // 2 - place)[None, :]",
        "[:, None] + (place - size.K // 2)[None, :]",
        ("tests/test_location_aware_sequence.py", "-k", "one_gradient_alone"),
        "the filters are not turned round in the backward",
    ),
    Mutant(
        "kernels/location_aware_walk.py",
        "                    dp += tl.load(dp_ptr + Tk * p + t, mask=inside, other=0.0)\n",
        "                    dp += 0.0\n",
        ("tests/test_location_aware_sequence.py", "-k", "test_matches_the_reference"),
        "the gradient of a sum stops at the last weights",
    ),
)
