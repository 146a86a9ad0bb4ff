"""SiD: a diffusion model becomes a one-step generator, without data."""
