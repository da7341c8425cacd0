"""The only package that changes a model; import its modules directly."""
