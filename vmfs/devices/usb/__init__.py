"""USB: an xHCI controller, and what can be plugged into it."""
