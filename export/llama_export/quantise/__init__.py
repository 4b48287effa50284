"""From float32 weights to 8 and 4 bits, layer by layer, with the rounding that costs least."""
