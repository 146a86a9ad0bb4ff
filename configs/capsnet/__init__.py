"""CapsNet configurations."""
