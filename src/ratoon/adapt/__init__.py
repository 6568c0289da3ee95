"""Training few parameters: one file a paper, behind one contract."""
