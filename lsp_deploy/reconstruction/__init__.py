"""The best surviving weights under a fixed mask, layer by layer, from calibration activations; nothing is trained."""
