"""What all tests share."""

pytest_plugins = ["tests.plugins.fuse_required"]
