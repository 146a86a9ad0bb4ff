"""Callback configurations."""
