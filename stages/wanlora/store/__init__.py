"""Contract 2, the latent store: the only code that imports zarr."""
