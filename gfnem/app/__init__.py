"""The command line: Hydra's application, verbs, what is refused, help."""
