"""Parts of sample.py and sample_ddp.py: settings, and a checkpoint ready to sample from."""
