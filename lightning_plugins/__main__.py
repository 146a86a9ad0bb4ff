"""``python -m lightning_plugins`` is ``lightning-plugins``."""

from lightning_plugins.cli import main

if __name__ == "__main__":
    main()
