"""The simulator: the decision code of the three daemons under seeds."""
