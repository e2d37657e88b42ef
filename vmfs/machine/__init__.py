"""One machine: its memory, CPU, runs, what is booted, and its state."""
