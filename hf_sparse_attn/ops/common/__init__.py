"""What the implementations share."""
