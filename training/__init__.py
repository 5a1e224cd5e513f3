"""What train.py is made of: settings, what they set up, the loop over steps, and what it says about itself."""

import runtime  # noqa: F401  # first: it reports other packages named models
