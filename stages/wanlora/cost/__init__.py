"""What a step costs: FLOPs, memory, GPUs and seconds."""
