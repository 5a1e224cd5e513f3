"""What sample.py and sample_ddp.py have in common: settings, and a checkpoint made ready to draw images."""
