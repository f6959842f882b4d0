"""The reference transformer as a whole: against the equations in numpy, published names, initialisation."""

import math

import numpy as np
import pytest
import torch

from pixelflow_engine.config import ModelConfig, parameter_shapes
from pixelflow_engine.reference import PixelFlowTransformer
from support.numpy_model import NumpyModel
from support.reference_models import normal, random_reference, seeded

# Both sides compute in float64, u = 1.1e-16. The largest amplification is that of the time's angle: t exp(..) reaches
# 999 with a relative error of about 2u from exp and the product, so sines are known to 999 * 2u = 2e-13; 256 of them
# add up with random signs through matrices of unit gain. Outputs are of order 5: 2e-12 absolute leaves a factor 10.
FLOAT64_TOLERANCE = 2e-12

CASES = {
    "classes": {},
    "one head of dimension 72": {"heads": 1, "head_dim": 72, "depth": 1, "patch_size": 4},
    "four heads, no attention bias": {"heads": 4, "head_dim": 4, "attention_bias": False},
    "no classes": {"num_classes": 0},
    "text": {"num_classes": 0, "cross_attention_dim": 12},
    "text and classes, text as wide as the model": {"cross_attention_dim": 16},
    "one channel, patch 1": {"channels": 1, "patch_size": 1},
}


def numpy_twin(model: PixelFlowTransformer, heads: int) -> NumpyModel:
    return NumpyModel({name: value.double().numpy() for name, value in model.state_dict().items()}, heads)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 5), (6, 3)], ids=str)
def test_velocity_equals_the_equations_in_numpy(case: str, grid: tuple[int, int]) -> None:
    settings = CASES[case]
    model = random_reference(17, **settings)
    p, channels = settings.get("patch_size", 2), settings.get("channels", 3)
    twin = numpy_twin(model, settings.get("heads", 2))
    generator = seeded(18)
    x = normal((3, channels, grid[0] * p, grid[1] * p), generator)
    t_model = torch.tensor([0.0, 425.749, 999.0], dtype=torch.float64)
    labels = torch.tensor([0, 3, 5]) if settings.get("num_classes", 5) else None
    text, mask = None, None
    if "cross_attention_dim" in settings:
        text = normal((3, 6, settings["cross_attention_dim"]), generator)
        mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    velocity = model(x, t_model, labels, encoder_hidden_states=text, encoder_attention_mask=mask)
    assert velocity.dtype == torch.float64
    for i in range(3):
        expected = twin(
            x[i].numpy(),
            t_model[i].item(),
            None if labels is None else labels[i].item(),
            text=None if text is None else text[i].numpy(),
            mask=None if mask is None else mask[i].numpy(),
        )
        assert np.abs(expected).max() > 0.1, "the model is degenerate and the comparison says nothing"
        error = np.abs(velocity[i].numpy() - expected).max()
        assert error <= FLOAT64_TOLERANCE, f"image {i}: differs by {error:.2e}"


def test_latent_size_is_the_width_in_patches_unless_given() -> None:
    model = random_reference(19)
    twin = numpy_twin(model, 2)
    x = normal((2, 3, 4, 10), seeded(20))
    t, labels = torch.tensor([100.0, 7.5], dtype=torch.float64), torch.tensor([1, 2])
    implicit = model(x, t, labels)
    assert torch.equal(implicit, model(x, t, labels, 5))
    assert torch.equal(implicit, model(x, t, labels, torch.tensor([5])))
    per_image = model(x, t, labels, torch.tensor([5, 64]))
    assert torch.equal(implicit[0], per_image[0])
    for i, size in enumerate((5, 64)):
        expected = twin(x[i].numpy(), t[i].item(), labels[i].item(), latent_size=size)
        assert np.abs(per_image[i].numpy() - expected).max() <= FLOAT64_TOLERANCE
    assert (per_image[1] - implicit[1]).abs().max() > 1e-3


