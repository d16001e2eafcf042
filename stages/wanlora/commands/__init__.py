"""The commands. `run()` is in the file, or the folder, named after the command."""
