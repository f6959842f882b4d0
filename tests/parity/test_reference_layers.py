"""The parts of the reference transformer, one by one: features, positions, patches, norms, attention, conditioning."""

import math

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pixelflow_engine.reference import PixelFlowTransformer
from pixelflow_engine.reference.model import (
    Attention,
    PatchEmbedder,
    RMSNorm,
    TransformerBlock,
    layer_norm,
    patchify,
    rotary_angles,
    rotate,
    sinusoid,
    unpatchify,
)
from support.reference_models import normal, random_reference, randomize, seeded

U64, U32 = 2.0**-53, 2.0**-24


def test_sinusoid_in_fifty_digits() -> None:
    values = [0.0, 1.0, 16.0, 174.825, 999.0]
    features = sinusoid(torch.tensor(values, dtype=torch.float64), torch.float64)
    assert features.shape == (5, 256)
    with mpmath.workdps(50):
        for row, value in zip(features.tolist(), values, strict=True):
            for i in range(128):
                angle = mpmath.mpf(value) * mpmath.exp(-mpmath.log(10000) * i / 127)
                # The angle carries the exponent's rounding (9.2 * 2u), exp's and the product's: 22 u relative.
                tolerance = (22 * float(angle) + 2) * U64
                assert abs(row[i] - mpmath.cos(angle)) <= tolerance, f"cosine {i} of {value}"
                assert abs(row[128 + i] - mpmath.sin(angle)) <= tolerance, f"sine {i} of {value}"


def test_sinusoid_is_float32_and_its_last_frequency_is_one_ten_thousandth() -> None:
    features = sinusoid(torch.tensor([999]))  # integers are welcome: a latent size is one
    assert features.dtype == torch.float32
    assert abs(features[0, 127].item() - math.cos(0.0999)) <= 4 * U32
    assert abs(features[0, 255].item() - math.sin(0.0999)) <= 4 * U32
    # A divisor of 128 would give the last frequency 1.07e-4.
    assert abs(math.sin(999 * math.exp(-math.log(1e4) * 127 / 128)) - math.sin(0.0999)) > 1e-3


