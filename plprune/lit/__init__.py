"""Everything that knows Lightning: module, data, command line, and going on after a cut."""
