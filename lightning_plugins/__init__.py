"""PyTorch Lightning parts for ideas that are famous on paper and poorly served in code."""

__version__ = "0.1.0"
