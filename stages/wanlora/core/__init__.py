"""Pure values in, values out: no files, no libraries of models, no configuration."""
