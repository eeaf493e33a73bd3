"""The benchmark: UKAI and what people would use instead, on one machine, in turns."""
