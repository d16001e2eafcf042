"""Pure functions: no files, no model libraries, no configuration."""
