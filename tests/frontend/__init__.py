"""The frontend against a blockd and a metad that are made up."""
