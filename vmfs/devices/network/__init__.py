"""Network cards, and where their frames go."""
