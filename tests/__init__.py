"""Tests of UKAI, in tiers: pure, tables, real processes, real FUSE."""
