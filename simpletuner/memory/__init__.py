"""How a big frozen base fits."""
