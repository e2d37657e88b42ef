"""The engines, in order of preference, and the choice among them."""
