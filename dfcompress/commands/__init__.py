"""One thin file a command: its options, one call of the function of the same name, one summary."""
