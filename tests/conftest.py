"""Settings that hold for all tests."""

import torch
from hypothesis import Phase, settings

# The same examples in every run: what fails here fails on every machine. No deadline: a busy
# machine is not a defect.
settings.register_profile(
    "stablekit",
    deadline=None,
    derandomize=True,
    max_examples=20,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
settings.load_profile("stablekit")

# The tensors of the tests are small: threads would only wait for one another.
torch.set_num_threads(1)
