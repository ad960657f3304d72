"""Checkpoints that resume exactly, and loading of files that are not trusted."""
