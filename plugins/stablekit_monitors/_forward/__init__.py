"""What only monitors look for in forward passes."""
