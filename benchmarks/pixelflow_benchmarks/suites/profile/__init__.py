"""Where a stage's time goes: a profiler's trace, its kernels by class, each class beside its floor."""