def test_an_integer_time_and_integer_labels_of_32_bits_are_welcome() -> None:
    model = random_reference(21)
    x = normal((1, 3, 4, 4), seeded(22))
    expected = model(x, torch.tensor([37.0], dtype=torch.float64), torch.tensor([4]))
    assert torch.equal(model(x, torch.tensor([37]), torch.tensor([4], dtype=torch.int32)), expected)


def test_a_float32_model_is_within_float32_rounding_of_the_equations() -> None:
    # With u = 6e-8 the time's angle is known to 999 * 2u = 1.2e-4 rad; products and norms add some ten u. Over 256
    # sinusoids of random sign, few of them that fast, the angle's error is the bound.
    double = random_reference(23, heads=3, head_dim=24, depth=3)
    single = random_reference(23, heads=3, head_dim=24, depth=3, dtype=torch.float32)
    x = normal((2, 3, 8, 8), seeded(24), torch.float32)
    t, labels = torch.tensor([998.7, 3.25]), torch.tensor([0, 5])
    velocity = single(x, t, labels)
    assert velocity.dtype == torch.float32
    assert (velocity.double() - double(x.double(), t.double(), labels)).abs().max() <= 1.2e-4


@pytest.mark.parametrize("mask_type", [torch.int64, torch.bool, torch.float32])
def test_padded_text_is_ignored_bit_for_bit(mask_type: torch.dtype) -> None:
    # exp(-10000) is 0 in every type, so what padding holds cannot matter at all.
    model = random_reference(25, num_classes=0, cross_attention_dim=12)
    generator = seeded(26)
    x, t = normal((2, 3, 4, 4), generator), torch.tensor([3.0, 500.0], dtype=torch.float64)
    text = normal((2, 6, 12), generator)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]]).to(mask_type)
    velocity = model(x, t, encoder_hidden_states=text, encoder_attention_mask=mask.float())
    other = torch.where(mask[:, :, None].bool(), text, 7 + normal((2, 6, 12), generator))
    assert torch.equal(model(x, t, encoder_hidden_states=other, encoder_attention_mask=mask.float()), velocity)
    changed = text.clone()
    changed[:, 0] += 1
    assert not torch.equal(model(x, t, encoder_hidden_states=changed, encoder_attention_mask=mask.float()), velocity)
    for i, length in enumerate((4, 2)):  # as if the padding were not there
        alone = model(x[i : i + 1], t[i : i + 1], encoder_hidden_states=text[i : i + 1, :length])
        assert (alone - velocity[i]).abs().max() <= FLOAT64_TOLERANCE


def test_padding_is_an_additive_bias_not_an_exclusion() -> None:
    # With every token padded the bias is the same everywhere and softmax does not see it. Adding -10000 to logits of
    # order 10 rounds them to 2^-53 * 10000 = 1e-12; allow a hundred times that for the rest of the network.
    model = random_reference(27, num_classes=0, cross_attention_dim=12)
    generator = seeded(28)
    x, text = normal((1, 3, 4, 4), generator), normal((1, 5, 12), generator)
    t = torch.tensor([10.0], dtype=torch.float64)
    padded = model(x, t, encoder_hidden_states=text, encoder_attention_mask=torch.zeros(1, 5))
    assert (padded - model(x, t, encoder_hidden_states=text)).abs().max() <= 1e-10


