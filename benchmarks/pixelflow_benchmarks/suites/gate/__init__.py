"""The regression gate: counts and ratios that hold on any machine, beside a committed baseline."""
