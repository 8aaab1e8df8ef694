"""What a run needs, before anybody rents a machine: memory, disk, network, hours."""
