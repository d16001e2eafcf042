"""Wan through diffusers, peft and transformers: the only code that imports them."""
