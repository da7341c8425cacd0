"""The shipped configurations, as package data: `importlib.resources.files("plprune.configs")`."""
