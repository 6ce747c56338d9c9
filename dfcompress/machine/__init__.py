"""Capabilities of the machine, and their use by a job; the only package that names CUDA."""
