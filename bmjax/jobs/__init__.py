"""What the experiments run: whole jobs over the library, each one function of a config and a folder."""
