"""A page that shows runs: what their folders hold, as sections of tables, curves and pictures, rendered to one file."""
