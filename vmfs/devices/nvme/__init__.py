"""NVMe: a controller with one namespace, which is a disk."""
