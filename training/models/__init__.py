"""Load models from disk, find their head and layout, and save them."""
