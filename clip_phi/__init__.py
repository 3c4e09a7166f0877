"""Training, evaluation and serving of Clip-Phi. The model itself is the package modeling_clip_phi."""

import logging

# Where there is no GPU, bitsandbytes warns at each import that an optional kernel for CPUs is absent.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
