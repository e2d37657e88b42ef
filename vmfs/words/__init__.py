"""The words that all sides say: exits, registers, modes, errors, numbers."""
