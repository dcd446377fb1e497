"""torchtitan on processors: its trainer as it is, on a device module that has what it asks of a GPU's.

Imported before the rest of torchtitan; run as a program, it is ``python -m torchtitan.train``.
"""

import torch
from torchtitan.tools import utils


class Processors:
    """torch.cpu, and what torch.cuda has beyond."""

    @staticmethod
    def get_device_name(device=None):
        return "CPU"

    @staticmethod
    def get_device_properties(device=None):
        return type("Properties", (), {"total_memory": 1 << 34})

    @staticmethod
    def memory_stats(device=None):
        return {}

    @staticmethod
    def nothing(*args, **options):
        """A thing that is not there to be reset."""

    reset_peak_memory_stats = empty_cache = nothing

    def __getattr__(self, name):
        return getattr(torch.cpu, name)


utils.device_type, utils.device_module = "cpu", Processors()

from torchtitan.distributed import utils as distributed  # noqa: E402

distributed.set_pg_timeouts = Processors.nothing  # its barrier names devices, which gloo refuses

if __name__ == "__main__":
    from torchtitan.train import main

    main()
