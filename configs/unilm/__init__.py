"""UniLM configurations."""
