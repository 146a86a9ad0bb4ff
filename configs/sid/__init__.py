"""SiD configurations."""
