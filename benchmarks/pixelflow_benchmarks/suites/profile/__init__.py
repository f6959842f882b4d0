"""``bench profile``: where a stage's time goes: a profiler trace, and its kernels by class, with each class's floor."""
