"""Where outputs go; the driver sets it."""

import tempfile

default_output_dir = tempfile.mkdtemp(prefix="webui outputs ")