@pytest.mark.parametrize("dim", [4, 8, 24, 72])
@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (8, 8)], ids=str)
def test_rope_equals_complex_multiplication(dim: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    x = normal((2, rows * columns, 3, dim), seeded(1))
    y = rotate(x, rotary_angles(rows, columns, dim, "cpu", torch.float64)).numpy()
    z = x.numpy()[..., 0::2] + 1j * x.numpy()[..., 1::2]  # neighbours are a complex number
    for n in range(rows * columns):
        row, column = divmod(n, columns)
        for j in range(dim // 2):
            position = column if j < dim // 4 else row
            theta = 10000.0 ** (-2 * (j % (dim // 4)) / (dim / 2))
            turned = z[:, n, :, j] * np.exp(1j * position * theta)
            # |x| below 5, angles to 8 with a relative error of 4u each, then a few roundings.
            assert np.abs(y[:, n, :, 2 * j] - turned.real).max() <= 5 * (8 * 4 + 4) * U64
            assert np.abs(y[:, n, :, 2 * j + 1] - turned.imag).max() <= 5 * (8 * 4 + 4) * U64


def test_rope_knows_only_differences_of_positions() -> None:
    """``<R(m) q, R(n) k>`` is a function of ``n - m`` alone, per axis; and it does depend on it."""
    rows, columns, dim = 6, 7, 24
    generator = seeded(2)
    q, k = normal((dim,), generator), normal((dim,), generator)
    angles = rotary_angles(rows, columns, dim, "cpu", torch.float64)
    everywhere = torch.ones(1, rows * columns, 1, 1, dtype=torch.float64)
    logits = rotate(q * everywhere, angles)[0, :, 0] @ rotate(k * everywhere, angles)[0, :, 0].T
    of_difference: dict[tuple[int, int], list[float]] = {}
    for m in range(rows * columns):
        for n in range(rows * columns):
            difference = (n // columns - m // columns, n % columns - m % columns)
            of_difference.setdefault(difference, []).append(logits[m, n].item())
    # Sums of 24 products of order 10 at angles up to 6.
    assert max(max(values) - min(values) for values in of_difference.values()) <= 24 * 10 * 16 * U64
    means = [np.mean(values) for values in of_difference.values()]
    assert len({round(mean, 6) for mean in means}) == len(of_difference) == (2 * rows - 1) * (2 * columns - 1)


def test_columns_turn_the_first_half_and_rows_the_last() -> None:
    x = torch.ones(1, 6, 1, 8, dtype=torch.float64)
    y = rotate(x, rotary_angles(2, 3, 8, "cpu", torch.float64))[0, :, 0].reshape(2, 3, 8)
    assert torch.equal(y[0, :, :4], y[1, :, :4])  # the row leaves the first half alone
    assert torch.equal(y[:, 0, 4:], y[:, 1, 4:])  # the column leaves the last half alone
    assert not torch.equal(y[0, 0, :4], y[0, 1, :4])
    assert not torch.equal(y[0, 0, 4:], y[1, 0, 4:])
    assert torch.equal(y[0, 0], x[0, 0, 0])  # the first token is not turned
    # One step: the fastest pair turns by 1 rad, the next by 10000^(-1/2) = 0.01 rad.
    expected = [math.cos(1) - math.sin(1), math.cos(1) + math.sin(1)]
    expected += [math.cos(0.01) - math.sin(0.01), math.cos(0.01) + math.sin(0.01)]
    assert (y[0, 1, :4] - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 8 * U64
    assert (y[1, 0, 4:] - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 8 * U64


def test_rotation_is_float32_and_cast_back() -> None:
    x = normal((1, 9, 2, 8), seeded(3), torch.float32).bfloat16()
    angles = rotary_angles(3, 3, 8, "cpu")
    assert angles.dtype == torch.float32
    y = rotate(x, angles)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rotate(x.float(), angles).bfloat16())


@pytest.mark.parametrize(("height", "width", "p"), [(8, 12, 4), (4, 4, 2), (3, 5, 1)])
def test_patchify_is_row_major_in_channel_row_column_order(height: int, width: int, p: int) -> None:
    images = torch.arange(2 * 3 * height * width).reshape(2, 3, height, width)
    patches = patchify(images, p)
    assert patches.shape == (2, (height // p) * (width // p), 3 * p * p)
    for b in range(2):
        for n in range(patches.shape[1]):
            top, left = n // (width // p) * p, n % (width // p) * p
            values = [images[b, c, top + i, left + j] for c in range(3) for i in range(p) for j in range(p)]
            assert patches[b, n].tolist() == values


@pytest.mark.parametrize("p", [1, 2, 4])
def test_patch_embedding_is_the_convolution(p: int) -> None:
    embedder = PatchEmbedder(3, 16, p).double().requires_grad_(False)
    randomize(embedder, seeded(4))
    images = normal((2, 3, 3 * p, 5 * p), seeded(5))
    tokens = embedder(images)
    convolved = F.conv2d(images, embedder.proj.weight, embedder.proj.bias, stride=p).flatten(2).transpose(1, 2)
    assert tokens.shape == convolved.shape == (2, 15, 16)
    # Sums of 3 p^2 products of order 3 (|w| sqrt(3 p^2) is about 1), in two orders.
    assert (tokens - convolved).abs().max() <= 3 * 3 * p * p * 10 * U64
    other_layout = embedder(images.to(memory_format=torch.channels_last))
    assert (other_layout - tokens).abs().max() <= 3 * 3 * p * p * 10 * U64


@pytest.mark.parametrize(("rows", "columns", "p", "channels"), [(2, 3, 4, 3), (1, 1, 2, 1), (3, 2, 1, 3)])
def test_unpatchify_reads_row_column_channel(rows: int, columns: int, p: int, channels: int) -> None:
    patches = torch.arange(2 * rows * columns * p * p * channels).reshape(2, rows * columns, -1)
    images = unpatchify(patches, rows, columns, p)
    assert images.shape == (2, channels, rows * p, columns * p)
    for b in range(2):
        for y in range(rows * p):
            for x in range(columns * p):
                token = y // p * columns + x // p
                for c in range(channels):
                    assert images[b, c, y, x] == patches[b, token, (y % p * p + x % p) * channels + c]


def test_head_of_a_whole_model_writes_row_column_channel() -> None:
    """With a zero output matrix the velocity is the bias, laid out by the head alone."""
    model = random_reference(6, patch_size=2)
    model.proj_out_2.weight.zero_()
    model.proj_out_2.bias.copy_(torch.arange(12.0))
    velocity = model(normal((1, 3, 4, 6), seeded(7)), torch.tensor([1.0]), torch.tensor([0]))
    for c in range(3):
        patch = torch.tensor([[0.0, 3.0], [6.0, 9.0]], dtype=torch.float64) + c
        assert torch.equal(velocity[0, c], patch.repeat(2, 3))


def test_the_input_order_differs_from_the_output_order() -> None:
    x = normal((1, 3, 4, 4), seeded(8))
    assert torch.equal(unpatchify(patchify(x[:, :1], 2), 2, 2, 2), x[:, :1])  # with one channel they agree
    assert not torch.equal(unpatchify(patchify(x, 2), 2, 2, 2), x)


def test_rms_norm_and_layer_norm() -> None:
    generator = seeded(9)
    x = 3 + 2 * normal((4, 5, 16), generator)
    x[0, 0] *= 1e-4  # eps = 1e-6 shows
    norm = RMSNorm(16).double().requires_grad_(False)
    norm.weight.copy_(normal((16,), generator))
    rms = x.numpy() / np.sqrt((x.numpy() ** 2).mean(-1, keepdims=True) + 1e-6) * norm.weight.numpy()
    assert np.abs(norm(x).numpy() - rms).max() <= 5 * 32 * U64
    centred = x.numpy() - x.numpy().mean(-1, keepdims=True)
    layer = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    assert np.abs(layer_norm(x).numpy() - layer).max() <= 5 * 64 * U64
    # In lower precision the norm is float32 inside and comes back in the type of its input.
    low = x.bfloat16()
    single = RMSNorm(16).requires_grad_(False)
    single.weight.copy_(norm.weight)
    assert single(low).dtype == torch.bfloat16
    assert torch.equal(single(low), single(low.float()).bfloat16())


def numpy_attention(
    attention: Attention, x: np.ndarray, source: np.ndarray, heads: int, *, per_head_norm: bool, turn: tuple[bool, bool]
) -> np.ndarray:
    """Attention of one image on a 2 x 3 grid, with the variants that would be mistakes."""
    weights = {name: value.numpy() for name, value in attention.state_dict().items()}

    def project(name: str, values: np.ndarray) -> np.ndarray:
        return values @ weights[f"{name}_proj.weight"].T + weights[f"{name}_proj.bias"]

    def norm(name: str, values: np.ndarray) -> np.ndarray:
        groups = values.reshape(len(values), heads if per_head_norm else 1, -1)
        scale = np.sqrt((groups**2).mean(-1, keepdims=True) + 1e-6)
        return weights[f"{name}_norm.weight"] * (groups / scale).reshape(values.shape)

    def rope(values: np.ndarray) -> np.ndarray:
        dim = values.shape[1]
        out = values.copy()
        for n in range(len(values)):
            for j in range(dim // 2):
                angle = (n % 3 if j < dim // 4 else n // 3) * 10000.0 ** (-4 * (j % (dim // 4)) / dim)
                a, b = values[n, 2 * j], values[n, 2 * j + 1]
                out[n, 2 * j : 2 * j + 2] = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
        return out

    q, k, v = norm("q", project("q", x)), norm("k", project("k", source)), project("v", source)
    dim, out = q.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        q_h, k_h = (rope(t[:, part]) if turned else t[:, part] for t, turned in zip((q, k), turn, strict=True))
        weight = np.exp(q_h @ k_h.T / np.sqrt(dim))
        out.append(weight / weight.sum(-1, keepdims=True) @ v[:, part])
    return project("o", np.concatenate(out, axis=1))


def test_queries_and_keys_are_normalised_over_all_heads_together() -> None:
    attention = Attention(16, 16, 4, bias=True).double().requires_grad_(False)
    randomize(attention, seeded(10))
    for name in ("q_proj", "k_proj"):  # heads of very different sizes
        getattr(attention, name).weight.mul_(torch.tensor([4.0, 1.0, 0.5, 0.1]).repeat_interleave(4)[:, None])
    x = normal((1, 6, 16), seeded(11))
    out = attention(x, None, rotary_angles(2, 3, 4, "cpu", torch.float64))[0].numpy()
    arguments = (attention, x[0].numpy(), x[0].numpy(), 4)
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=False, turn=(True, True))).max() <= 1e-13
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=True, turn=(True, True))).max() > 0.05
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=False, turn=(True, False))).max() > 0.05


def test_crossing_attention_turns_queries_alone() -> None:
    attention = Attention(16, 6, 2, bias=True).double().requires_grad_(False)
    randomize(attention, seeded(12))
    generator = seeded(13)
    x, text = normal((1, 6, 16), generator), normal((1, 6, 6), generator)  # as many text tokens as image tokens
    out = attention(x, text, rotary_angles(2, 3, 8, "cpu", torch.float64))[0].numpy()
    arguments = (attention, x[0].numpy(), text[0].numpy(), 2)
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=False, turn=(True, False))).max() <= 1e-13
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=False, turn=(True, True))).max() > 0.01
    assert np.abs(out - numpy_attention(*arguments, per_head_norm=False, turn=(False, False))).max() > 0.01


def block_with_gates(gate1: float, gate2: float) -> tuple[TransformerBlock, torch.Tensor]:
    """A random block whose two branches are weighted by constants, and a conditioning for it."""
    block = TransformerBlock(16, 2, True, None).double().requires_grad_(False)
    randomize(block, seeded(14))
    for chunk, gate in ((2, gate1), (5, gate2)):
        block.norm1.linear.weight[16 * chunk : 16 * (chunk + 1)] = 0
        block.norm1.linear.bias[16 * chunk : 16 * (chunk + 1)] = gate
    return block, normal((1, 16), seeded(15))


def test_a_layer_norm_stands_before_attention_and_an_rms_norm_before_the_mlp() -> None:
    """LayerNorm does not see a constant added to a token, RMSNorm does; neither sees its scale (but for eps)."""
    angles = rotary_angles(2, 3, 8, "cpu", torch.float64)
    x = normal((1, 6, 16), seeded(16))

    def branch(block: TransformerBlock, c: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return block(x, c, angles, None, None) - x

    attention_only, mlp_only = block_with_gates(1.0, 0.0), block_with_gates(0.0, 1.0)
    assert (branch(*attention_only, x + 3) - branch(*attention_only, x)).abs().max() <= 1e-13
    assert (branch(*mlp_only, x + 3) - branch(*mlp_only, x)).abs().max() > 0.1
    for block in (attention_only, mlp_only):  # eps / 2 relative to a mean square of about 1
        assert (branch(*block, 2 * x) - branch(*block, x)).abs().max() <= 1e-5
        assert branch(*block, x).abs().max() > 0.1
    before = branch(*mlp_only, x), branch(*attention_only, x)
    for block, _ in (mlp_only, attention_only):
        block.norm3.weight.mul_(1.5)
    assert (branch(*mlp_only, x) - before[0]).abs().max() > 0.1  # norm3's weight is the MLP's
    assert torch.equal(branch(*attention_only, x), before[1])


def test_the_six_modulations_come_in_the_published_order() -> None:
    """With a zero matrix the modulations are the bias: shift1, scale1, gate1, shift2, scale2, gate2."""
    block, c = block_with_gates(0.0, 0.0)
    modulations = [torch.full((16,), float(i), dtype=torch.float64) for i in (0, 1, 2, 3, 4, 5)]
    block.norm1.linear.weight.zero_()
    block.norm1.linear.bias.copy_(torch.cat(modulations))
    assert [m.unique().item() for m in block.norm1(c)] == [0, 1, 2, 3, 4, 5]
    angles = rotary_angles(2, 3, 8, "cpu", torch.float64)
    x = normal((1, 6, 16), seeded(17))
    y = x + 2 * block.attn1(layer_norm(x) * (1 + 1) + 0, None, angles)
    y = y + 5 * block.mlp(block.norm3(y) * (1 + 4) + 3)
    assert (block(x, c, angles, None, None) - y).abs().max() <= 1e-12


def test_the_null_class_is_the_last_row_of_the_table() -> None:
    model = random_reference(18, num_classes=5)
    table = model.class_embedder.embedding_table.weight
    assert table.shape == (6, 16)
    t, size = torch.tensor([3.0, 3.0], dtype=torch.float64), torch.tensor([4, 4])
    c = model.conditioning(t, size, torch.tensor([5, 2]))
    assert ((c[0] - c[1]) - (table[-1] - table[2])).abs().max() <= 16 * U64


def test_conditioning_adds_time_class_and_size() -> None:
    model = random_reference(19, num_classes=5)

    def mlp(name: str, value: float) -> np.ndarray:
        weights = {k: v.numpy() for k, v in getattr(model, name).state_dict().items()}
        angle = value * np.exp(-np.log(1e4) * np.arange(128) / 127)
        features = np.concatenate([np.cos(angle), np.sin(angle)])
        hidden = features @ weights["linear_1.weight"].T + weights["linear_1.bias"]
        return hidden / (1 + np.exp(-hidden)) @ weights["linear_2.weight"].T + weights["linear_2.bias"]

    c = model.conditioning(torch.tensor([250.5], dtype=torch.float64), torch.tensor([16]), torch.tensor([1]))[0].numpy()
    table = model.class_embedder.embedding_table.weight[1].numpy()
    expected = mlp("timestep_embedder", 250.5) + table + mlp("latent_size_embedder", 16)
    assert np.abs(c - expected).max() <= 1e-12  # see the whole model's test


def test_a_model_without_classes_has_no_table() -> None:
    model = PixelFlowTransformer(depth=1, num_attention_heads=1, attention_head_dim=4)
    assert not any("class" in name for name, _ in model.named_parameters())
