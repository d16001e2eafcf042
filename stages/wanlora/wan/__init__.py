"""Wan through diffusers, peft and transformers: the only code that imports them."""

import logging

# Importing diffusers' pipelines of Wan, with or without CLIP, makes transformers warn of a missing
# torchvision. CLIP's preprocessing then uses Pillow, and the provenance of its rows has that.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
