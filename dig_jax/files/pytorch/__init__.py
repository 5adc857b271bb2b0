"""PyTorch's .pt files, read and written without PyTorch."""
