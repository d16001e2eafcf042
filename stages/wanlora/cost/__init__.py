"""The cost of a step: FLOPs, memory, GPUs and seconds."""
