"""The block server of a node: owns the block files and coordinates the images whose writer is on this node."""
