"""What the methods do on small real data: scripts that print tables."""
