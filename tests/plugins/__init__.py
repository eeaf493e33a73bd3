"""What pytest is taught here: undeclared log lines and leaks fail a test, FUSE tests never skip, SIGTERM ends all."""
