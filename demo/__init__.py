"""A page in the browser that samples from one checkpoint, or from two side by side."""
