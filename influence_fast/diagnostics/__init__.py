"""What a machine has, and how fast the kernels are on it."""
