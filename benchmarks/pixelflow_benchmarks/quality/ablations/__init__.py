"""The paper's ablations on real digits, at a size that a CPU can run."""
