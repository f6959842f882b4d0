"""``bench memory``: peaks per stage, batch and variant, measured; and live bytes, counted without a GPU."""
