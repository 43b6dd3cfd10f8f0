"""What the hardware is: target descriptions."""
