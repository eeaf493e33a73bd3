"""Hours of faults over real processes; see ``run.py``."""
