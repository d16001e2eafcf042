"""Contract 1, the manifest: captions, clips, and what a set of clips contains."""
