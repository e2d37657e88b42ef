"""All machines of a mount, the mount's settings, and the process that serves it."""
