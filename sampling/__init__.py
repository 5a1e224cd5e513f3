"""Parts of sample.py and sample_ddp.py: settings, and a checkpoint ready to sample from."""

import runtime  # noqa: F401  # first: it reports other packages named models
