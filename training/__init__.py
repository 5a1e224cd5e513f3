"""What train.py is made of: settings, what they set up, the loop over steps, and what it says about itself."""
