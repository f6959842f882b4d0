"""The regression gate: compares counts and ratios that hold on any machine with a committed baseline."""
