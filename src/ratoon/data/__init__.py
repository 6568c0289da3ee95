"""Files -> documents -> shards -> batches. NumPy out, never torch."""
