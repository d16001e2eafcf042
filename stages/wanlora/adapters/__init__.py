"""Contract 3: LoRA matrices in the transformer, and the file that stores them."""
