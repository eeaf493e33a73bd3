"""The pure parts of the benchmark; it doesn't run here."""
