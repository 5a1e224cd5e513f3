"""Parts of the benchmarks and comparisons in scripts/, and recorded results."""
