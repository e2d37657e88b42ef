"""A guest that uses a device, small enough to be read: see `write_sector`."""
