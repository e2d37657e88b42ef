"""IDE: the controller of a PIIX3, its two channels, and the drives on them: disks (ATA) and CD-ROM drives (ATAPI)."""
