"""One file per verb, or per group of verbs on the same thing."""
