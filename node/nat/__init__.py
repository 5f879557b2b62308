"""What a node finds out about the network between it and the others, and does about it."""
