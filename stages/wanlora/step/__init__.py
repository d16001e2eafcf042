"""What a step on cached latents is made of, for every command that takes one.

batches.py      which clips, sigmas, noise and prompts a slot gets; reading ahead
source.py       a view over an open store, checked against the transformer
predict.py      one forward pass in the right types
masters.py      fp32 master weights and their gradients
validation.py   the loss of a panel of clips, with the adapter and without it
"""
