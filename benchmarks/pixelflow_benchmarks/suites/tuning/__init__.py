"""Launch configurations: candidates, measurements, choices."""
