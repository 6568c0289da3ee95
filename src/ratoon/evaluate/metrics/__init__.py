"""What a figure is, how sure it is, and how each is counted: free of torch, one file a family of metrics."""
