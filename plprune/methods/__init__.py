"""One file per method; YAML names them by class path."""
