"""Reports on runs: the contents of their folders as sections of tables, curves and pictures, in a single HTML file."""
