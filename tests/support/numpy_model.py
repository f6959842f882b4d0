"""An independent PixelFlow transformer: float64 NumPy, one image at a time, written from the equations alone.

It shares no line and no library routine with the PyTorch model: patches are cut out in loops, RoPE multiplies complex
numbers, softmax, GELU and the norms are written out, and heads are computed one after the other. The shape of a model
follows from its parameters, except for the number of heads.
"""

import numpy as np


def sinusoid(value: float) -> np.ndarray:
    """Cosines, then sines, of ``value * exp(-ln(10000) i / 127)``, i = 0..127: ``[256]``."""
    angle = value * np.exp(-np.log(10000.0) * np.arange(128) / 127)
    return np.concatenate([np.cos(angle), np.sin(angle)])


def silu(x: np.ndarray) -> np.ndarray:
    """``x / (1 + exp(-x))``."""
    return x / (1 + np.exp(-x))


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU in the tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: np.ndarray) -> np.ndarray:
    """LayerNorm of each row, without affine parameters."""
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """RMSNorm of each row over its full width."""
    return weight * (x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Softmax of each row."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def rope(head: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """2-D RoPE of one head ``[N, D]`` as complex products: the column rotates the first half, the row the second."""
    dim = head.shape[1]
    token = np.arange(rows * columns)
    theta = 10000.0 ** (-2 * np.arange(dim // 4) / (dim / 2))
    out = np.empty_like(head)
    for first, position in ((0, token % columns), (dim // 2, token // columns)):
        half = head[:, first : first + dim // 2]
        turned = (half[:, 0::2] + 1j * half[:, 1::2]) * np.exp(1j * position[:, None] * theta)
        out[:, first : first + dim // 2 : 2] = turned.real
        out[:, first + 1 : first + dim // 2 : 2] = turned.imag
    return out


class NumpyModel:
    """The velocity field, given a dictionary of parameters under the published names."""

    def __init__(self, parameters: dict[str, np.ndarray], heads: int) -> None:
        self.parameters = {name: np.asarray(value, dtype=np.float64) for name, value in parameters.items()}
        self.heads = heads
        self.depth = 1 + max(int(name.split(".")[1]) for name in parameters if name.startswith("transformer_blocks."))
        self.patch = self.parameters["patch_embed.proj.weight"].shape[-1]

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        """``x W^T + b``, without b if there is none."""
        return x @ self.parameters[f"{name}.weight"].T + self.parameters.get(f"{name}.bias", 0.0)

    def conditioning(self, t_model: float, latent_size: int, label: int | None) -> np.ndarray:
        """Return the conditioning vector ``c [C]``."""
        total = 0.0
        for name, value in (("timestep_embedder", t_model), ("latent_size_embedder", latent_size)):
            hidden = silu(self.linear(f"{name}.linear_1", sinusoid(value)))
            total = total + self.linear(f"{name}.linear_2", hidden)
        if label is not None:
            total = total + self.parameters["class_embedder.embedding_table.weight"][label]
        return np.asarray(total)

    def embed(self, image: np.ndarray) -> np.ndarray:
        """Embed patches, each multiplied with every filter: ``[c, h, w] -> [N, C]``."""
        weight, p = self.parameters["patch_embed.proj.weight"], self.patch
        tokens = []
        for top in range(0, image.shape[1], p):
            for left in range(0, image.shape[2], p):
                window = image[:, top : top + p, left : left + p]
                tokens.append([(window * kernel).sum() for kernel in weight])
        return np.array(tokens) + self.parameters["patch_embed.proj.bias"]

    def attention(
        self,
        name: str,
        x: np.ndarray,
        text: np.ndarray | None,
        mask: np.ndarray | None,
        grid: tuple[int, int],
    ) -> np.ndarray:
        """Self-attention of ``x [N, C]``, or cross-attention from it to ``text [L, E]``."""
        source = x if text is None else text
        q = rms_norm(self.linear(f"{name}.q_proj", x), self.parameters[f"{name}.q_norm.weight"])
        k = rms_norm(self.linear(f"{name}.k_proj", source), self.parameters[f"{name}.k_norm.weight"])
        v = self.linear(f"{name}.v_proj", source)
        dim = q.shape[1] // self.heads
        joined = np.empty_like(q)
        for h in range(self.heads):
            part = slice(h * dim, (h + 1) * dim)
            q_h = rope(q[:, part], *grid)
            k_h = rope(k[:, part], *grid) if text is None else k[:, part]
            logits = q_h @ k_h.T / np.sqrt(dim)
            if mask is not None:
                logits = logits + np.where(np.asarray(mask) == 0, -10000.0, 0.0)
            joined[:, part] = softmax(logits) @ v[:, part]
        return self.linear(f"{name}.o_proj", joined)

    def block(
        self,
        i: int,
        x: np.ndarray,
        c: np.ndarray,
        text: np.ndarray | None,
        mask: np.ndarray | None,
        grid: tuple[int, int],
    ) -> np.ndarray:
        """One transformer block on ``x [N, C]``."""
        name = f"transformer_blocks.{i}"
        six = self.linear(f"{name}.norm1.linear", silu(c)).reshape(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = six
        x = x + gate1 * self.attention(f"{name}.attn1", layer_norm(x) * (1 + scale1) + shift1, None, None, grid)
        if f"{name}.norm2.weight" in self.parameters:
            u = rms_norm(x, self.parameters[f"{name}.norm2.weight"])
            x = x + self.attention(f"{name}.attn2", u, text, mask, grid)
        v = rms_norm(x, self.parameters[f"{name}.norm3.weight"]) * (1 + scale2) + shift2
        return x + gate2 * self.linear(f"{name}.mlp.fc2", gelu_tanh(self.linear(f"{name}.mlp.fc1", v)))

    def __call__(
        self,
        image: np.ndarray,
        t_model: float,
        label: int | None = None,
        latent_size: int | None = None,
        text: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> np.ndarray:
        """Velocity ``[c, h, w]`` of one image ``[c, h, w]``."""
        p = self.patch
        rows, columns = image.shape[1] // p, image.shape[2] // p
        c = self.conditioning(t_model, columns if latent_size is None else latent_size, label)
        x = self.embed(image)
        for i in range(self.depth):
            x = self.block(i, x, c, text, mask, (rows, columns))
        shift, scale = self.linear("proj_out_1", silu(c)).reshape(2, -1)
        pixels = self.linear("proj_out_2", layer_norm(x) * (1 + scale) + shift)
        velocity = np.empty_like(image)
        for n, token in enumerate(pixels):
            top, left = n // columns * p, n % columns * p
            velocity[:, top : top + p, left : left + p] = token.reshape(p, p, -1).transpose(2, 0, 1)
        return velocity
