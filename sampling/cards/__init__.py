"""Model cards: what is known about weights, as the README.md of their folder."""
