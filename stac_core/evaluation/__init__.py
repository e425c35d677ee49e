"""Does it map well, and at what cost? Sequences, measures, and the command `stac-eval`."""
