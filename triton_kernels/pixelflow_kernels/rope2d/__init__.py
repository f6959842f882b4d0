"""RMSNorm of query and key over the full width and 2-D RoPE by token position, fused in one pass; also RoPE alone."""

from .op import norm_rope2d_q_norm_k, qk_norm_rope2d, rope2d, rotation_table

__all__ = ["norm_rope2d_q_norm_k", "qk_norm_rope2d", "rope2d", "rotation_table"]
