"""Training on cached latents: the parts of a step, for every command that takes one."""
