"""Characters <-> tokens; messages -> tokens and a mask."""
