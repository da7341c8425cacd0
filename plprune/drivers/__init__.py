"""In which order a model is observed and decided about."""
