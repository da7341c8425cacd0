"""Everything that knows Lightning: module, data, command line, and putting a run back together after a cut."""
