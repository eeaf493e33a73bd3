"""UKAI: centrally controllable distributed local storage for virtual-machine disks."""

__version__ = "0.1.0"
