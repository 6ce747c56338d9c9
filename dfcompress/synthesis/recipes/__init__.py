"""One file a published method; the folder is the registry of `--recipe`."""
