"""The processes in which programs that a model wrote run, and are judged; see `__main__`."""
