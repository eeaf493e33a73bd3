"""Tests of ukai-ctl: against a metad that a test scripts, and as real processes."""
