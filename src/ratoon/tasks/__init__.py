"""What a record is, and what a model learns from it: one file a task, behind one contract."""
