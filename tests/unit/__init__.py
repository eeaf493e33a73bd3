"""Pure tests: no process, no socket."""
