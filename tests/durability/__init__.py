"""What a power cut leaves: acknowledged and synced data, on each replica alone."""
