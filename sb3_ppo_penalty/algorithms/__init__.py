"""The algorithms as a user sees them."""
