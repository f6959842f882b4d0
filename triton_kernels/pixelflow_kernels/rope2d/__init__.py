"""RMSNorm of query and key over the full width, 2-D RoPE by token place; together in one pass, or RoPE alone."""

from .op import norm_rope2d_q_norm_k, qk_norm_rope2d, rope2d, rotation_table

__all__ = ["norm_rope2d_q_norm_k", "qk_norm_rope2d", "rope2d", "rotation_table"]
