"""The sections of a report. Each file makes one section or a few that belong together."""
