"""EAE configurations."""
