"""What a bundle is made of: the model as its device takes it, scripts, records without paths, and the archive."""
