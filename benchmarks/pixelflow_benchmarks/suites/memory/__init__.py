"""``bench memory``: measured peaks per stage, batch size and variant, and live bytes counted without a GPU."""
