"""Runtimes that a bundle can be deployed to: one file each to open it, one to export to it."""
