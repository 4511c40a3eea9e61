"""Examples for released models: configs for pictures of one's own, with the settings that the wizard would propose on a card of some size."""
