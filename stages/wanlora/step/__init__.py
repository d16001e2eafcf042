"""What a step on cached latents is made of, for every command that takes one.

batches.py      which clips, sigmas, noise and prompts a slot gets; reading ahead
clips.py        the check that a transformer can read a view, and the weights of its clips
workload.py     the micro-batch of a run, and how its blocks run
source.py       a view over an open store
predict.py      one forward pass in the right types
masters.py      fp32 master weights and their gradients
validation.py   the loss of a panel of clips, with the adapter and without it
"""
