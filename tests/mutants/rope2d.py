"""Mutants of rope2d."""

from __future__ import annotations

from .mutant import Mutant

ROTATION_FILE = "rope2d/rotation.py"
FORWARD_FILE = "rope2d/forward.py"
BACKWARD_FILE = "rope2d/backward.py"
TESTS = "tests/kernels/test_rope2d_interpret.py"
FORWARD = (TESTS, "-k", "rotation_bits_on or forward_on or one_pass_rounds")
BACKWARD = (TESTS, "-k", "backward_on or same_bits_every")

MUTANTS = (
    Mutant(
        "rope2d: load mask dropped",
        ROTATION_FILE,
        "tl.load(pointer + channels, mask=channels < WIDTH, other=0.0).to(high)",
        "tl.load(pointer + channels).to(high)",
        FORWARD,
    ),
    Mutant(
        "rope2d: rotate store mask of tail dropped",
        ROTATION_FILE,
        "turn(x_tail, table_tail, CONJUGATE).to(low), mask=tail < WIDTH)",
        "turn(x_tail, table_tail, CONJUGATE).to(low))",
        FORWARD,
    ),
    Mutant(
        "rope2d: forward store mask of tail dropped",
        FORWARD_FILE,
        "tl.store(out_ptr + tail, y_tail, mask=tail < WIDTH)",
        "tl.store(out_ptr + tail, y_tail)",
        FORWARD,
    ),
    Mutant(
        "rope2d: column and row swapped",
        ROTATION_FILE,
        "tl.where(inside < HALF, column, row)",
        "tl.where(inside < HALF, row, column)",
        FORWARD,
    ),
    Mutant(
        "rope2d: sine's sign",
        ROTATION_FILE,
        "first, second = a * cos - b * sin, b * cos + a * sin",
        "first, second = a * cos + b * sin, b * cos - a * sin",
        FORWARD,
    ),
    Mutant(
        "rope2d: -sin as Triton does",
        ROTATION_FILE,
        "first, second = a * cos + b * sin, b * cos - a * sin",
        "sin = -sin\n        first, second = a * cos - b * sin, b * cos + a * sin",
        FORWARD,
    ),
    Mutant(
        "rope2d: fused multiply-add in rotation",
        ROTATION_FILE,
        "first, second = a * cos - b * sin, b * cos + a * sin",
        "first, second = tl.fma(a, cos, -(b * sin)), tl.fma(b, cos, a * sin)",
        FORWARD,
    ),
    Mutant(
        "rope2d: out stride is x's",
        ROTATION_FILE,
        "out_ptr += token.to(tl.int64) * stride_out_token\n    x_main = load_high(x_ptr, main, WIDTH, high)\n    x_tail = load_high(x_ptr, tail, WIDTH, high)\n    row,",
        "out_ptr += token.to(tl.int64) * stride_x_token\n    x_main = load_high(x_ptr, main, WIDTH, high)\n    x_tail = load_high(x_ptr, tail, WIDTH, high)\n    row,",
        FORWARD,
    ),
    Mutant(
        "rope2d: eps outside of the mean",
        FORWARD_FILE,
        "scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH) + EPS)\n    # Rounded",
        "scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail) + EPS) * (1 / WIDTH))\n    # Rounded",
        FORWARD,
    ),
    Mutant(
        "rope2d: tail left out of the square",
        FORWARD_FILE,
        "scale = tl.rsqrt((tl.sum(x_main * x_main) + tl.sum(x_tail * x_tail)) * (1 / WIDTH) + EPS)\n    # Rounded",
        "scale = tl.rsqrt(tl.sum(x_main * x_main) * (1 / WIDTH) + EPS)\n    # Rounded",
        FORWARD,
    ),
    Mutant(
        "rope2d: mean over padded width",
        FORWARD_FILE,
        "tl.sum(x_tail * x_tail)) * (1 / WIDTH) + EPS)\n    # Rounded",
        "tl.sum(x_tail * x_tail)) / (MAIN + TAIL) + EPS)\n    # Rounded",
        FORWARD,
    ),
    Mutant(
        "rope2d: weight dropped on the tail",
        FORWARD_FILE,
        "y_tail = (load_high(weight_ptr, tail, WIDTH, high) * (x_tail * scale)).to(low)",
        "y_tail = (x_tail * scale).to(low)",
        FORWARD,
    ),
    Mutant(
        "rope2d: k turned in cross-attention",
        FORWARD_FILE,
        "token - num_q_tokens, ROTATE_K, EPS",
        "token - num_q_tokens, True, EPS",
        FORWARD,
    ),
    Mutant(
        "rope2d: k's token not rebased",
        FORWARD_FILE,
        "token - num_q_tokens, ROTATE_K, EPS",
        "token, ROTATE_K, EPS",
        FORWARD,
    ),
    Mutant(
        "rope2d: k normed by q's weight",
        FORWARD_FILE,
        "k_ptr, k_weight_ptr, row_ptr, column_ptr, table_ptr, k_out_ptr",
        "k_ptr, q_weight_ptr, row_ptr, column_ptr, table_ptr, k_out_ptr",
        FORWARD,
    ),
    Mutant(
        "rope2d: rounding before the rotation dropped",
        FORWARD_FILE,
        "y_main = (load_high(weight_ptr, main, WIDTH, high) * (x_main * scale)).to(low)",
        "y_main = (load_high(weight_ptr, main, WIDTH, high) * (x_main * scale))",
        FORWARD,
    ),
    Mutant(
        "rope2d: backward: last run unmasked",
        BACKWARD_FILE,
        "tl.minimum(first + tokens_per_program, num_tokens)",
        "first + tokens_per_program",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: only a run's first token",
        BACKWARD_FILE,
        "for token in range(first, tl.minimum(first + tokens_per_program, num_tokens))",
        "for token in range(first, tl.minimum(first + 1, num_tokens))",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: not turned back",
        BACKWARD_FILE,
        "grad_main = turn(grad_main, table_main, CONJUGATE=True)",
        "grad_main = turn(grad_main, table_main, CONJUGATE=False)",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: projection dropped",
        BACKWARD_FILE,
        "(scale * (grad_tail - x_tail * along))",
        "(scale * grad_tail)",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: weight gradient from raw x",
        BACKWARD_FILE,
        "sum_main += grad_main * x_main",
        "sum_main += grad_main * x_main / scale",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: sum overwritten",
        BACKWARD_FILE,
        "sum_tail += grad_tail * x_tail",
        "sum_tail = grad_tail * x_tail",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: partial row off",
        BACKWARD_FILE,
        "partial_ptr += part.to(tl.int64) * WIDTH",
        "partial_ptr += part.to(tl.int64) * MAIN",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: gradient stride is x's",
        BACKWARD_FILE,
        "load_high(grad_ptr + token * stride_grad_token, tail",
        "load_high(grad_ptr + token * stride_x_token, tail",
        BACKWARD,
    ),
    Mutant(
        "rope2d: backward: k's count is q's",
        BACKWARD_FILE,
        "stride_grad_k_out_token, stride_k_token, stride_grad_k_token, num_k_tokens",
        "stride_grad_k_out_token, stride_k_token, stride_grad_k_token, num_q_tokens",
        BACKWARD,
    ),
    Mutant("rope2d: backward: k's part not rebased", BACKWARD_FILE, "part - num_q_parts", "part", BACKWARD),
    Mutant(
        "rope2d: backward: eps dropped",
        BACKWARD_FILE,
        "+ EPS)\n        x_main, x_tail = x_main * scale",
        ")\n        x_main, x_tail = x_main * scale",
        BACKWARD,
    ),
)
