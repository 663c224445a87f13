"""Arrays and files: volumes, labels, image synthesis, metrics. No ray, no networks."""
