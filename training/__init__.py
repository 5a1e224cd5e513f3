"""Parts of train.py: settings, set-up, the loop over steps, and measurements."""

import runtime  # noqa: F401  # first: it reports other packages named models
