"""What compression would cost, measured layer by layer. Reads a model, never changes it."""
