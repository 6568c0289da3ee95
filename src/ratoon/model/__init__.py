"""The Transformer: its shape, its layers, its files."""
