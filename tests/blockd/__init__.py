"""The block server: its files, its protocol with other nodes, its marks and its copy of the metadata."""
