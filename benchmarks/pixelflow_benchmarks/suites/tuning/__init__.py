"""``bench tune``: candidate launch configurations, their measurement, and the choice among them."""
