"""What a packed layer is."""
