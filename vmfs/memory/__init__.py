"""A machine's RAM, and what of the host's files it stands on."""
