"""Video files: probe, decode, resize and crop, write mp4."""
