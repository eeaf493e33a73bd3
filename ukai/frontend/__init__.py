"""The process on a hypervisor that shows images as files (FUSE) and passes their requests to blockd."""
