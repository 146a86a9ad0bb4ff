"""What every part shares. Imports torch, lightning and torchmetrics only, and nothing else of this package."""
