"""What the model is. Shape letters: see trimaran.ops."""
