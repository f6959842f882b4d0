"""What every suite measures with: time, energy, ceilings, counts; and where results go."""