def published_names(depth: int, classes: bool, text: bool) -> list[str]:
    """The names of a published checkpoint, spelled out."""
    names = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    for mlp in ("timestep_embedder", "latent_size_embedder"):
        names += [f"{mlp}.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    if classes:
        names.append("class_embedder.embedding_table.weight")
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        names += [f"{block}.norm1.linear.weight", f"{block}.norm1.linear.bias"]
        for attention in ("attn1", "attn2") if text else ("attn1",):
            if attention == "attn2":
                names.append(f"{block}.norm2.weight")
            names += [f"{block}.{attention}.{m}_proj.{kind}" for m in "qkvo" for kind in ("weight", "bias")]
            names += [f"{block}.{attention}.{m}_norm.weight" for m in "qk"]
        names.append(f"{block}.norm3.weight")
        names += [f"{block}.mlp.fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]
    return names + [f"proj_out_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")]


XL = {"num_attention_heads": 16, "attention_head_dim": 72, "depth": 28, "patch_size": 4, "attention_bias": True}
C = 16 * 72
CONDITIONING = 2 * ((256 * C + C) + (C * C + C))
ATTENTION = 4 * (C * C + C) + 2 * C
CROSS_ATTENTION = 2 * (C * C + C) + 2 * (2048 * C + C) + 2 * C
BLOCK = (6 * C * C + 6 * C) + ATTENTION + C + (4 * C * C + 4 * C) + (4 * C * C + C)
ENDS = (48 * C + C) + (2 * C * C + 2 * C) + (48 * C + 48)
PUBLISHED = {
    "class to image": (
        {"num_classes": 1000, "cross_attention_dim": None},
        1001 * C + CONDITIONING + 28 * BLOCK + ENDS,
        676_611_120,
    ),
    "text to image": (
        {"num_classes": 0, "cross_attention_dim": 2048},
        CONDITIONING + 28 * (BLOCK + C + CROSS_ATTENTION) + ENDS,
        882_122_160,
    ),
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_parameters_of_the_published_models(kind: str) -> None:
    extra, counted, published = PUBLISHED[kind]
    with torch.device("meta"):
        model = PixelFlowTransformer(**XL, **extra)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert list(shapes) == published_names(28, extra["num_classes"] > 0, extra["cross_attention_dim"] is not None)
    assert set(shapes) == {name for name, _ in model.named_parameters()}, "a checkpoint holds parameters alone"
    assert sum(math.prod(shape) for shape in shapes.values()) == counted == published
    assert parameter_shapes(ModelConfig(**XL, **extra)) == shapes
    assert list(parameter_shapes(ModelConfig(**XL, **extra))) == list(shapes)

    expected = {
        "patch_embed.proj.weight": (C, 3, 4, 4),
        "timestep_embedder.linear_1.weight": (C, 256),
        "timestep_embedder.linear_2.weight": (C, C),
        "latent_size_embedder.linear_1.weight": (C, 256),
        "transformer_blocks.27.norm1.linear.weight": (6 * C, C),
        "transformer_blocks.27.attn1.q_norm.weight": (C,),
        "transformer_blocks.27.attn1.k_norm.weight": (C,),
        "transformer_blocks.27.norm3.weight": (C,),
        "transformer_blocks.27.mlp.fc1.weight": (4 * C, C),
        "proj_out_1.weight": (2 * C, C),
        "proj_out_2.weight": (48, C),
        "proj_out_2.bias": (48,),
    }
    if kind == "class to image":
        expected["class_embedder.embedding_table.weight"] = (1001, C)
    else:
        expected |= {f"transformer_blocks.0.attn2.{m}_proj.weight": (C, 2048) for m in "kv"}
        expected |= {f"transformer_blocks.0.attn2.{m}_proj.weight": (C, C) for m in "qo"}
        expected |= {f"transformer_blocks.0.attn2.{m}_norm.weight": (C,) for m in "qk"}
    assert {name: shapes[name] for name in expected} == expected


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_classes", [0, 10])
@pytest.mark.parametrize("cross", [None, 24])
def test_parameter_shapes_of_other_models(bias: bool, num_classes: int, cross: int | None) -> None:
    settings = {
        "num_attention_heads": 3,
        "attention_head_dim": 12,
        "depth": 2,
        "in_channels": 1,
        "out_channels": 1,
        "patch_size": 2,
        "attention_bias": bias,
        "num_classes": num_classes,
        "cross_attention_dim": cross,
    }
    with torch.device("meta"):
        model = PixelFlowTransformer(**settings)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    names = published_names(2, num_classes > 0, cross is not None)
    if not bias:
        names = [name for name in names if not (".attn" in name and name.endswith("bias"))]
    assert list(shapes) == names
    assert parameter_shapes(ModelConfig(**settings)) == shapes


def test_initialisation() -> None:
    print("seed 29")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(29)
        model = PixelFlowTransformer(
            depth=2, num_attention_heads=4, attention_head_dim=24, num_classes=100, cross_attention_dim=40
        )
    zero_weights = {"proj_out_1", "proj_out_2"} | {f"transformer_blocks.{i}.norm1.linear" for i in range(2)}
    small = {f"{mlp}.linear_{i}" for mlp in ("timestep_embedder", "latent_size_embedder") for i in (1, 2)}
    small.add("class_embedder.embedding_table")
    seen = set()
    for name, value in model.named_parameters():
        owner, _, kind = name.rpartition(".")
        if kind == "bias":
            assert not value.any(), name
        elif "norm" in owner and value.dim() == 1:
            assert (value == 1).all(), name
        elif owner in zero_weights:
            assert not value.any(), name
            seen.add(owner)
        elif owner in small:
            # Relative error of a sample standard deviation is 1/sqrt(2n): five of them; and no truncation at 2 sigma.
            deviation = value.std().item()
            assert abs(deviation / 0.02 - 1) <= 5 / math.sqrt(2 * value.numel()), name
            assert abs(value.mean().item()) <= 5 * 0.02 / math.sqrt(value.numel()), name
            assert value.abs().max() > 3 * 0.02, name
            seen.add(owner)
        else:
            # Xavier: uniform on +-sqrt(6 / (in + out)); the standard deviation of n uniform draws is known to
            # sqrt((9/5 - 1) / (4 n)) relative. A bound of the wrong fan would be off by more than a per cent.
            matrix = value.flatten(1)
            bound = math.sqrt(6 / sum(matrix.shape))
            n = matrix.numel()
            assert matrix.abs().max() <= bound * (1 + 1e-6), name
            assert matrix.abs().max() >= bound * (1 - 20 / n), name  # P(max < (1 - 20/n) bound) = e^-20
            assert abs(matrix.std().item() / (bound / math.sqrt(3)) - 1) <= 5 * math.sqrt(0.2 / n), name
            assert abs(matrix.mean().item()) <= 5 * bound / math.sqrt(3 * n), name
    assert seen == zero_weights | small


@pytest.mark.parametrize("settings", [{"num_classes": 7}, {"cross_attention_dim": 16}], ids=["classes", "text"])
def test_a_fresh_model_is_the_zero_field(settings: dict[str, int]) -> None:
    model = PixelFlowTransformer(depth=2, num_attention_heads=2, attention_head_dim=8, patch_size=2, **settings)
    generator = seeded(30)
    x, t = normal((2, 3, 8, 8), generator, torch.float32), torch.tensor([0.0, 999.0])
    labels = torch.tensor([0, 7]) if "num_classes" in settings else None
    text = None if labels is not None else normal((2, 3, 16), generator, torch.float32)
    velocity = model(x, t, labels, encoder_hidden_states=text)
    assert velocity.shape == x.shape
    assert not velocity.any()


def test_a_fresh_block_passes_its_input_on() -> None:
    # Both gates are zero, so without text a block is the identity, bit for bit.
    model = PixelFlowTransformer(depth=1, num_attention_heads=2, attention_head_dim=8, num_classes=3)
    generator = seeded(31)
    x, c = normal((2, 5, 16), generator, torch.float32), normal((2, 16), generator, torch.float32)
    angles = torch.rand(5, 4, generator=generator)
    assert torch.equal(model.transformer_blocks[0](x, c, angles, None, None), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_velocity_has_the_type_of_the_model(dtype: torch.dtype) -> None:
    model = random_reference(32, dtype=dtype)
    x = normal((1, 3, 4, 4), seeded(33), torch.float32)
    assert model(x, torch.tensor([5.0]), torch.tensor([1])).dtype == dtype
