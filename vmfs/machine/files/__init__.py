"""What each file of a machine gets and puts. Names, permissions and inodes are `vmfs.fs`'s."""
