"""Parts of train.py: settings, set-up, the loop over steps, and measurements."""
