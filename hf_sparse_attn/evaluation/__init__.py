"""What the sparsity cost, in numbers."""
