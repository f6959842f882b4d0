"""Mutants of varlen_attention."""

from __future__ import annotations

from .mutant import Mutant

TESTS = ("tests/kernels/test_varlen_attention_interpret.py",)
IN_BFLOAT16 = (
    "tests/kernels/test_varlen_attention_emulated.py", "-k", "test_self_attention and 90 and 72 and bfloat16",
)  # fmt: skip
"""The compiled kernels: what 16 bits round must not hide a mistake."""

MUTANTS = (
    Mutant(
        "varlen_attention: mask of the last tile of keys dropped (forward)",
        "varlen_attention/forward.py",
        '    if MASKED:\n        s = tl.where((rows < limit)[None, :], s, float("-inf"))\n',
        "",
        TESTS,
    ),
    Mutant(
        "varlen_attention: accumulator not rescaled",
        "varlen_attention/forward.py",
        "        acc_main *= shrink[:, None]\n",
        "",
        TESTS,
    ),
    Mutant(
        "varlen_attention: tail accumulator not rescaled",
        "varlen_attention/forward.py",
        "        acc_tail *= shrink[:, None]\n",
        "",
        TESTS,
    ),
    Mutant(
        "varlen_attention: row sum not rescaled",
        "varlen_attention/forward.py",
        "        row_sum *= shrink\n",
        "",
        TESTS,
    ),
    Mutant(
        "varlen_attention: last ragged tile of keys skipped (forward)",
        "varlen_attention/forward.py",
        "        if whole < k_len:",
        "        if whole + 1 < 0:",
        TESTS,
    ),
    Mutant(
        "varlen_attention: guard of the fixed maximum dropped",
        "varlen_attention/forward.py",
        "tl.where(row_sum < GROWTH, 0, 1)",
        "tl.where(row_sum <= float('inf'), 0, 1)",
        TESTS,
    ),
    Mutant(
        "varlen_attention: fixed maximum never recomputed where short",
        "varlen_attention/forward.py",
        "if k_len >= FIXED_MAX_TILES * BLOCK_N:",
        "if k_len >= BLOCK_N:",
        TESTS,
        survives="short members may take either way; only their speed differs",
    ),
    Mutant(
        "varlen_attention: row sum from the wrong lane",
        "varlen_attention/forward.py",
        "(MAIN + tl.arange(0, TAIL) == HEAD_DIM)[None, :], acc_tail",
        "(MAIN + tl.arange(0, TAIL) == HEAD_DIM - 1)[None, :], acc_tail",
        TESTS,
    ),
    Mutant(
        "varlen_attention: stride of v taken from k",
        "varlen_attention/forward.py",
        "stride_k, stride_v = stride_k_token * unit, stride_v_token * unit",
        "stride_k, stride_v = stride_k_token * unit, stride_k_token * unit",
        TESTS,
    ),
    Mutant(
        "varlen_attention: head offset of v missing",
        "varlen_attention/forward.py",
        "v_ptr += k_start * stride_v + head * HEAD_DIM",
        "v_ptr += k_start * stride_v",
        TESTS,
    ),
    Mutant(
        "varlen_attention: lse of the wrong head",
        "varlen_attention/forward.py",
        "lse_ptr += head.to(tl.int64) * stride_lse_head + q_start",
        "lse_ptr += q_start",
        TESTS,
    ),
    Mutant("varlen_attention: lse to base 2", "varlen_attention/forward.py", "* LN_2", "* 1.0", TESTS),
    Mutant(
        "varlen_attention: rows of q not masked on store",
        "varlen_attention/tiles.py",
        "        inside = (rows < limit)[:, None] & inside\n    tl.store(pointer + offsets[:, None] + main",
        "        inside = inside\n    tl.store(pointer + offsets[:, None] + main",
        TESTS,
    ),
    Mutant(
        "varlen_attention: dead lanes stored",
        "varlen_attention/tiles.py",
        "    inside = (main < HEAD_DIM)[None, :]\n",
        "    inside = (main < MAIN)[None, :]\n",
        TESTS,
    ),
    Mutant(
        "varlen_attention: tail lanes of products dropped",
        "varlen_attention/tiles.py",
        "        s = tl.dot(x_tail, tl.trans(y_tail), s, input_precision=PRECISION, out_dtype=high)",
        "        s = s",
        TESTS,
    ),
    Mutant(
        "varlen_attention: dead lanes of q and k not zero",
        "varlen_attention/tiles.py",
        "    elif MASK_LANES:\n        x = tl.load(place, mask=(lanes < HEAD_DIM)[None, :], other=0.0)",
        "    elif MASK_LANES:\n        x = tl.load(place)",
        TESTS,
    ),
    Mutant(
        "varlen_attention: member's neighbour: cu_q read for k",
        "varlen_attention/tiles.py",
        "k_start, k_end = tl.load(cu_k_ptr + member), tl.load(cu_k_ptr + member + 1)",
        "k_start, k_end = tl.load(cu_q_ptr + member), tl.load(cu_q_ptr + member + 1)",
        TESTS,
    ),
    Mutant(
        "varlen_attention: delta not subtracted (keys)",
        "varlen_attention/backward.py",
        "ds = (p * (dp - delta[None, :])).to(q_main.dtype)",
        "ds = (p * dp).to(q_main.dtype)",
        TESTS,
    ),
    Mutant(
        "varlen_attention: delta added (queries)",
        "varlen_attention/backward.py",
        "(dp - delta[:, None])",
        "(dp + delta[:, None])",
        TESTS,
    ),
    Mutant(
        "varlen_attention: dk not scaled",
        "varlen_attention/backward.py",
        "dk_main * SCALE, dk_tail * SCALE",
        "dk_main, dk_tail",
        TESTS,
    ),
    Mutant(
        "varlen_attention: dq tail not scaled",
        "varlen_attention/backward.py",
        "dq_main * SCALE, dq_tail * SCALE",
        "dq_main * SCALE, dq_tail",
        TESTS,
    ),
    Mutant(
        "varlen_attention: last ragged tile of queries skipped (keys)",
        "varlen_attention/backward.py",
        "        if whole < q_len:",
        "        if whole + 1 < 0:",
        TESTS,
    ),
    Mutant(
        "varlen_attention: last ragged tile of keys skipped (queries)",
        "varlen_attention/backward.py",
        "        if whole < k_len:",
        "        if whole + 1 < 0:",
        TESTS,
    ),
    Mutant(
        "varlen_attention: mask of missing keys dropped (queries)",
        "varlen_attention/backward.py",
        '        s = tl.where((keys < limit)[None, :], s, float("-inf"))\n',
        "        s = s\n",
        TESTS,
    ),
    Mutant(
        "varlen_attention: tail left out of delta",
        "varlen_attention/backward.py",
        "    if TAIL > 0:\n        delta += tl.sum(g_tail",
        "    if TAIL < 0:\n        delta += tl.sum(g_tail",
        TESTS,
    ),
    Mutant(
        "varlen_attention: grad_lse added to delta",
        "varlen_attention/backward.py",
        "delta -= tl.load(place",
        "delta += tl.load(place",
        TESTS,
    ),
    Mutant(
        "varlen_attention: dv stride for dk",
        "varlen_attention/backward.py",
        "dk_ptr += (k_start + first) * (stride_dk_token * unit)",
        "dk_ptr += (k_start + first) * (stride_dv_token * unit)",
        TESTS,
    ),
    Mutant(
        "varlen_attention: queries not advanced (keys)",
        "varlen_attention/backward.py",
        "        q_ptr += BLOCK_M * stride_q\n",
        "",
        TESTS,
    ),
    Mutant(
        "varlen_attention: gradient's tile start wrong (queries)",
        "varlen_attention/backward.py",
        "grad_ptr += (q_start + first) * (stride_grad_token * unit)",
        "grad_ptr += q_start * (stride_grad_token * unit)",
        TESTS,
    ),
    *(
        Mutant(
            f"varlen_attention: {name}, in bfloat16", f"varlen_attention/{file}.py", before, after, IN_BFLOAT16, False
        )
        for name, file, before, after in (
            ("dq zero", "backward", "dq_main * SCALE, dq_tail * SCALE", "dq_main * 0, dq_tail * 0"),
            ("dk zero", "backward", "dk_main * SCALE, dk_tail * SCALE", "dk_main * 0, dk_tail * 0"),
            (
                "dq a fiftieth larger",
                "backward",
                "dq_main * SCALE, dq_tail * SCALE",
                "dq_main * (SCALE * 1.02), dq_tail * SCALE",
            ),
            (
                "delta not subtracted (keys)",
                "backward",
                "ds = (p * (dp - delta[None, :])).to(q_main.dtype)",
                "ds = (p * dp).to(q_main.dtype)",
            ),
            ("delta not subtracted (queries)", "backward", "(dp - delta[:, None])", "dp"),
            (
                "last ragged tile of keys skipped (queries)",
                "backward",
                "        if whole < k_len:",
                "        if whole + 1 < 0:",
            ),
            (
                "last ragged tile of queries skipped (keys)",
                "backward",
                "        if whole < q_len:",
                "        if whole + 1 < 0:",
            ),
            (
                "row sum from the wrong lane",
                "forward",
                "(MAIN + tl.arange(0, TAIL) == HEAD_DIM)[None, :], acc_tail",
                "(MAIN + tl.arange(0, TAIL) == HEAD_DIM - 1)[None, :], acc_tail",
            ),
            (
                "tail left out of delta",
                "backward",
                "    if TAIL > 0:\n        delta += tl.sum(g_tail",
                "    if TAIL < 0:\n        delta += tl.sum(g_tail",
            ),
        )
    ),
)
