"""What runs on the device: numpy and the runtime's own package, never torch or transformers."""
