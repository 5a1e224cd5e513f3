"""What scripts/benchmark.py and scripts/gpu_report.py are made of, and the results they left."""
