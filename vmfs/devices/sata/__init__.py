"""SATA: an AHCI controller, with the disks and CD-ROM drives of IDE (vmfs.devices.ide) at its ports."""
