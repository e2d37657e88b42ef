"""Virtio devices over PCI: `queue` the virtqueues, `pci` the transport and what all devices are, and a module a
device.

Source throughout: Virtual I/O Device (VIRTIO) Version 1.2, OASIS; sections are given where a rule is kept.
"""
