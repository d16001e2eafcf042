"""The folder of a run: settings, checkpoints, saved latents and its page."""
