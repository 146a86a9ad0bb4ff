"""CapsNet."""
