"""What the benchmarks and comparisons in scripts/ are made of, and the results they left."""
