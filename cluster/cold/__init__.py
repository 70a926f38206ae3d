"""The cold tier without Ray: block format, files on disks, links, and the sink's planning."""
