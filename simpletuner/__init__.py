"""Fine-tune diffusion models with adapters, from config.json and a folder of pictures."""

__version__ = "0.1.0"
